"""The mixer of Mamba-2 against its equations written out step by step, its options, and Vim made of it."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor

from visionssm.layers import BiMamba2
from visionssm.models import Vim
from visionssm_kernels import export_decompositions

TYPES = ['v2', 'none']
VIM = {'mixer': 'mamba2', 'headdim': 16, 'embed_dim': 32, 'depth': 2, 'num_classes': 5}


def direction_by_hand(ssm, xBC, dt) -> torch.Tensor:
    """One direction over (B, L, ...) inputs, one time step after the other."""
    weight, width = ssm.conv.weight[:, 0], ssm.conv.weight.shape[-1]
    padded = torch.cat([torch.zeros_like(xBC[:, :1]).expand(-1, width - 1, -1), xBC], dim=1)
    xBC = F.silu(sum(weight[:, k] * padded[:, k:k + xBC.shape[1]] for k in range(width)) + ssm.conv.bias)
    heads, channels, groups, states = ssm.num_heads, ssm.headdim, ssm.ngroups, ssm.d_state
    x, B, C = xBC.split([heads * channels, groups * states, groups * states], dim=-1)
    x = x.unflatten(-1, (heads, channels))
    B, C = (t.unflatten(-1, (groups, states)).repeat_interleave(heads // groups, 2) for t in (B, C))
    step = F.softplus(dt + ssm.dt_bias)
    state, out = torch.zeros(len(x), heads, channels, states, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(-step[:, t] * ssm.A_log.exp())[..., None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((state * C[:, t, :, None]).sum(-1) + ssm.D[:, None] * x[:, t])
    return torch.stack(out, dim=1).flatten(2)


def mix_by_hand(mixer: BiMamba2, u: torch.Tensor, divide: bool) -> torch.Tensor:
    """The mixer with flipped copies of the sequence."""
    z, xBC, dt = (u @ mixer.in_proj.weight.T).split(mixer.sizes, dim=-1)
    y = direction_by_hand(mixer.ssm, xBC, dt)
    if mixer.ssm_b is not None:
        y = y + direction_by_hand(mixer.ssm_b, xBC.flip(1), dt.flip(1)).flip(1)
        y = y / 2 if divide else y
    y = y * F.silu(z)
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    y = y @ mixer.out_proj.weight.T
    return y if mixer.gamma is None else y * mixer.gamma


def build(kind: str = 'v2', **options) -> BiMamba2:
    """A mixer in float64 with a value of its own for every parameter, so that nothing hides behind its initial one."""
    options = {'d_state': 5, 'headdim': 4, 'ngroups': 2, 'dtype': torch.float64, **options}
    mixer = BiMamba2(8, bimamba_type=kind, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize('options', [{}, {'divide_output': False, 'ngroups': 1}, {'init_values': 0.5, 'd_conv': 3}],
                         ids=['default', 'summed', 'scaled'])
@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('length', [1, 3, 70])
def test_output_and_gradients_equal_the_equations(kind, options, length):
    mixer = build(kind, **options)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    actual, expected = mixer(x), mix_by_hand(mixer, x, options.get('divide_output', True))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    weight, inputs = torch.randn_like(actual), [x, *mixer.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), inputs) for y in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_forward_only_sees_the_past_and_both_directions_see_all():
    for kind, seen in (('none', [True] * 4 + [False] * 3), ('v2', [True] * 7)):
        x = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
        build(kind)(x)[0, 3].sum().backward()
        assert (x.grad[0].abs().sum(-1) > 0).tolist() == seen


def test_initial_values_are_those_of_mamba2():
    mixer = BiMamba2(256, headdim=2)
    for ssm in (mixer.ssm, mixer.ssm_b):
        rates, steps = ssm.A_log.exp(), F.softplus(ssm.dt_bias)
        assert rates.min() > 0.99 and rates.max() < 16.01 and 7.5 < rates.mean() < 9.5
        assert steps.min() > 0.9e-3 and steps.max() < 0.11
        assert (ssm.D == 1).all() and (mixer.norm.weight == 1).all()
    assert not torch.equal(mixer.ssm.A_log, mixer.ssm_b.A_log)


@pytest.mark.parametrize(('options', 'message'), [
    ({'bimamba_type': 'v1'}, "'v1'.*'v2' and 'none'"), ({'headdim': 5}, 'headdim is 5.*must divide the 16'),
    ({'headdim': 4, 'ngroups': 3}, 'ngroups 3')], ids=['v1', 'headdim', 'ngroups'])
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BiMamba2(8, **options)


@pytest.mark.parametrize('kind', TYPES)
def test_scripts_traces_compiles(kind):
    mixer, x = build(kind).eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = mixer(x)
    torch.testing.assert_close(torch.jit.script(mixer)(x), expected)
    torch.testing.assert_close(create_feature_extractor(mixer, ['out_proj'])(x)['out_proj'], expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend='aot_eager')(x), expected)


@pytest.fixture
def vim() -> Vim:
    torch.manual_seed(0)
    return timm.create_model('vim_pico', **VIM)


def test_vim_of_mamba2_scripts_traces_and_exports(vim):
    vim, x = vim.eval(), torch.randn(2, 3, 32, 32)
    expected = vim(x)
    torch.testing.assert_close(torch.jit.script(vim)(x), expected)
    torch.testing.assert_close(create_feature_extractor(vim, ['head'])(x)['head'], expected)
    program = torch.export.export(vim, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    other = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(other), vim(other))
    program = program.run_decompositions(export_decompositions())
    assert 'visionssm' not in program.graph_module.code
    torch.testing.assert_close(program.module()(other), vim(other), atol=1e-5, rtol=1e-5)


def test_vim_of_mamba2_trains(vim):
    x, target = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(vim.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(vim(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vim.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_vim_of_mamba2_is_finite_and_close_under_autocast(vim):
    x = torch.randn(4, 3, 32, 32)
    expected = vim.eval()(x)
    with torch.autocast('cpu', torch.bfloat16):
        actual = vim.train()(x)
        loss = F.cross_entropy(actual, torch.arange(4))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in vim.parameters())
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)


def test_vim_of_mamba2_obeys_the_contract(vim):
    undecayed = vim.no_weight_decay()
    for side in ('ssm', 'ssm_b'):
        assert {f'blocks.1.mixer.{side}.{name}' for name in ('A_log', 'D', 'dt_bias')} <= undecayed
    with torch.no_grad():
        for tensor in vim.parameters():
            tensor.fill_(float('nan'))
    vim.init_weights()
    assert all(p.isfinite().all() for p in vim.parameters())
    assert vim.blocks[0].mixer.out_proj.weight.abs().max().item() == pytest.approx(64 ** -0.5 / 2 ** 0.5, rel=0.02)
    other = timm.create_model('vim_pico', **VIM)
    other.load_state_dict(copy.deepcopy(vim.state_dict()))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other.eval()(x), vim.eval()(x))
    with pytest.raises(ValueError, match="mixer is 'mamba3'"):
        timm.create_model('vim_pico', mixer='mamba3')
