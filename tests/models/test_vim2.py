"""ViM2 against the paper's equations, a plain reading of its channel mixer, and VMamba, to which it reduces."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import visionssm
from visionssm.models import ViM2, VMamba
from visionssm.models.vim2 import ChannelMixer, WeightedAverage
from visionssm_kernels import use_backend
from visionssm_kernels.selective_scan import selective_scan

TINY = {'depths': (1, 2, 1, 1), 'dims': 8, 'd_state': 4, 'num_classes': 5}


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope='module')
def published(repo_root: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(repo_root / 'tests' / 'golden' / 'vim2' / 'weighted_average.safetensors')
    return {key: value.double() for key, value in tensors.items()}


def average_of(token: torch.Tensor, channel: torch.Tensor) -> WeightedAverage:
    average = WeightedAverage(len(token), len(channel), dtype=torch.float64)
    with torch.no_grad():
        average.token.copy_(token)
        average.channel.copy_(channel)
    return average


@pytest.mark.parametrize('layer', [1, 2, 3])
@pytest.mark.parametrize('kind', ['token', 'channel'])
def test_the_weighted_average_is_that_of_the_equations(published, layer: int, kind: str):
    names = {'token': ('alpha', 'beta'), 'channel': ('theta', 'gamma')}[kind]
    average = average_of(*(published[f'{name}.{layer}'] for name in names))
    token = [published[f'y_token.{i}'] for i in range(len(average.token))]
    channel = [published[f'y_channel.{i}'] for i in range(len(average.channel))]
    # observed 2e-7: the file holds float32
    torch.testing.assert_close(average(token, channel), published[f'x_{kind}.{layer}'], atol=1e-6, rtol=1e-6)


def test_gradients_of_the_weighted_average_are_those_of_finite_differences():
    average = randomise(WeightedAverage(3, 2, dtype=torch.float64))
    features = [torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(5)]

    def run(weights: tuple[torch.Tensor, torch.Tensor], *features: torch.Tensor) -> torch.Tensor:
        names = dict(zip(('token', 'channel'), weights))
        return torch.func.functional_call(average, names, (list(features[:3]), list(features[3:])))

    assert torch.autograd.gradcheck(
        lambda token, channel, *xs: run((token, channel), *xs), (average.token, average.channel, *features))


def test_the_weights_of_a_stage_are_as_many_as_the_paper_counts():
    model = ViM2(**{**TINY, 'depths': (1, 1, 5, 1)}, token_mixers=1)
    weights = [p for name, p in model.stages[2].named_parameters() if '.average.' in name]
    assert sum(p.numel() for p in weights) == 5 * (2 * 5 + 3)


@pytest.mark.parametrize('token_mixers', [1, 2])
def test_a_stage_sums_what_the_equations_say(token_mixers: int):
    stage = randomise(ViM2(**TINY, token_mixers=token_mixers)).double().eval().stages[1]
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    actual = stage(x)
    x = stage.downsample(x)
    token, channel, blocks = [x], [x], iter(stage.blocks)
    for _ in range(2):
        for kind, features in [('token', token)] * token_mixers + [('channel', channel)]:
            block = next(blocks)
            assert block.is_channel == (kind == 'channel')
            mixed = torch.einsum('i,ibhwc->bhwc', block.average.token, torch.stack(token))
            mixed = mixed + torch.einsum('i,ibhwc->bhwc', block.average.channel, torch.stack(channel))
            features.append(mixed + block.mixer(block.norm(mixed)))
    torch.testing.assert_close(actual, channel[-1], atol=1e-12, rtol=1e-12)


def test_without_channel_mixers_it_is_a_chain_of_vmamba_blocks():
    options = {'dims': 8, 'd_state': 4, 'num_classes': 5}
    vmamba = randomise(VMamba(
        depths=(2, 2, 4, 2), expand=2., gate='act', conv_bias=True, mlp_ratio=0., stem='v1', downsample='v1',
        **options)).double().eval()
    model = ViM2(depths=(1, 1, 2, 1), channel_mixer='none', **options).double().eval()
    weights = {name.replace('.norm1.', '.norm.') if 'stages' in name else name: value
               for name, value in vmamba.state_dict().items()}
    # what stays at its initial value is what the paper sets: alpha_{l,l-1} = 1, all others and beta 0
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all('.average.' in name for name in missing)
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), vmamba(x), atol=1e-12, rtol=1e-12)


def plain_channel_mixer(mixer: ChannelMixer, x: torch.Tensor) -> torch.Tensor:
    """One pixel after the other, each a sequence of single features with B and C of every step."""
    out = torch.empty_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
        a, gate = mixer.in_proj(x[tuple(place)]).chunk(2)
        a = F.silu(mixer.conv(a[None]))
        y = torch.zeros_like(a)
        for ssm in (mixer.ssm, mixer.ssm_b):
            u = a.flip(-1) if ssm is mixer.ssm_b else a
            dt, B, C = F.linear(u[..., None], ssm.x_proj)[0].split([1, ssm.d_state, ssm.d_state], dim=-1)
            with use_backend('reference'):
                step = selective_scan(
                    u[None], dt.T[None], -torch.exp(ssm.A_log), B.T[None], C.T[None], ssm.D,
                    delta_bias=ssm.dt_bias, delta_softplus=True)[0]
            y = y + (step.flip(-1) if ssm is mixer.ssm_b else step)
        out[tuple(place)] = mixer.out_proj(y[0] * F.silu(gate))
    return out


@pytest.mark.parametrize('width', [1, 7, 20])
def test_the_channel_mixer_is_a_scan_over_the_channels_of_each_pixel(width: int):
    mixer = randomise(ChannelMixer(6, width, d_state=3)).double()
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    wanted, actual = plain_channel_mixer(mixer, x), mixer(x)
    torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-10)
    probe, leaves = torch.randn_like(wanted), [x, *mixer.parameters()]
    for grad, expected in zip(*(torch.autograd.grad(y, leaves, probe) for y in (actual, wanted))):
        torch.testing.assert_close(grad, expected, atol=1e-10, rtol=1e-10)


def test_pixels_do_not_meet_in_the_channel_mixer():
    mixer = randomise(ChannelMixer(6, 9, d_state=3)).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[:, 1:2, 2:4], mixer(x[:, 1:2, 2:4]))


def test_large_features_stay_finite_in_half_precision():
    mixer = ChannelMixer(4, 8).half()
    with torch.no_grad():
        mixer.in_proj.weight[:8] = 100.  # features of 400, whose squares are beyond float16
        mixer.in_proj.weight[8:] = 0.01
        mixer.conv.weight.fill_(1.)
        mixer.ssm.x_proj.fill_(-1e-3)
        mixer.ssm_b.x_proj.fill_(-1e-3)
        out = mixer(torch.ones(1, 2, 2, 4, dtype=torch.float16))
    assert out.dtype == torch.float16 and out.isfinite().all()


@pytest.mark.parametrize('options', [
    {}, {'channel_mixer': 'mlp', 'weighted_average': False}, {'channel_mixer': 'none'}, {'inner_residual': False},
    {'token_mixers': 1}, {'widths': (3, 4, 5, 6)}], ids=str)
def test_every_option_runs_at_every_size_with_the_same_weights(options: dict):
    model = ViM2(**TINY, **options).eval()
    for size in ((32, 32), (64, 36), (21, 50)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 5)
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_weights_start_as_the_plain_chain():
    plain = ViM2(**TINY, weighted_average=False).eval()
    model = ViM2(**TINY).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x))
    average = ViM2(**TINY, inner_residual=False).stages[1].blocks[3].average
    assert average.token.tolist() == [1., 0., 0.] and average.channel.tolist() == [0., 1.]


@pytest.mark.parametrize(('name', 'depths', 'dims', 'widths', 'parameters', 'claimed'), [
    ('vim2_tiny', (1, 1, 3, 1), (96, 192, 384, 768), (192, 384, 768, 768), 24_011_413, 20),
    ('vim2_small', (1, 1, 9, 1), (96, 192, 384, 768), (192, 384, 768, 768), 43_674_736, 43),
    ('vim2_base', (1, 1, 9, 1), (128, 256, 512, 1024), (256, 512, 1024, 1024), 75_582_736, 74),
])
def test_the_variants_are_those_of_the_table(name, depths, dims, widths, parameters, claimed):
    model = visionssm.create_model(name, device='meta')
    channel_mixers = [[b.mixer for b in stage.blocks if b.is_channel] for stage in model.stages]
    assert tuple(map(len, channel_mixers)) == depths
    assert [len(stage.blocks) for stage in model.stages] == [3 * depth for depth in depths]
    assert tuple(mixers[0].out_proj.in_features for mixers in channel_mixers) == widths
    assert tuple(mixers[0].out_proj.out_features for mixers in channel_mixers) == model.dims == dims
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert 0 <= parameters / 1e6 - claimed < (4.1 if name == 'vim2_tiny' else 1.6)


def test_sums_and_states_are_not_decayed():
    model = ViM2(**TINY)
    fixed = model.no_weight_decay()
    assert {'stages.1.blocks.0.average.token', 'stages.1.blocks.2.mixer.ssm_b.A_log'} <= fixed
    assert not any(name.endswith(('weight', 'x_proj')) for name in fixed)


@pytest.mark.parametrize(('options', 'message'), [
    ({'channel_mixer': 'conv'}, "channel_mixer is 'conv'; allowed are 'bidirectional', 'mlp', 'none'"),
    ({'token_mixers': 0}, 'token_mixers is 0'),
    ({'inner_residual': False, 'weighted_average': False}, 'nothing leads around a mixer'),
    ({'widths': (8, 8)}, 'give as many of each'),
])
def test_refused_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ViM2(**TINY, **options)
