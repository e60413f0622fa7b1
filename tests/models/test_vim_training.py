"""Initial values, and that training is stable under low precision."""
import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

OPTIONS = {'embed_dim': 32, 'depth': 3, 'num_classes': 5}


@pytest.mark.parametrize('options', [
    {}, {'class_token': 'double', 'init_values': 0.5, 'norm_layer': 'layernorm'}, {'bimamba_type': 'v1'}],
    ids=['released', 'options', 'shared-directions'])
def test_weights_can_be_drawn_after_to_empty(options: dict):
    model = timm.create_model('vim_pico', **OPTIONS, **options, device='meta', dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    model = model.to_empty(device='cpu').eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float('nan'))
    model.init_weights()
    assert [n for n, p in model.named_parameters() if not p.isfinite().all()] == []
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize('redraw', [False, True], ids=['built', 'redrawn'])
def test_initial_values_follow_the_official_code(redraw: bool):
    torch.manual_seed(0)
    model = timm.create_model('vim_pico', embed_dim=192, depth=4)
    if redraw:
        model.init_weights()
    mixer = model.blocks[1].mixer
    steps = F.softplus(mixer.ssm_b.dt_bias)
    assert steps.min() > 0.9e-3 and steps.max() < 0.11
    torch.testing.assert_close(mixer.ssm.A_log.exp(), torch.arange(1., 9.).expand(384, 8), rtol=1e-5, atol=0)
    assert (mixer.ssm.D == 1).all() and (model.norm.weight == 1).all()
    # kaiming_uniform(a = sqrt 5) is uniform within fan_in ** -0.5; divided by sqrt(depth).
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(384 ** -0.5 / 2, rel=1e-2)
    for parameter in (model.head.weight, model.pos_embed, model.cls_token):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    fan_in = math.prod(model.patch_embed.proj.weight.shape[1:])
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(fan_in ** -0.5, rel=0.05)
    assert not model.patch_embed.proj.bias.any() and not model.head.bias.any()


def test_bfloat16_autocast_gives_finite_gradients():
    model = timm.create_model('vim_pico', **OPTIONS)
    with torch.autocast('cpu', torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_residual_stream_stays_in_float32_under_autocast():
    model = timm.create_model('vim_pico', **OPTIONS)
    seen = []
    model.blocks[2].register_forward_hook(lambda module, args, out: seen.append(out[1].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(torch.randn(1, 3, 32, 32))
    assert seen == [torch.float32]


def test_copy_trains_on_its_own():
    model = timm.create_model('vim_pico', **OPTIONS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].mixer.ssm.D.zero_()
    assert model.blocks[0].mixer.ssm.D.any()
