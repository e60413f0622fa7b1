"""The bidirectional mixer against its equations written out step by step, and its options."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

from visionssm.layers import BiMamba

TYPES = ['v2', 'v1', 'none']


def scan_by_hand(c, dt, A, B, C, D) -> torch.Tensor:
    """s_t = exp(delta_t A) s_{t-1} + delta_t c_t B_t, y_t = <s_t, C_t> + D c_t for (B, L, ...) inputs."""
    state = torch.zeros(c.shape[0], c.shape[2], A.shape[1], dtype=c.dtype)
    out = []
    for t in range(c.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * c[:, t])[..., None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1) + D * c[:, t])
    return torch.stack(out, dim=1)


def features_by_hand(x, ssm) -> tuple[torch.Tensor, ...]:
    weight, width = ssm.conv.weight[:, 0], ssm.conv.weight.shape[-1]
    padded = torch.cat([torch.zeros_like(x[:, :1]).expand(-1, width - 1, -1), x], dim=1)
    c = F.silu(sum(weight[:, k] * padded[:, k:k + x.shape[1]] for k in range(width)) + ssm.conv.bias)
    dt, B, C = (c @ ssm.x_proj.weight.T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
    return c, F.softplus(dt @ ssm.dt_proj.weight.T + ssm.dt_bias), B, C


def mix_by_hand(mixer: BiMamba, u: torch.Tensor, kind: str, divide: bool) -> torch.Tensor:
    """The mixer with flipped copies of the sequence, token-major, one time step after the other."""
    x, z = (u @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    forward = features_by_hand(x, mixer.ssm)
    y = scan_by_hand(*forward[:2], -mixer.ssm.A_log.exp(), *forward[2:], mixer.ssm.D) * F.silu(z)
    if kind == 'v1':
        flipped = [part.flip(1) for part in forward]
        back = scan_by_hand(*flipped[:2], -mixer.ssm_b.A_log.exp(), *flipped[2:], mixer.ssm.D)
        y = y + (back * F.silu(z.flip(1))).flip(1)
    elif kind == 'v2':
        back = features_by_hand(x.flip(1), mixer.ssm_b)
        back = scan_by_hand(*back[:2], -mixer.ssm_b.A_log.exp(), *back[2:], mixer.ssm_b.D)
        y = y + (back * F.silu(z.flip(1))).flip(1)
        y = y / 2 if divide else y
    y = y @ mixer.out_proj.weight.T
    return y if mixer.gamma is None else y * mixer.gamma


def shaken(mixer: BiMamba) -> BiMamba:
    """Give every parameter a value of its own, so that nothing hides behind its initial one."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize('divide', [True, False], ids=['divided', 'summed'])
@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('length', [1, 3, 17])
def test_equals_its_equations(kind: str, divide: bool, length: int):
    mixer = shaken(BiMamba(12, d_state=5, dt_rank=3, bimamba_type=kind, divide_output=divide, dtype=torch.float64))
    x = torch.randn(2, length, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mix_by_hand(mixer, x, kind, divide), rtol=0, atol=1e-12)


def test_output_scale_multiplies_the_output():
    mixer = shaken(BiMamba(8, init_values=0.5, dtype=torch.float64))
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mix_by_hand(mixer, x, 'v2', True), rtol=0, atol=1e-12)


@pytest.mark.parametrize('kind', TYPES)
def test_gradients_equal_those_of_the_equations(kind: str):
    mixer = shaken(BiMamba(8, d_state=4, bimamba_type=kind, dtype=torch.float64))
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 9, 8, dtype=torch.float64)
    inputs = [x, *mixer.parameters()]
    actual = torch.autograd.grad((mixer(x) * weight).sum(), inputs)
    expected = torch.autograd.grad((mix_by_hand(mixer, x, kind, True) * weight).sum(), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_sees_both_sides_of_a_token():
    mixer = BiMamba(8)
    x = torch.randn(1, 7, 8, requires_grad=True)
    mixer(x)[0, 3].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


def test_forward_only_sees_the_past():
    mixer = BiMamba(8, bimamba_type='none')
    x = torch.randn(1, 7, 8, requires_grad=True)
    mixer(x)[0, 3].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [True] * 4 + [False] * 3


def test_rank_of_the_step_follows_the_width():
    assert BiMamba(40).ssm.dt_rank == math.ceil(40 / 16)


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'v3'.*'v2', 'v1' and 'none'"):
        BiMamba(8, bimamba_type='v3')


@pytest.mark.parametrize('kind', TYPES)
def test_scripted_mixer_equals_the_eager_one(kind: str):
    mixer = BiMamba(8, bimamba_type=kind).eval()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))


@pytest.mark.parametrize('kind', TYPES)
def test_compiles_without_graph_breaks(kind: str):
    mixer = BiMamba(8, bimamba_type=kind)
    x = torch.randn(2, 5, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), mixer(x))


def test_layers_in_place_of_the_projections_are_called():
    """Adapters and quantised layers replace modules; the fast path reads weights, so it must stand back then."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    mixer = shaken(BiMamba(8, dtype=torch.float64))
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    plain = mixer.ssm_b.dt_proj
    mixer.ssm_b.dt_proj = Doubled(plain.in_features, plain.out_features, bias=False, dtype=torch.float64)
    with torch.no_grad():
        mixer.ssm_b.dt_proj.weight.copy_(plain.weight / 2)
    torch.testing.assert_close(mixer(x), mix_by_hand_with(mixer, plain, x), rtol=0, atol=1e-12)
    assert not torch.equal(mixer.ssm_b.dt_proj.weight, plain.weight)


@pytest.mark.parametrize('part', ['ssm', 'ssm_b', 'ssm.x_proj', 'ssm_b.dt_proj'])
def test_hooks_are_called(part: str):
    mixer, seen = BiMamba(8), []
    x = torch.randn(1, 4, 8)
    expected = mixer(x)
    for name in ('register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook'):
        handle = getattr(mixer.get_submodule(part), name)(lambda *_, name=name: seen.append(name))
        out = mixer(x)
        out.sum().backward()
        torch.testing.assert_close(out, expected)
        handle.remove()
    assert seen == ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook']


def test_pruned_projections_follow_their_weights():
    mixer = BiMamba(8, dtype=torch.float64)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    prune.random_unstructured(mixer.ssm_b.x_proj, 'weight', amount=0.5)
    with torch.no_grad():
        mixer.ssm_b.x_proj.weight_orig.mul_(3)
    out = mixer(x)
    prune.remove(mixer.ssm_b.x_proj, 'weight')
    torch.testing.assert_close(out, mix_by_hand(mixer, x, 'v2', True), rtol=0, atol=1e-12)


def mix_by_hand_with(mixer: BiMamba, dt_proj: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    replaced, mixer.ssm_b.dt_proj = mixer.ssm_b.dt_proj, dt_proj
    try:
        return mix_by_hand(mixer, x, 'v2', True)
    finally:
        mixer.ssm_b.dt_proj = replaced
