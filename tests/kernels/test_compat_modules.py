"""The modules that the stand-ins offer beside functions: the Mamba block and the fused normalisations."""
import pytest
import torch
from torch.nn import functional as F

from visionssm_kernels.compat.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from visionssm_kernels.compat.mamba_simple import Mamba


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain_mamba(block: Mamba, x: torch.Tensor) -> torch.Tensor:
    """The block, written out with torch functions and a loop over the sequence; (B, L, C)."""
    signal, gate = block.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    signal = F.silu(block.conv1d(signal)[..., :x.shape[1]])
    delta, B, C = block.x_proj(signal.transpose(1, 2)).split([block.dt_rank, block.d_state, block.d_state], dim=-1)
    delta = F.softplus(block.dt_proj(delta))
    state, outputs = torch.zeros_like(block.A_log).expand(x.shape[0], -1, -1), []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * -block.A_log.exp())
        state = decay * state + (delta[:, t] * signal[..., t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1) + block.D * signal[..., t])
    return block.out_proj((torch.stack(outputs, dim=-1) * F.silu(gate)).transpose(1, 2))


def test_mamba_block_agrees_with_the_written_out_block(x):
    torch.manual_seed(0)
    block = Mamba(8, d_state=3, d_conv=3).double()
    torch.testing.assert_close(block(x), plain_mamba(block, x), atol=1e-10, rtol=0)


def test_mamba_block_gradients_agree_with_the_written_out_block(x):
    torch.manual_seed(0)
    block = Mamba(8, d_state=3, bias=True).double()
    weight = torch.randn(2, 5, 8, dtype=torch.float64)
    gradients = torch.autograd.grad((block(x) * weight).sum(), block.parameters())
    expected = torch.autograd.grad((plain_mamba(block, x) * weight).sum(), block.parameters())
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0)


def test_mamba_block_has_the_published_keys():
    keys = {name: tuple(value.shape) for name, value in Mamba(32).state_dict().items()}
    assert keys == {
        'A_log': (64, 16), 'D': (64,), 'in_proj.weight': (128, 32), 'conv1d.weight': (64, 1, 4), 'conv1d.bias': (64,),
        'x_proj.weight': (34, 64), 'dt_proj.weight': (64, 2), 'dt_proj.bias': (64,), 'out_proj.weight': (32, 64)}


def test_mamba_block_starts_with_step_sizes_in_range():
    steps = F.softplus(Mamba(64, dt_min=0.01, dt_max=0.05).dt_proj.bias)
    assert steps.min() >= 0.01 - 1e-6 and steps.max() <= 0.05 + 1e-6


def test_mamba_block_refuses_step_by_step_decoding():
    with pytest.raises(NotImplementedError, match='inference_params'):
        Mamba(8)(torch.randn(1, 2, 8), inference_params=object())


def test_mamba_block_refuses_an_unknown_initialisation():
    with pytest.raises(ValueError, match="'zeros'.*'random' or 'constant'"):
        Mamba(8, dt_init='zeros')


@pytest.mark.parametrize('bias', [False, True], ids=['plain', 'bias'])
def test_rms_norm_is_the_root_mean_square(x, bias):
    weight, shift = torch.rand(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) if bias else None
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (shift if bias else 0)
    torch.testing.assert_close(rms_norm_fn(x, weight, shift, eps=1e-5), expected)


def test_layer_norm_is_torchs(x):
    weight, bias = torch.rand(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    torch.testing.assert_close(layer_norm_fn(x, weight, bias, eps=1e-6), F.layer_norm(x, (8,), weight, bias, 1e-6))


def test_residual_is_added_before_the_norm_and_returned(x):
    weight = torch.rand(8, dtype=torch.float64)
    out, residual = rms_norm_fn(x, weight, residual=2 * x, prenorm=True)
    torch.testing.assert_close(residual, 3 * x)
    torch.testing.assert_close(out, rms_norm_fn(3 * x, weight))


def test_residual_is_kept_in_float32_on_request(x):
    out, residual = RMSNorm(8, dtype=torch.bfloat16)(x.bfloat16(), prenorm=True, residual_in_fp32=True)
    assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


def test_norm_drops_out_only_while_training(x):
    torch.manual_seed(0)
    norm = RMSNorm(8, dropout_p=0.5).double()
    dropped = norm(x)
    torch.testing.assert_close(norm.eval()(x), rms_norm_fn(x, norm.weight, eps=1e-5))
    assert (dropped == 0).any()


def test_mamba_block_refuses_an_unknown_rank():
    with pytest.raises(ValueError, match="dt_rank is 'full', expected 'auto'"):
        Mamba(8, dt_rank='full')
