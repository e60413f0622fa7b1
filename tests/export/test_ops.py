"""Each op of the kernels, and each that the exporter lacks, written as ONNX and run beside PyTorch."""
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import visionssm_kernels as kernels
from visionssm.export import compare_onnx, export_onnx
from visionssm.export.inputs import Inputs

pytestmark = pytest.mark.export
pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

DIM, STATE, HEIGHT, WIDTH = 4, 3, 3, 5
LENGTH = HEIGHT * WIDTH


class Op(nn.Module):
    """An op with random parameters; the batch comes first in each input."""

    def __init__(self, function: Callable, *shapes: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.parameters_of_op = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x0, x1=None, x2=None, x3=None, x4=None):
        inputs = [x for x in (x0, x1, x2, x3, x4) if x is not None]
        return self.function(*inputs, *self.parameters_of_op)


def gated_scan(u, delta, B, C, z, A, D, bias):
    return kernels.selective_scan(u, delta, -A.exp(), B, C, D, z, bias, delta_softplus=True, reverse=True)


def routed_scan(u, delta, B, C, A, D, bias):
    return kernels.selective_scan_2d(u, delta, -A.exp(), B, C, D, bias, True, routes='cross')


def grouped_scan_of_many_maps(u, delta, B, C, A):
    return kernels.selective_scan_2d(u, delta.sigmoid(), -A.exp(), B, C, routes='snake', merge='none')


def wavefront(u, top, left, B, C, A, D):
    return kernels.wavefront_scan_2d(u, top, left, -A.exp(), -A.exp() / 2, B, B + 1, C, D, delta_softplus=True,
                                     reverse=True)


def mamba2(x, dt, B, C, A, D):
    return kernels.ssd(x, dt, -A.exp(), B, C, D, dt_softplus=True)


def without_order(x, dt, B, C, A, D):
    return kernels.nc_ssd(x, dt.sigmoid(), -A.exp(), B, C, D)


def convolution(x, weight, bias):
    return kernels.causal_conv1d(x, weight, bias, 'silu')


def dilated(x, weight):
    return kernels.dilated_conv2d(x, weight, [1, 3])


def sort_by_kind(x):
    kinds = x.argmax(1)
    return tuple(kinds.sort(dim=-1, stable=True, descending=down).indices.float() for down in (False, True))


SEQUENCE, MAP = (DIM, LENGTH), (DIM, HEIGHT, WIDTH)
STATES = (STATE, HEIGHT, WIDTH)
# function, shapes of inputs without the batch, shapes of parameters
OPS = {
    'gated scan': (gated_scan, [SEQUENCE, SEQUENCE, (STATE, LENGTH), (STATE, LENGTH), SEQUENCE],
                   [(DIM, STATE), (DIM,), (DIM,)]),
    'routed scan': (routed_scan, [MAP, (4, *MAP), (4, *STATES), (4, *STATES)],
                    [(4 * DIM, STATE), (4 * DIM,), (4 * DIM,)]),
    'grouped scan of many maps': (grouped_scan_of_many_maps, [(4, *MAP), (4, *MAP), (4, 2, *STATES), (4, 2, *STATES)],
                                  [(4 * DIM, STATE)]),
    'wavefront': (wavefront, [MAP, MAP, MAP, STATES, STATES], [(DIM, STATE), (DIM,)]),
    'Mamba-2': (mamba2, [(LENGTH, 2, DIM), (LENGTH, 2), (LENGTH, 1, STATE), (LENGTH, 1, STATE)], [(2,), (2,)]),
    'without order': (without_order, [(LENGTH, 2, DIM), (LENGTH, 2), (LENGTH, 1, STATE), (LENGTH, 1, STATE)],
                      [(2,), (2,)]),
    'convolution': (convolution, [SEQUENCE], [(DIM, 3), (DIM,)]),
    'dilated convolutions': (dilated, [MAP], [(2, DIM, 3, 3)]),
    'sort': (sort_by_kind, [SEQUENCE], []),
}


def draw(shapes: list[tuple[int, ...]], batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(batch)
    return Inputs(tuple(f'x{place}' for place in range(len(shapes))),
                  tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize('name', OPS)
def test_an_op_gives_in_onnx_runtime_what_it_gives_in_pytorch(name: str, tmp_path: Path):
    function, inputs, parameters = OPS[name]
    torch.manual_seed(0)
    model = Op(function, *parameters).eval().requires_grad_(False)
    path = export_onnx(model, tmp_path / 'op.onnx', draw(inputs, 2), dynamic_batch=True)
    for batch in (1, 3):
        assert compare_onnx(model, path, draw(inputs, batch), 0).error < 1e-5
