"""The Triton scan against the reference: on an accelerator, or in Triton's interpreter if TRITON_INTERPRET=1 is set."""
import dataclasses
import itertools

import pytest
import torch

from visionssm_kernels import selective_scan, selective_scan_2d, set_strict, use_backend
from visionssm_kernels._dispatch import follows_map
from visionssm_kernels.selective_scan import reference

pytestmark = [pytest.mark.interp, pytest.mark.gpu]

RESULTS = ('out', 'last_state', 'checkpoints', 'du', 'ddelta', 'dA', 'dB', 'dC', 'dD', 'dz', 'ddelta_bias')
# Relative RMS of (results, gradients); half-precision inputs are compared with float32 on the rounded inputs
BOUNDS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 5e-4), torch.bfloat16: (5e-3, 1e-2),
          torch.float16: (2e-3, 5e-3)}


@pytest.fixture(autouse=True)
def _poisoned_and_strict():
    """Unwritten outputs read as NaN; a silent fall-back to another backend is an error."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_strict(True)
    yield
    set_strict(None)
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call of the primitive; groups of 0 stand for constants (K, D, N)."""
    B: int = 1
    K: int = 1
    D: int = 4
    L: int = 9
    N: int = 2
    groups: tuple[int, int] = (1, 1)
    index: bool = False
    reverse: bool = False
    merge: bool = False
    shared: bool = True
    extras: bool = True
    softplus: bool = True

    def __str__(self) -> str:
        sizes = f'B{self.B}-K{self.K}-D{self.D}-L{self.L}-N{self.N}-G{self.groups[0]}{self.groups[1]}'
        flags = [name for name in ('index', 'reverse', 'merge', 'shared', 'extras', 'softplus') if getattr(self, name)]
        return '-'.join([sizes, *flags])

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[list[torch.Tensor | None], tuple[bool, ...]]:
        """Random canonical tensors and the flags."""
        parameter = torch.float64 if dtype == torch.float64 else torch.float32

        def matrix(groups: int) -> torch.Tensor:
            size = (self.B, self.K, groups, self.N, self.L) if groups else (self.K, self.D, self.N)
            return torch.randn(size, dtype=dtype)

        delta = torch.rand(self.B, self.K, self.D, self.L, dtype=dtype)
        tensors = [
            torch.randn(self.B, 1 if self.shared else self.K, self.D, self.L, dtype=dtype),
            4 * delta - 2 if self.softplus else delta,
            -3 * torch.rand(self.K, self.D, self.N, dtype=parameter), matrix(self.groups[0]), matrix(self.groups[1])]
        tensors += [None] * 3 if not self.extras else [
            torch.randn(self.K, self.D, dtype=parameter), torch.randn(delta.shape, dtype=dtype),
            torch.randn(self.K, self.D, dtype=parameter)]
        tensors.append(torch.stack([torch.randperm(self.L) for _ in range(self.K)]).int() if self.index else None)
        return [None if x is None else x.to(device) for x in tensors], (self.softplus, self.reverse, self.merge)


CASES = [
    Case(B=2, D=3, L=17, N=3),
    Case(D=1, L=1, N=1),
    Case(D=17, L=3, N=1),
    Case(D=2, L=129, N=1, reverse=True),
    Case(D=6, L=7, N=1, groups=(2, 3)),
    Case(D=3, groups=(0, 0), L=65),
    Case(groups=(2, 0), reverse=True),
    Case(K=3, D=3, N=1, index=True, merge=True, groups=(0, 1)),
    Case(K=2, index=True, L=65, D=2, N=1),
    Case(K=2, index=True, merge=True, shared=False, groups=(2, 4)),
    Case(K=2, shared=False, extras=False, softplus=False),
    Case(D=1, L=2, N=17, extras=False),
]


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)).item()


