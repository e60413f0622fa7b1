"""SS2D against its equations written out step by step, and against fixtures of the official code."""
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from visionssm.layers import SS2D, RoutedSSM, ss2d_options

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [Path(os.environ.get('VISIONSSM_GOLDEN', '')), ROOT.parent / 'shared' / 'golden', ROOT / 'tests' / 'golden']
FIXTURES = next((found for place in PLACES if (found := sorted(place.glob('ops/ss2d__*.safetensors')))), [])
# official parameter -> ours
NAMES = {'A_logs': 'ssm.A_log', 'Ds': 'ssm.D', 'x_proj_weight': 'ssm.x_proj', 'dt_projs_weight': 'ssm.dt_proj',
         'dt_projs_bias': 'ssm.dt_bias', 'conv2d.weight': 'conv.weight', 'conv2d.bias': 'conv.bias',
         'conv2d.1.weight': 'conv.1.weight', 'conv2d.1.bias': 'conv.1.bias'}
# step at which each direction visits pixel (h, w) of an H x W map
STEPS = {
    'cross': [lambda h, w, H, W: h * W + w, lambda h, w, H, W: w * H + h,
              lambda h, w, H, W: H * W - 1 - (h * W + w), lambda h, w, H, W: H * W - 1 - (w * H + h)],
    'unidirectional': [lambda h, w, H, W: h * W + w] * 4,
    'bidirectional': [lambda h, w, H, W: h * W + w] * 2 + [lambda h, w, H, W: H * W - 1 - (h * W + w)] * 2,
    'rot90': [lambda h, w, H, W: h * W + w, lambda h, w, H, W: (W - 1 - w) * H + h,
              lambda h, w, H, W: H * W - 1 - (h * W + w), lambda h, w, H, W: w * H + H - 1 - h],
}


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value of its own, so that nothing hides behind its initial one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def scan_by_hand(ssm, k: int, sequence: torch.Tensor) -> torch.Tensor:
    """The k-th parameter set along (B, L, D), one step after the other."""
    dim = sequence.shape[-1]
    A, D = -ssm.A_log.view(-1, dim, ssm.d_state)[k].exp(), ssm.D.view(-1, dim)[k]
    state, out = sequence.new_zeros(len(sequence), dim, ssm.d_state), []
    for u in sequence.unbind(1):
        dt, B, C = (u @ ssm.x_proj[k].T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
        step = F.softplus(dt @ ssm.dt_proj[k].T + ssm.dt_bias[k])
        state = torch.exp(step[..., None] * A) * state + (step * u)[..., None] * B[:, None]
        out.append((state * C[:, None]).sum(-1) + D * u)
    return torch.stack(out, dim=1)


def ssd_by_hand(ssm, k: int, sequence: torch.Tensor) -> torch.Tensor:
    """The k-th parameter set of Mamba-2's scan along (B, L, D): a matrix of state a head, a scalar decay."""
    heads, state = ssm.num_heads, sequence.new_zeros(len(sequence), ssm.num_heads, ssm.head_dim, ssm.d_state)
    out = []
    for u in sequence.unbind(1):
        dt, B, C = (u @ ssm.x_proj[k].T).split([heads, ssm.d_state, ssm.d_state], dim=-1)
        step, u = F.softplus(dt + ssm.dt_bias[k])[..., None], u.unflatten(-1, (heads, -1))
        decay = torch.exp(-step * ssm.A_log[k].exp()[:, None])
        state = decay[..., None] * state + (step * u)[..., None] * B[:, None, None]
        out.append(((state * C[:, None, None]).sum(-1) + ssm.D[k] * u).flatten(1))
    return torch.stack(out, dim=1)


def routes_by_hand(ssm, u: torch.Tensor, routes: str) -> torch.Tensor:
    """Four scans over a map (B, H, W, D), summed on the pixels."""
    batch, height, width, dim = u.shape
    rows = torch.arange(height)[:, None].expand(height, width).flatten()
    columns = torch.arange(width).repeat(height)
    out = 0.
    for k, step in enumerate(STEPS[routes]):
        at = step(rows, columns, height, width)
        sequence = torch.empty(batch, height * width, dim, dtype=u.dtype)
        sequence[:, at] = u.flatten(1, 2)
        out = out + (ssd_by_hand if hasattr(ssm, 'num_heads') else scan_by_hand)(ssm, k, sequence)[:, at]
    return out.view_as(u)


def cascade_by_hand(ssm, u: torch.Tensor) -> torch.Tensor:
    """Rows, then columns, from both ends; the reversed output is added without turning it back."""
    for first in (0, 2):
        u = F.layer_norm(u, u.shape[-1:])
        lines = u.flatten(0, 1)
        u = (scan_by_hand(ssm, first, lines) + scan_by_hand(ssm, first + 1, lines.flip(1))).view_as(u).transpose(1, 2)
    return u


def mix_by_hand(mixer: SS2D, x: torch.Tensor, act, options: dict) -> torch.Tensor:
    u = x @ mixer.in_proj.weight.T
    u = u if mixer.in_proj.bias is None else u + mixer.in_proj.bias
    gate = options.get('gate', 'none')
    u, z = u.chunk(2, dim=-1) if gate != 'none' else (u, None)
    inner, d_conv = u.shape[-1], options.get('d_conv', 3)
    if d_conv > 1:
        conv = mixer.conv[1] if options.get('ssm') == 'mamba2' else mixer.conv
        u = F.conv2d(u.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=d_conv // 2, groups=inner)
        u = u.permute(0, 2, 3, 1)
    u = act(u)
    routes = options.get('routes', 'cross')
    y = cascade_by_hand(mixer.ssm, u) if routes == 'cascade' else routes_by_hand(mixer.ssm, u, routes)
    norm = options.get('out_norm', 'layernorm')
    if norm.startswith('layernorm'):
        layer = mixer.out_norm[0] if norm == 'layernorm_dwconv' else mixer.out_norm
        y = F.layer_norm(y, [inner], layer.weight, layer.bias)
    if norm.endswith('dwconv'):
        weight = next(m.weight for m in mixer.out_norm if isinstance(m, torch.nn.Conv2d))
        y = F.conv2d(y.permute(0, 3, 1, 2), weight, padding=1, groups=inner).permute(0, 2, 3, 1)
    if norm == 'softmax':
        y = (y.exp() / y.exp().sum((1, 2), keepdim=True))
    if norm == 'sigmoid':
        y = 1 / (1 + (-y).exp())
    y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)) if options.get('out_act') else y
    y = y if gate == 'none' else y * (act(z) if gate == 'act' else z)
    y = y @ mixer.out_proj.weight.T
    return y if mixer.out_proj.bias is None else y + mixer.out_proj.bias


