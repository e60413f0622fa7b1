"""Times a scan against its plain definition: paired runs in alternation, refused where results differ.

    python tools/benchmark_kernels.py --op selective_scan --threads 2 --json kernels.json --markdown kernels.md

The plain definition is what most packages fall back to on a CPU: exp(delta A) and delta B u as whole tensors with all
states, a Python loop over positions (over anti-diagonals of a map), and the backward pass of autograd.
"""
import argparse
import dataclasses
import functools
import json
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

try:
    from visionssm.analysis.timing import alternate, describe_machine
    from visionssm_kernels import nc_ssd, selective_scan, ssd, use_backend, wavefront_scan_2d
    from visionssm_kernels._dispatch import BACKENDS
    from visionssm_kernels._native import native_why_not
    from visionssm_kernels._testing import nc_ssd_inputs, relative_rms, scan_inputs, ssd_inputs, wavefront_inputs
except ImportError as error:
    sys.exit(f'{error}: install the checkout first, with `pip install -e .`')

_logger = logging.getLogger('visionssm')
BOUNDS = {'forward': 1e-4, 'forward+backward': 5e-4}
Inputs = dict[str, torch.Tensor]


def plain_definition(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias: torch.Tensor,
) -> torch.Tensor:
    """The definition with whole (B, D, L, N) tensors and a loop over L."""
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum('bdl,dn->bdln', delta, A))
    drive = torch.einsum('bdl,bnl,bdl->bdln', delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)
    ys = []
    for l in range(u.shape[-1]):
        state = decay[:, :, l] * state + drive[:, :, l]
        ys.append(torch.einsum('bdn,bn->bd', state, C[:, :, l]))
    return torch.stack(ys, dim=2) + u * D[:, None]


def plain_wavefront(
        u: torch.Tensor,
        delta_top: torch.Tensor,
        delta_left: torch.Tensor,
        A_top: torch.Tensor,
        A_left: torch.Tensor,
        B_top: torch.Tensor,
        B_left: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias_top: torch.Tensor,
        delta_bias_left: torch.Tensor,
) -> torch.Tensor:
    """The two-axis scan with whole (B, D, N, H, W) tensors and a loop over anti-diagonals."""
    height, width = u.shape[2:]
    weight = torch.full((height, width), 0.5).to(u)
    weight[:, 0] = 0
    weight[0] = 1
    decays, drive = [], torch.zeros_like(u[:, :, None])
    for delta, bias, A, B, share in ((delta_left, delta_bias_left, A_left, B_left, weight),
                                     (delta_top, delta_bias_top, A_top, B_top, 1 - weight)):
        delta = torch.nn.functional.softplus(delta + bias[:, None, None])[:, :, None]
        decays.append(share * torch.exp(delta * A[:, :, None, None]))
        drive = drive + share * delta * B[:, None] * u[:, :, None]
    state = u.new_zeros(*drive.shape[:3], height)
    ys, order = [], []
    for k in range(height + width - 1):
        i = torch.arange(max(0, k - width + 1), min(k, height - 1) + 1, device=u.device)
        at = (..., i, k - i)
        above = torch.nn.functional.pad(state, (1, 0))[..., i]
        new = decays[0][at] * state[..., i] + decays[1][at] * above + drive[at]
        state = state.index_copy(-1, i, new)
        ys.append((new * C[:, None][at]).sum(2))
        order.append(i * width + k - i)
    y = torch.cat(ys, -1)[..., torch.cat(order).argsort()]
    return y.unflatten(-1, (height, width)) + u * D[:, None, None]


