"""Feature pyramids on one map, and the patch embedding below them."""
import pytest
import torch

from visionssm.layers import PatchEmbed, PlainPyramid, SimpleFeaturePyramid


def sizes(maps) -> list[tuple[int, ...]]:
    return [tuple(m.shape[1:]) for m in maps]


def test_simple_pyramid_gives_five_strides():
    maps = SimpleFeaturePyramid(16, out_chans=6).eval()(torch.randn(2, 16, 4, 6))
    assert sizes(maps) == [(6, 16, 24), (6, 8, 12), (6, 4, 6), (6, 2, 3), (6, 1, 2)]


def test_simple_pyramid_without_the_extra_level():
    assert len(SimpleFeaturePyramid(16, extra_level=False)(torch.randn(1, 16, 4, 4))) == 4


@pytest.mark.parametrize(('patch_size', 'sides'), [(16, [16, 8, 4, 2]), (8, [8, 4, 2, 1])])
def test_plain_pyramid_rescales_four_maps(patch_size: int, sides: list[int]):
    maps = PlainPyramid(8, patch_size)([torch.randn(2, 8, 4, 4) for _ in range(4)])
    assert sizes(maps) == [(8, side, side) for side in sides]


def test_one_map_serves_all_levels():
    assert sizes(PlainPyramid(8)([torch.randn(2, 8, 4, 4)])) == [(8, s, s) for s in (16, 8, 4, 2)]


def test_plain_pyramid_refuses_other_patch_sizes():
    with pytest.raises(ValueError, match='8 and 16, not 14'):
        PlainPyramid(8, 14)


@pytest.mark.parametrize(('img_size', 'patch', 'stride', 'grid'), [
    (224, 16, 16, (14, 14)), (224, 16, 8, (27, 27)), ((48, 80), 16, 8, (5, 9)), ((30, 33), 8, 8, (3, 4))])
def test_grid_of_patches(img_size, patch: int, stride: int, grid: tuple[int, int]):
    embed = PatchEmbed(img_size, patch, stride, 3, 4)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert embed.grid_size == grid
    assert tuple(embed(torch.randn(1, 3, height, width)).shape) == (1, 4, *grid)


def test_image_size_below_a_patch_is_refused_when_building():
    with pytest.raises(ValueError, match=r'img_size \(12, 40\) is smaller than a patch'):
        PatchEmbed((12, 40), 16, 16, 3, 4)


@pytest.mark.parametrize(('shape', 'message'), [
    ((1, 1, 32, 32), 'with 3 channels, got 1'),
    ((1, 3, 8, 40), '8 x 40 pixels is smaller than a patch'),
    ((3, 32, 32), 'got 3 dimensions')])
def test_unusable_images_are_refused(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        PatchEmbed(32, 16, 16, 3, 4)(torch.randn(shape))
