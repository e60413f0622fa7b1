"""Stem, downsampling, position encoding and block of VSSD and Spatial-Mamba: their equations, sizes and gradients."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionssm.layers import ConvPosBlock, ConvPosEnc, InvertedDownsample, ResidualStem

SIZES = pytest.mark.parametrize('size', [(1, 1), (33, 47), (32, 64)], ids=lambda s: f'{s[0]}x{s[1]}')


def lively(module: nn.Module) -> nn.Module:
    """Random parameters and statistics in float64, for evaluation."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
            tensor.data.mul_(torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -1, 1)
                             if tensor.requires_grad else 1)
    return module


def normed(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, **options) -> torch.Tensor:
    x = F.conv2d(x, conv.weight, conv.bias, **options)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


@SIZES
def test_the_stem_adds_its_second_convolutions_without_activation(size: tuple[int, int]):
    stem = lively(ResidualStem(3, 8))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    x = F.relu(normed(image, stem.conv1.conv, stem.conv1.bn, stride=2, padding=1))
    y = F.relu(normed(x, stem.conv2[0].conv, stem.conv2[0].bn, padding=1))
    x = x + normed(y, stem.conv2[1].conv, stem.conv2[1].bn, padding=1)
    x = F.relu(normed(x, stem.conv3[0].conv, stem.conv3[0].bn, stride=2, padding=1))
    x = normed(x, stem.conv3[1].conv, stem.conv3[1].bn)
    assert x.shape[1:] == (8, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(stem(image), x.permute(0, 2, 3, 1), rtol=1e-10, atol=1e-10)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match='Expected images with 3 channels, got 1'):
        ResidualStem(3, 8)(torch.zeros(1, 1, 8, 8))


@SIZES
def test_the_downsampling_normalises_once(size: tuple[int, int]):
    down = lively(InvertedDownsample(4))
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    y = F.relu(F.conv2d(x.permute(0, 3, 1, 2), down.expand.weight, down.expand.bias))
    y = F.relu(F.conv2d(y, down.conv.weight, down.conv.bias, stride=2, padding=1, groups=32))
    y = normed(y, down.reduce.conv, down.reduce.bn)
    assert y.shape[1:] == (8, -(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(down(x), y.permute(0, 2, 3, 1), rtol=1e-10, atol=1e-10)


def test_the_block_encodes_positions_in_front_of_both_branches():
    block = lively(ConvPosBlock(4, nn.Linear(4, 4), nn.Linear(4, 4)))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)

    def encoded(x: torch.Tensor, layer: ConvPosEnc) -> torch.Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, padding=1, groups=4)
        return x + y.permute(0, 2, 3, 1)

    y = encoded(x, block.cpe1)
    y = y + block.mixer(F.layer_norm(y, [4], block.norm1.weight, block.norm1.bias, 1e-5))
    y = encoded(y, block.cpe2)
    y = y + block.mlp(F.layer_norm(y, [4], block.norm2.weight, block.norm2.bias, 1e-5))
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('contiguous', [True, False], ids=['rows of maps', 'rows of pixels'])
def test_gradients_are_derivatives_whatever_their_layout(batch: int, contiguous: bool):
    """PyTorch's batch norm gets them wrong for single maps of some strides: ours do not have these."""
    layers = nn.Sequential(lively(ConvPosEnc(4)), lively(InvertedDownsample(4)))

    def run(x: torch.Tensor) -> torch.Tensor:
        y = layers(x).permute(0, 3, 1, 2)
        return y.contiguous() if contiguous else y

    assert torch.autograd.gradcheck(run, [torch.randn(batch, 3, 4, 4, dtype=torch.float64, requires_grad=True)])