def assert_close(name: str, got: torch.Tensor | None, want: torch.Tensor | None, bound: float, floor=1e-3) -> None:
    assert (got is None) == (want is None), name
    if want is not None:
        assert got.shape == want.shape, name
        gap = relative_rms(got, want)
        largest = (got.double() - want.double()).abs().max().item()
        message = f'{name}: relative RMS {gap:.2e} > {bound}, largest difference {largest:.2e}'
        assert gap <= bound or largest <= floor * bound, message


def run(backend, tensors, flags, dout, dlast_state):
    out, last_state, checkpoints = backend.forward(*tensors, *flags)
    grads = backend.backward(dout.to(out.dtype), dlast_state, *tensors, checkpoints, *flags)
    return out, last_state, checkpoints, *grads


def assert_layouts(tensors, results) -> None:
    """The op copies what is not laid out as the map that it belongs to; this backend leaves it nothing to copy."""
    assert follows_map(results[0], tensors[0])
    gradients = dict(zip(RESULTS[3:], results[3:], strict=True))
    for name, i in (('du', 0), ('ddelta', 1), ('dB', 3), ('dC', 4), ('dz', 6)):
        if tensors[i] is not None:
            assert gradients[name].stride() == torch.empty_like(tensors[i]).stride(), name


def compare(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Compares every result and gradient of one case with the reference."""
    from visionssm_kernels.selective_scan import triton_impl
    tensors, flags = case.inputs(dtype, device)
    maps = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(dtype, dtype)
    exact = [x if x is None or not x.is_floating_point() else x.to(maps) for x in tensors]
    dout = torch.randn(case.B, 1 if case.merge else case.K, case.D, case.L, device=device).to(dtype)
    dlast_state = torch.randn(case.B, case.K, case.D, case.N, dtype=tensors[2].dtype, device=device)
    got = run(triton_impl, tensors, flags, dout, dlast_state)
    want = run(reference, exact, flags, dout, dlast_state)
    for i, (name, g, w) in enumerate(zip(RESULTS, got, want, strict=True)):
        assert_close(name, g, w, BOUNDS[dtype][i > 2])
    assert got[0].dtype == dtype
    assert_layouts(tensors, got)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_results_and_gradients_equal_the_reference_in_float64(case, device):
    compare(case, torch.float64, device)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('case', [CASES[0], Case(K=2, D=2, L=5, N=1, merge=True, index=True)], ids=str)
def test_results_and_gradients_are_close_in_lower_precision(case, dtype, device):
    compare(case, dtype, device)


@pytest.mark.parametrize('case', [Case(K=2, merge=True, index=True), Case(D=3, groups=(0, 0))], ids=str)
def test_gradients_of_the_state_may_be_absent_and_maps_may_have_any_strides(case, device):
    from visionssm_kernels.selective_scan import triton_impl
    tensors, flags = case.inputs(torch.float64, device)
    strided = [x if x is None or x.ndim < 4 else x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors]
    dout = torch.randn((), dtype=torch.float64, device=device).expand(case.B, 1, case.D, case.L)
    got, want = run(triton_impl, strided, flags, dout, None), run(reference, tensors, flags, dout, None)
    for name, g, w in zip(RESULTS, got, want, strict=True):
        assert_close(name, g, w, 1e-10)
    assert_layouts(strided, got)


@pytest.mark.parametrize('case', [
    Case(B=2, D=18, L=65, N=1), Case(K=2, N=1, D=3, groups=(1, 3), index=True, merge=True),
    Case(K=2, N=1, index=True, shared=False)], ids=str)
def test_channels_may_be_innermost_in_views_of_a_projection(case, device):
    from visionssm_kernels.selective_scan import triton_impl
    tensors, flags = case.inputs(torch.float64, device)
    wide = [x if x is None or x.ndim < 4 else torch.cat([x, x], -2).transpose(-1, -2).contiguous().transpose(-1, -2)
            for x in tensors]
    views = [x if x is None or x.ndim < 4 else x.narrow(-2, 0, x.shape[-2] // 2) for x in wide]
    dout = torch.randn(case.B, 1 if case.merge else case.K, case.L, case.D, dtype=torch.float64, device=device).mT
    got, want = run(triton_impl, views, flags, dout, None), run(reference, tensors, flags, dout, None)
    for name, g, w in zip(RESULTS, got, want, strict=True):
        assert_close(name, g, w, 1e-10)
    assert_layouts(views, got)
    assert got[0].stride(2) == got[3].stride(2) == 1


def test_results_are_the_same_in_every_run(device):
    from visionssm_kernels.selective_scan import triton_impl
    tensors, flags = Case(K=2, D=9, L=5, N=1, merge=True, index=True).inputs(torch.float32, device)
    dout, dlast_state = torch.randn(1, 1, 9, 5, device=device), torch.randn(1, 2, 9, 1, device=device)
    for first, second in zip(*(run(triton_impl, tensors, flags, dout, dlast_state) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize('shift', [-14., 12., 40.], ids=['tiny-steps', 'steep-decay', 'beyond-softplus'])
def test_extreme_steps_keep_their_relative_precision(shift, device):
    from visionssm_kernels.selective_scan import triton_impl
    tensors, flags = Case(extras=False, N=1).inputs(torch.float64, device)
    tensors[1] = tensors[1] + shift
    tensors[2] = tensors[2] / 3 - 1
    dout = torch.randn(1, 1, 4, 9, dtype=torch.float64, device=device)
    single = [None if x is None else x.float() for x in tensors]
    exact = [None if x is None else x.double() for x in single]
    got, want = run(triton_impl, single, flags, dout, None), run(reference, exact, flags, dout, None)
    for i, (name, g, w) in enumerate(zip(RESULTS, got, want, strict=True)):
        assert_close(name, g, w, BOUNDS[torch.float32][i > 2], floor=0)


def through_op(backend, function, leaves, **options):
    """Runs a public op with one backend; returns its outputs and the gradients of every leaf."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    with use_backend(backend):
        outputs = function(**leaves, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip([*(f'out{i}' for i in range(len(outputs))), *leaves], [*outputs, *grads], strict=True))


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_selective_scan_runs_on_triton(reverse, device):
    leaves = {'u': (2, 3, 7), 'delta': (2, 3, 7), 'A': (3, 2), 'B': (2, 2, 7), 'C': (2, 2, 7), 'D': (3,),
              'z': (2, 3, 7), 'delta_bias': (3,)}
    leaves = {name: torch.randn(size, dtype=torch.float64, device=device) for name, size in leaves.items()}
    leaves['A'] = -leaves['A'].abs()
    options = {'delta_softplus': True, 'return_last_state': True, 'reverse': reverse}
    got, want = (through_op(name, selective_scan, leaves, **options) for name in ('triton', 'reference'))
    for name, value in want.items():
        assert_close(name, got[name], value, 1e-10)


@pytest.mark.parametrize(('routes', 'merge'), [
    *itertools.product(['cross'], ['sum', 'mean', 'none']), ('table', 'sum')])
def test_selective_scan_2d_runs_on_triton(routes, merge, device):
    routes = torch.stack([torch.randperm(6), torch.arange(6)]).to(device) if routes == 'table' else routes
    K = 4 if isinstance(routes, str) else 2
    leaves = {'u': (1, 4, 2, 3), 'delta': (1, K, 4, 2, 3), 'A': (K * 4, 2), 'B': (1, K, 2, 2, 2, 3),
              'C': (1, K, 2, 2, 3), 'D': (K * 4,), 'delta_bias': (K * 4,)}
    leaves = {name: torch.randn(size, dtype=torch.float64, device=device) for name, size in leaves.items()}
    leaves['A'] = -leaves['A'].abs()
    options = {'delta_softplus': True, 'routes': routes, 'merge': merge}
    got, want = (through_op(name, selective_scan_2d, leaves, **options) for name in ('triton', 'reference'))
    for name, value in want.items():
        assert_close(name, got[name], value, 1e-10)