def plain_nc_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
) -> torch.Tensor:
    """The non-causal SSD by einsum, with B and C repeated for every head."""
    B, C = (matrix.repeat(1, 1, x.shape[2] // matrix.shape[2], 1) for matrix in (B, C))
    total = torch.einsum('blm,blmn,blmp->bmnp', -dt * A, B, x)
    return torch.einsum('blmn,bmnp->blmp', C, total) + D[:, None] * x


def plain_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        dt_bias: torch.Tensor,
        initial_states: torch.Tensor,
) -> torch.Tensor:
    """The scan of Mamba-2, one position after the other, with B and C repeated for every head."""
    B, C = (matrix.repeat_interleave(x.shape[2] // matrix.shape[2], 2) for matrix in (B, C))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    state, ys = initial_states, []
    for decay, drive, B_l, C_l in zip(*(t.unbind(1) for t in (torch.exp(dt * A), dt[..., None] * x, B, C))):
        state = decay[..., None, None] * state + drive[..., None] * B_l[:, :, None]
        ys.append((state @ C_l[..., None])[..., 0])
    return torch.stack(ys, 1) + D * x


@dataclasses.dataclass(frozen=True)
class Op:
    """An op to time: itself, its plain definition, its random inputs, and the sizes that models use."""
    ours: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    inputs: Callable[..., dict]
    axes: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, bool] = dataclasses.field(default_factory=lambda: {'delta_softplus': True})
    native: bool = True


OPS = {
    'selective_scan': Op(selective_scan, plain_definition, scan_inputs, '(B, D, L, N)', (
        (1, 384, 197, 16), (1, 768, 1024, 16), (4, 384, 197, 16), (2, 96, 3136, 1))),
    'wavefront_scan_2d': Op(wavefront_scan_2d, plain_wavefront, wavefront_inputs, '(B, D, H, W, N)', (
        (1, 64, 56, 56, 16), (1, 128, 28, 28, 16), (4, 32, 56, 56, 16))),
    'nc_ssd': Op(nc_ssd, plain_nc_ssd, nc_ssd_inputs, '(B, L, M, P, G, N)', (
        (1, 3136, 2, 64, 1, 64), (1, 784, 4, 64, 1, 64), (4, 196, 8, 64, 1, 64), (1, 784, 4, 64, 4, 64)), {}, False),
    'ssd': Op(ssd, plain_ssd, ssd_inputs, '(B, L, M, P, G, N)', (
        (1, 197, 12, 64, 1, 64), (1, 1024, 24, 64, 1, 64), (4, 197, 12, 32, 1, 16), (1, 3136, 8, 24, 1, 1)),
        {'dt_softplus': True}, False),
}


def contestant(op: Op, name: str) -> Callable[..., torch.Tensor]:
    """Returns the function of a contestant: 'plain', or a backend of ours."""
    def ours(**inputs: torch.Tensor) -> torch.Tensor:
        with use_backend(name):
            return op.ours(**inputs, **op.options)

    return op.plain if name == 'plain' else ours


def forward(function: Callable[..., torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
    """Runs the forward pass alone."""
    with torch.no_grad():
        return [function(**inputs)]


def forward_backward(function: Callable[..., torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
    """Runs both passes and returns the output and every gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


PASSES = {'forward': forward, 'forward+backward': forward_backward}


def make_inputs(op: Op, shape: tuple[int, ...], device: torch.device) -> Inputs:
    """Makes the inputs of one case, with the decay rates -1, ..., -N that models with rates of states start from."""
    inputs = op.inputs(*shape, device=device)
    inputs.pop('z', None)
    rates = -torch.arange(1, shape[-1] + 1, dtype=torch.float32, device=device).expand(shape[1], -1).contiguous()
    return {name: rates.clone() if name[0] == 'A' and x.ndim == 2 else x for name, x in inputs.items()}


def measure(
        op: Op,
        shape: tuple[int, ...],
        stage: str,
        names: list[str],
        rounds: int,
        device: torch.device,
) -> list[dict]:
    """Times all contestants on one case.

    Every round runs each contestant, ours several times, one after the other (`visionssm.analysis.timing`); the run
    that is compared with the reference is the warm-up.
    """
    inputs = make_inputs(op, shape, device)
    runs = {name: functools.partial(PASSES[stage], contestant(op, name), inputs) for name in names}
    reference = PASSES[stage](contestant(op, 'reference'), {name: x.double() for name, x in inputs.items()})
    errors, repeats = {}, {}
    for name, run in runs.items():
        errors[name] = max(relative_rms(a, b) for a, b in zip(run(), reference))
        if errors[name] <= BOUNDS[stage]:
            repeats[name] = 1 if name == 'plain' else 5
        else:
            _logger.error('%s %s %s: relative RMS %.2g: not timed', name, stage, shape, errors[name])
    times = alternate({name: runs[name] for name in repeats}, device, rounds, warmup=0, repeats=repeats)
    rows = []
    for name, timing in times.items():
        plain = times.get('plain')
        rows.append({'shape': shape, 'pass': stage, 'backend': name, 'ms': timing.median,
                     'ratio': plain.speed_of(timing)[0] if plain else None, 'least ms': timing.least,
                     'least ratio': plain.least / timing.least if plain else None, 'error': errors[name],
                     'samples': list(timing.rounds)})
        _logger.info('%s %s %s: %.2f ms', shape, stage, name, rows[-1]['ms'])
    return rows


def markdown(rows: list[dict], about: dict, axes: str) -> str:
    """Returns the table."""
    lines = [', '.join(f'{key} {value}' for key, value in about.items()), '',
             f'| {axes} | pass | backend | median ms | least ms | ratio (medians) | ratio (least) | rel. RMS |',
             '|---|---|---|---:|---:|---:|---:|---:|']
    for row in rows:
        ratios = ' | '.join('-' if row[key] is None else f'{row[key]:.1f}' for key in ('ratio', 'least ratio'))
        lines.append(f'| {tuple(row["shape"])} | {row["pass"]} | {row["backend"]} | {row["ms"]:.2f} | '
                     f'{row["least ms"]:.2f} | {ratios} | {row["error"]:.1e} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Parses the arguments, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backends', nargs='+', default=None, choices=[*BACKENDS, 'plain'],
                        help='contestants; default: plain, reference, chunked, and native where it is built')
    parser.add_argument('--op', default='selective_scan', choices=list(OPS))
    parser.add_argument('--shape', nargs='+', type=int, action='append', metavar='N',
                        help='sizes in the order of the table: B D L N, B D H W N, or B L M P G N; may repeat')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--passes', nargs='+', default=list(PASSES), choices=list(PASSES))
    parser.add_argument('--json', help='file for the rows with all samples')
    parser.add_argument('--markdown', help='file for the table')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    op = OPS[args.op]
    native = op.native and not native_why_not('cpu')
    names = args.backends or ['plain', 'reference', 'chunked', *(['native'] if native else [])]
    for shape in args.shape or op.shapes:
        if len(shape) != len(op.shapes[0]):
            parser.error(f'--shape of {args.op} takes {op.axes}, got {shape}')
        for stage in args.passes:
            rows += measure(op, tuple(shape), stage, names, args.rounds, args.device)
    about = {'op': args.op, **describe_machine(args.device),
             'peak memory MB': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    table = markdown(rows, about, op.axes)
    print(table)
    for path, text in ((args.json, json.dumps({'environment': about, 'rows': rows}, indent=1)), (args.markdown, table)):
        if path:
            Path(path).write_text(text)


if __name__ == '__main__':
    main()
