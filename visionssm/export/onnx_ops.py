"""The two loops of `loops`, and what the exporter lacks, in ONNX's own operators, as functions of onnxscript."""
# onnxscript reads annotations as types of ONNX
# mypy: disallow-untyped-defs=False
import torch
from onnxscript import FLOAT, INT64, graph, script
from onnxscript import opset18 as op

from .loops import DIAGONAL_LOOP, TIME_LOOP

__all__ = ['TRANSLATIONS']


@script(default_opset=op)
def time_loop(A: FLOAT, step: FLOAT, drive: FLOAT, B: FLOAT, C: FLOAT) -> tuple[FLOAT, FLOAT]:
    """One step after the other; see `loops._time_loop`."""

    @graph()
    def body(state, step_l, drive_l, B_l, C_l):  # noqa: ANN001, ANN202
        new = op.Exp(step_l * A) * state + drive_l * B_l
        y = op.ReduceSum(new * C_l, op.Constant(value_ints=[-2]), keepdims=1)
        again = op.Identity(new)
        return again, y

    zero = op.Constant(value_int=0)
    first = op.Gather(step, zero, axis=0) * A * op.Gather(B, zero, axis=0)
    start = first * op.Constant(value_float=0.0)
    last, y = op.Scan(start, step, drive, B, C, body=body, num_scan_inputs=4)
    return last, y


@script(default_opset=op)
def diagonal_loop(A_top: FLOAT, A_left: FLOAT, step_top: FLOAT, step_left: FLOAT, weight_top: FLOAT,
                  weight_left: FLOAT, u: FLOAT, B_top: FLOAT, B_left: FLOAT, C: FLOAT) -> FLOAT:
    """One diagonal after the other; see `loops._diagonal_loop`."""

    @graph()
    def body(state, step_t, step_l, weight_t, weight_l, x, B_t, B_l, C_t):  # noqa: ANN001, ANN202
        short = op.Slice(state, op.Constant(value_ints=[0]), op.Constant(value_ints=[-1]), op.Constant(value_ints=[-1]))
        above = op.Pad(short, op.Constant(value_ints=[0, 0, 0, 1, 0, 0, 0, 0]))
        new = (weight_t * (op.Exp(step_t * A_top) * above + step_t * x * B_t)
               + weight_l * (op.Exp(step_l * A_left) * state + step_l * x * B_l))
        y = op.ReduceSum(new * C_t, op.Constant(value_ints=[1]), keepdims=1)
        again = op.Identity(new)
        return again, y

    start = op.Gather(step_top, op.Constant(value_int=0), axis=0) * A_top * op.Constant(value_float=0.0)
    _, y = op.Scan(start, step_top, step_left, weight_top, weight_left, u, B_top, B_left, C, body=body,
                   num_scan_inputs=8)
    return y


def stable_sort(self: INT64, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[INT64, INT64]:
    """`torch.sort(stable=True)`: ONNX demands of TopK that the first of equal values comes first."""
    return op.TopK(self, op.Gather(op.Shape(self), op.Constant(value_ints=[dim])), axis=dim, largest=int(descending))


TRANSLATIONS = {TIME_LOOP: time_loop, DIAGONAL_LOOP: diagonal_loop, torch.ops.aten.sort.stable: stable_sort}
