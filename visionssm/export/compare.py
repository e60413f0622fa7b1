"""Whether an exported graph gives what the model gives, and how long both take."""
import copy
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from .archive import need
from .inputs import Inputs

__all__ = ['Comparison', 'compare_onnx', 'count_nodes', 'own_rounding']


class Comparison(NamedTuple):
    """Largest difference relative to the largest value, and medians of the time of one run, in milliseconds."""

    error: float
    onnx_ms: float
    torch_ms: float


def _flat(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _flat(part)]


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))


def own_rounding(model: nn.Module, inputs: Inputs) -> float:
    """Return how far a model is from itself in float64: no file can be expected to be much closer to it.

    Args:
        model: The model.
        inputs: What it gets.

    Returns:
        Largest difference in any output, relative to the largest value of that output.
    """
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs.tensors]
        return max(_difference(wanted, given) for wanted, given in
                   zip(_flat(exact(*doubles)), _flat(model(*inputs.tensors)), strict=True))


def _alternate(runs: int, *calls: Callable[[], object]) -> list[float]:
    """Medians of calls made in turn, so that a busy moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[place].append(1000 * (time.perf_counter() - start))
    return [median(row) for row in times]


def compare_onnx(model: nn.Module, path: str | os.PathLike, inputs: Inputs, runs: int = 5) -> Comparison:
    """Run a file in ONNX Runtime beside the model.

    Args:
        model: What was exported.
        path: The file.
        inputs: What both get.
        runs: Timed runs of each, in turn; 0 compares only.

    Returns:
        The comparison.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: The two give different numbers or shapes of outputs.
    """
    need('onnxruntime')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
    feed = {name: tensor.numpy() for name, tensor in zip(inputs.names, inputs.tensors, strict=True)}
    # an input that the model does not use is none of the graph's
    feed = {entry.name: feed[entry.name] for entry in session.get_inputs()}

    def run_model() -> object:
        with torch.inference_mode():
            return model(*inputs.tensors)

    expected, found = _flat(run_model()), session.run(None, feed)
    if [tuple(tensor.shape) for tensor in expected] != [array.shape for array in found]:
        raise ValueError(f'{path} gives outputs of the shapes {[array.shape for array in found]} and the model '
                         f'{[tuple(tensor.shape) for tensor in expected]}')
    errors = [_difference(tensor, torch.from_numpy(array)) for tensor, array in zip(expected, found, strict=True)]
    times = _alternate(runs, lambda: session.run(None, feed), run_model) if runs else [float('nan')] * 2
    return Comparison(max(errors), *times)


def count_nodes(path: str | os.PathLike) -> int:
    """Return the number of nodes of an ONNX file's graph, those inside of loops counted once."""
    need('onnx')
    import onnx

    def count(graph: onnx.GraphProto) -> int:
        return sum(1 + sum(count(attribute.g) for attribute in node.attribute if attribute.HasField('g'))
                   for node in graph.node)

    return count(onnx.load(os.fspath(path), load_external_data=False).graph)
