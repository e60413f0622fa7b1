"""The discriminator: size, shapes, a bounded slope, precision, and pictures that are refused."""
import copy

import pytest
import torch

from visionssm.restoration.discriminator import UNetDiscriminator


def test_the_full_network_has_the_published_number_of_parameters():
    assert sum(param.numel() for param in UNetDiscriminator(device='meta').parameters()) == 4_376_897


@pytest.mark.parametrize('skip', [True, False])
def test_every_pixel_is_judged_and_every_weight_learns(skip):
    torch.manual_seed(0)
    net = UNetDiscriminator(in_chans=1, num_feat=4, skip=skip)
    logits = net(torch.rand(2, 1, 16, 24))
    assert logits.shape == (2, 1, 16, 24)
    logits.square().sum().backward()
    assert all(param.grad.abs().sum() > 0 for param in net.parameters())


def test_what_went_down_reaches_the_end_only_with_skip():
    torch.manual_seed(0)
    net = UNetDiscriminator(num_feat=4).eval()
    one, two = torch.rand(2, 1, 3, 16, 16)
    # what comes up from below is the same for both pictures
    net.up[-1].register_forward_hook(lambda module, args, output: torch.ones_like(output))
    assert not torch.equal(net(one), net(two))
    net.skip = False
    assert torch.equal(net(one), net(two))


def test_the_largest_singular_values_are_one():
    torch.manual_seed(0)
    net = UNetDiscriminator(num_feat=4)
    for _ in range(30):
        net(torch.rand(1, 3, 8, 8))
    net.eval()
    for conv in (*net.down, *net.up, *net.refine):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1., abs=0.02)


def test_it_computes_in_float32_under_autocast_and_can_be_copied():
    torch.manual_seed(0)
    net = UNetDiscriminator(num_feat=4)
    x = torch.rand(1, 3, 8, 8)
    twin = copy.deepcopy(net)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = net(x)
    assert logits.dtype == torch.float32 and torch.equal(logits, twin(x))


def test_gradients_are_right_in_float64():
    torch.manual_seed(0)
    net = UNetDiscriminator(num_feat=2, dtype=torch.float64).eval()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match='12 x 16; the sides must be multiples of 8'):
        UNetDiscriminator(num_feat=2)(torch.rand(1, 3, 12, 16))
    with pytest.raises(ValueError, match='num_feat 0'):
        UNetDiscriminator(num_feat=0)
