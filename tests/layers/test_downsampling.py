"""Stems and layers that halve channels-last maps."""
import pytest
import torch
import torch.nn.functional as F

from visionssm.layers import ConvDownsample, ConvStem, PatchMerging, merge_patches


@pytest.mark.parametrize('size', [(4, 6), (5, 7), (1, 2), (3, 1)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_merged_pixels_stand_in_the_order_of_swin(size: tuple[int, int]):
    x = torch.randn(2, *size, 3)
    padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    expected = torch.cat([padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)
    assert torch.equal(merge_patches(x), expected)
    if min(size) > 1:
        assert torch.equal(merge_patches(x, pad=False), expected[:, :size[0] // 2, :size[1] // 2])


def test_patch_merging_normalises_and_projects():
    layer = PatchMerging(3, 5).double()
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    expected = F.layer_norm(merge_patches(x), [12]) @ layer.reduction.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert PatchMerging(3)(x.float()).shape == (2, 2, 3, 6)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_cropped_maps_need_a_square():
    with pytest.raises(ValueError, match='1 x 6 pixels has no square'):
        PatchMerging(3, pad='crop')(torch.zeros(1, 1, 6, 3))
    with pytest.raises(ValueError, match="pad is 'wrap'"):
        PatchMerging(3, pad='wrap')


@pytest.mark.parametrize(('kernel_size', 'size'), [(2, (2, 3)), (3, (3, 4))])
def test_convolution_halves_odd_maps_down_or_up(kernel_size: int, size: tuple[int, int]):
    layer = ConvDownsample(3, 6, kernel_size).double()
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, 2, kernel_size - 2).permute(0, 2, 3, 1)
    assert layer(x).shape == (2, *size, 6)
    torch.testing.assert_close(layer(x), F.layer_norm(y, [6]), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize(('kernel_size', 'size'), [(2, (4, 7)), (3, (4, 4)), (3, (5, 7)), (3, (1, 2))])
def test_few_pixels_are_convolved_by_a_product_of_matrices(kernel_size: int, size: tuple[int, int]):
    layer = ConvDownsample(3, 64, kernel_size, torch.nn.Identity).double()
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    parameters = (x, layer.conv.weight, layer.conv.bias)
    expected = F.conv2d(x.permute(0, 3, 1, 2), *parameters[1:], stride=2, padding=kernel_size // 3)
    y = layer(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1))
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, parameters, dy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters, dy.permute(0, 3, 1, 2)))
    torch.testing.assert_close(torch.jit.script(layer)(x), y)


def test_a_map_of_one_row_is_refused_by_the_side_of_two():
    with pytest.raises(ValueError, match='1 x 4 pixels cannot be halved'):
        ConvDownsample(3, 6, 2)(torch.zeros(1, 1, 4, 3))
    assert ConvDownsample(3, 6, 3)(torch.zeros(1, 1, 4, 3)).shape == (1, 1, 2, 6)
    with pytest.raises(ValueError, match='kernel_size is 4'):
        ConvDownsample(3, 6, 4)


def test_stem_of_one_convolution():
    stem = ConvStem(3, 6, norm_layer=torch.nn.Identity)
    x = torch.randn(2, 3, 13, 17)
    expected = F.conv2d(x, stem.conv1.weight, stem.conv1.bias, 4).permute(0, 2, 3, 1)
    torch.testing.assert_close(stem(x), expected)
    with pytest.raises(ValueError, match='3 x 9 pixels is smaller'):
        stem(torch.zeros(1, 3, 3, 9))


@pytest.mark.parametrize(('patch_size', 'size'), [(2, (15, 19)), (4, (4, 5)), (8, (1, 1))])
def test_stem_of_two_overlapping_convolutions(patch_size: int, size: tuple[int, int]):
    stem = ConvStem(3, 6, patch_size, overlap=True).double()
    assert stem.conv1.kernel_size == (patch_size // 2 + 1,) * 2
    x = torch.randn(2, 3, 13, 17, dtype=torch.float64)
    stride = patch_size // 2
    y = F.conv2d(x, stem.conv1.weight, stem.conv1.bias, stride, 1).permute(0, 2, 3, 1)
    y = F.gelu(F.layer_norm(y, [3])).permute(0, 3, 1, 2)
    y = F.layer_norm(F.conv2d(y, stem.conv2.weight, stem.conv2.bias, stride, 1).permute(0, 2, 3, 1), [6])
    torch.testing.assert_close(stem(x), y, rtol=0, atol=1e-12)
    assert stem(x).shape == (2, *size, 6)


def test_smallest_image_of_two_overlapping_convolutions():
    assert ConvStem(3, 6, 4, overlap=True)(torch.zeros(1, 3, 1, 1)).shape == (1, 1, 1, 6)
    assert ConvStem(3, 6, 8, overlap=True)(torch.zeros(1, 3, 11, 11)).shape == (1, 1, 1, 6)
    with pytest.raises(ValueError, match='10 x 11 pixels is smaller'):
        ConvStem(3, 6, 8, overlap=True)(torch.zeros(1, 3, 10, 11))


def test_stem_refuses_an_odd_patch_of_two_convolutions():
    with pytest.raises(ValueError, match='patch_size is 3'):
        ConvStem(3, 6, 3, overlap=True)


def test_position_embedding_follows_the_map():
    stem = ConvStem(3, 6, norm_layer=torch.nn.Identity, pos_embed_size=(4, 4))
    plain = ConvStem(3, 6, norm_layer=torch.nn.Identity)
    plain.load_state_dict({key: value for key, value in stem.state_dict().items() if key != 'pos_embed'})
    assert 0.005 < stem.pos_embed.std() < 0.05
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(stem(x), plain(x) + stem.pos_embed.permute(0, 2, 3, 1))
    wide = torch.randn(1, 3, 16, 24)
    table = F.interpolate(stem.pos_embed, size=(4, 6), mode='bicubic', align_corners=False)
    torch.testing.assert_close(stem(wide), plain(wide) + table.permute(0, 2, 3, 1))
    torch.testing.assert_close(torch.jit.script(stem)(wide), stem(wide))
