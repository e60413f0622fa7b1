"""Which backend computes gradients: accelerators compute them in threads that see no context of the caller."""
import functools
import threading

import pytest
import torch

from visionssm_kernels import (
    _dispatch,
    causal_conv1d,
    dilated_conv2d,
    nc_ssd,
    selective_scan,
    ssd,
    use_backend,
    wavefront_scan_2d,
)
from visionssm_kernels._testing import nc_ssd_inputs, scan_inputs, ssd_inputs, wavefront_inputs

OPS = {
    'causal_conv1d': (causal_conv1d, lambda: {'x': torch.randn(1, 3, 5), 'weight': torch.randn(3, 2)}),
    'dilated_conv2d': (functools.partial(dilated_conv2d, dilations=(1,)),
                       lambda: {'x': torch.randn(1, 3, 4, 4), 'weight': torch.randn(1, 3, 3, 3)}),
    'nc_ssd': (nc_ssd, functools.partial(nc_ssd_inputs, 1, 4, 2, 3, 1, 2)),
    'selective_scan': (selective_scan, functools.partial(scan_inputs, 1, 3, 5, 2)),
    'ssd': (ssd, functools.partial(ssd_inputs, 1, 5, 2, 3, 1, 2)),
    'wavefront_scan_2d': (wavefront_scan_2d, functools.partial(wavefront_inputs, 1, 2, 3, 4, 2)),
}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names that were asked for whenever an op chose its backend."""
    names: list[str] = []
    original = _dispatch.requested_backend

    def note() -> str:
        names.append(original())
        return names[-1]

    monkeypatch.setattr(_dispatch, 'requested_backend', note)
    return names


def backward_in_a_thread(out: torch.Tensor) -> None:
    thread = threading.Thread(target=out.float().sum().backward)
    thread.start()
    thread.join()


def run(op: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    function, make = OPS[op]
    inputs = {name: x.requires_grad_() for name, x in make().items()}
    with use_backend('reference'):
        return function(**inputs), list(inputs.values())


@pytest.mark.parametrize('op', OPS)
def test_a_gradient_in_another_thread_is_computed_by_the_backend_of_its_forward_pass(op: str, asked):
    out, inputs = run(op)
    forward = len(asked)
    backward_in_a_thread(out)
    assert len(asked) > forward and set(asked) == {'reference'}
    assert all(x.grad is not None for x in inputs)


def test_a_backend_named_for_the_gradient_comes_first(asked):
    out, _ = run('nc_ssd')
    with use_backend('chunked'):
        out.sum().backward()
    assert asked == ['reference', 'chunked']


def test_without_a_name_the_gradient_chooses_for_itself(asked, monkeypatch):
    monkeypatch.delenv(_dispatch.ENV_BACKEND, raising=False)
    inputs = {name: x.requires_grad_() for name, x in nc_ssd_inputs(1, 4, 2, 3, 1, 2).items()}
    backward_in_a_thread(nc_ssd(**inputs))
    assert asked == ['auto', 'auto']