OPTIONS = [
    {},
    *({'gate': gate, 'out_act': True} for gate in ('act', 'linear')),
    *({'out_norm': norm} for norm in ('none', 'dwconv', 'layernorm_dwconv', 'softmax', 'sigmoid')),
    *({'routes': routes} for routes in ('unidirectional', 'bidirectional', 'rot90', 'cascade')),
    *({'init': init} for init in ('v1', 'v2')),
    {'d_conv': 1}, {'d_conv': 5, 'conv_bias': False}, {'bias': True}, {'expand': 1.5, 'dt_rank': 3},
    {'routes': 'cascade', 'gate': 'act', 'out_norm': 'layernorm_dwconv'},
    {'ssm': 'mamba2', 'dt_rank': 3}, {'ssm': 'mamba2', 'gate': 'act', 'init': 'v2', 'routes': 'rot90', 'd_conv': 1}]


@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'default')
def test_equals_its_equations(options: dict):
    mixer = shaken(SS2D(6, 3, **options).double())
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mix_by_hand(mixer, x, F.silu, options), rtol=0, atol=1e-12)


@pytest.mark.parametrize('routes', ['cross', 'cascade'])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (5, 1), (7, 3)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_any_map_and_its_gradients(size: tuple[int, int], routes: str):
    mixer = shaken(SS2D(4, 2, routes=routes, act='gelu', gate='act').double())
    x = torch.randn(2, *size, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, *size, 4, dtype=torch.float64)
    parameters = [x, *mixer.parameters()]
    grads = torch.autograd.grad((mixer(x) * weight).sum(), parameters)
    by_hand = mix_by_hand(mixer, x, F.gelu, {'routes': routes, 'gate': 'act'})
    for ours, theirs in zip(grads, torch.autograd.grad((by_hand * weight).sum(), parameters)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert mixer(x[:0]).shape == (0, *size, 4)


def read(path: Path) -> tuple[SS2D, dict, dict]:
    with safe_open(path, 'pt') as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    config = json.loads(meta['config'])
    options = ss2d_options(config['forward_type'])
    own = {'d_conv': config['d_conv'], 'conv_bias': config['conv_bias'], 'init': config['initialize'],
           'act': 'gelu' if options['ssm'] == 'mamba2' else 'silu'}
    mixer = SS2D(config['d_model'], config['d_state'], config['ssm_ratio'], config['dt_rank'], **{**own, **options})
    mixer.load_state_dict({
        NAMES.get(key[11:], key[11:]): value for key, value in tensors.items() if key.startswith('state_dict.')})
    return mixer, tensors, {**meta, 'channel_first': config['channel_first']}


def run(mixer: SS2D, x: torch.Tensor, meta: dict) -> torch.Tensor:
    return mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if meta['channel_first'] else mixer(x)


@pytest.mark.parametrize('path', FIXTURES, ids=lambda path: path.stem[6:])
def test_official_fixture(path: Path):
    mixer, tensors, meta = read(path)
    with torch.no_grad():
        out = run(mixer.double(), tensors['input'].double(), meta)
    torch.testing.assert_close(out, tensors['output64'], rtol=0, atol=1e-12)  # observed 2e-15
    x = tensors['input'].clone().requires_grad_()
    out = run(mixer.float(), x, meta)
    torch.testing.assert_close(out, tensors['output'], rtol=float(meta['rtol']), atol=float(meta['atol']))
    (out * tensors['loss_weight']).sum().backward()
    ours = {'input': x.grad, **{name: parameter.grad for name, parameter in mixer.named_parameters()}}
    expected = {key[5:]: value for key, value in tensors.items() if key.startswith('grad.')}
    assert len(expected) > 5
    for key, grad in expected.items():
        gap = (ours[NAMES.get(key, key)] - grad).abs().max() / grad.abs().max()
        assert gap <= float(meta['grad_rtol']), key


def test_sums_over_routes_do_not_leave_the_range_of_half_precision():
    """A checkpoint's skip weights can take the merged scan beyond 65504, where the norm still brings it back."""
    mixer = SS2D(8, 1)
    with torch.no_grad():
        mixer.ssm.D.fill_(6e4)
        x = torch.randn(1, 4, 4, 8)
        expected = mixer(x)
        with torch.autocast('cpu', torch.float16):
            torch.testing.assert_close(mixer(x).float(), expected, rtol=0, atol=0.02)
        torch.testing.assert_close(mixer.half()(x.half()).float(), expected, rtol=0, atol=0.02)


def test_low_precision_weights_of_the_mamba2_form():
    mixer = shaken(SS2D(8, 2, ssm='mamba2', dt_rank=4))
    x = torch.randn(1, 3, 5, 8)
    expected = mixer(x)
    for out in (torch.autocast('cpu', torch.bfloat16)(mixer)(x), mixer.half()(x.half())):
        assert (out.float() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('out_norm', ['layernorm', 'none', 'dwconv', 'layernorm_dwconv', 'softmax', 'sigmoid'])
def test_low_precision_weights_and_autocast(out_norm: str, dtype: torch.dtype):
    mixer = shaken(SS2D(8, 2, out_norm=out_norm, gate='act', routes='cascade'))
    x = torch.randn(1, 3, 5, 8)
    expected = mixer(x)
    with torch.autocast('cpu', dtype):
        cast = mixer(x)
    whole = mixer.to(dtype)(x.to(dtype))
    assert cast.dtype == whole.dtype == dtype
    for out in (cast, whole):
        assert (out.float() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize('options', [*OPTIONS[:12:3], OPTIONS[-2]], ids=str)
def test_scripted_mixer_equals_the_module(options: dict):
    mixer = shaken(SS2D(6, 3, **options))
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))


def test_initial_state_parameters_follow_the_style():
    v0, v1, v2 = (RoutedSSM(64, 4, 8, init=init) for init in ('v0', 'v1', 'v2'))
    torch.testing.assert_close(v0.A_log[3], torch.tensor([1., 2., 3., 4.]).log())
    steps = F.softplus(v0.dt_bias)
    assert steps.min() > 0.99e-3 and steps.max() < 0.101 and v0.dt_proj.abs().max() <= 8 ** -0.5
    assert abs(v1.A_log.std() - 1) < 0.2 and abs(v1.dt_bias.std() - 0.1) < 0.02 and v1.dt_proj.min() < 0
    assert (v2.A_log == 0).all() and 0 <= v2.dt_bias.min() and v2.dt_proj.max() <= 0.1
    assert all((ssm.D == 1).all() for ssm in (v0, v1, v2))
    with pytest.raises(ValueError, match="init is 'v3'"):
        RoutedSSM(4, init='v3')


@pytest.mark.parametrize(('options', 'message'), [
    ({'gate': 'z'}, "gate is 'z'"), ({'out_norm': 'rms'}, "out_norm is 'rms'"), ({'ssm': 's6'}, "ssm is 's6'"),
    ({'d_conv': 4}, 'd_conv is 4'), ({'ssm': 'mamba2', 'dt_rank': 3}, '8 inner channels cannot be dealt out to 3'),
    ({'ssm': 'mamba2', 'routes': 'cascade'}, 'has no form'), ({'routes': 'sideways'}, 'unknown name')])
def test_unknown_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SS2D(4, **options)


@pytest.mark.parametrize(('code', 'expected'), [
    ('v05_noz', {'gate': 'none', 'routes': 'cross', 'out_norm': 'layernorm', 'out_act': False, 'ssm': 'mamba1'}),
    ('v2', {'gate': 'act', 'routes': 'cross'}),
    ('v01_no32', {'gate': 'act', 'out_act': False}),
    ('v04_oncnorm_nozact_oact', {'gate': 'linear', 'out_norm': 'layernorm_dwconv', 'out_act': True}),
    ('v3_onnone_noz_oact_no32', {'gate': 'none', 'out_norm': 'none', 'out_act': True}),
    ('v02_ondwconv3', {'out_norm': 'dwconv', 'gate': 'act'}),
    ('v03_onsoftmax_noz', {'out_norm': 'softmax'}),
    ('v05_onsigmoid', {'out_norm': 'sigmoid'}),
    ('v051d_noz', {'routes': 'unidirectional'}),
    ('v052d_noz', {'routes': 'bidirectional'}),
    ('v052d3_noz', {'routes': 'rot90'}),
    ('v052dc_noz', {'routes': 'cascade'}),
    ('m0_noz', {'ssm': 'mamba2', 'gate': 'none'}),
    ('v0', {'gate': 'act', 'd_conv': 3, 'conv_bias': True, 'act': 'silu', 'init': 'v0'}),
    ('v0seq', {'gate': 'act', 'd_conv': 3})])
def test_official_codes(code: str, expected: dict):
    options = ss2d_options(code)
    assert {key: options[key] for key in expected} == expected
    assert ('d_conv' in options) == code.startswith('v0') * (code in ('v0', 'v0seq'))


@pytest.mark.parametrize(('code', 'message'), [
    ('v05_oact_noz', 'suffix in the wrong place or repeated _oact'),
    ('v05_noz_oncnorm', 'wrong place or repeated _noz'),
    ('v05_nose', 'unknown suffix _nose'),
    ('v9_noz', "base 'v9'"),
    ('v0_noz', 'takes no suffix'),
    ('xv1a', 'official code itself cannot run'),
    ('v05_oncnorm_onnone', 'more than one normalisation'),
    ('m0', "write 'm0_noz'")])
def test_unreadable_codes_are_explained(code: str, message: str):
    with pytest.raises(ValueError, match=message):
        ss2d_options(code)


def test_sizes_and_codes_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match='expand is 0; with 8 channels it leaves no inner channel'):
        SS2D(8, expand=0)
    with pytest.raises(ValueError, match='forward_type is None; it must be a string'):
        ss2d_options(None)
