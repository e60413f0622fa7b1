"""Features of regions under mixed precision."""
import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import visionssm.openmmlab.detection  # noqa: E402, F401
from visionssm.registry import MODELS  # noqa: E402

STRIDES = [4, 8, 16, 32]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_regions_keep_their_coordinates_in_half_precision(dtype):
    config = dict(roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0), out_channels=4,
                  featmap_strides=STRIDES)
    ours = MODELS.build(dict(type='visionssm.SingleRoIExtractor', **config))
    theirs = MODELS.build(dict(type='mmdet.SingleRoIExtractor', **config))
    smooth = torch.randn(1, 4, 24, 40)
    maps = [F.interpolate(smooth, size=(768 // stride, 1280 // stride), mode='bicubic') for stride in STRIDES]
    corner = torch.rand(50, 2) * torch.tensor([1100., 600.])
    regions = torch.cat([torch.zeros(50, 1), corner, corner + 16 + torch.rand(50, 2) * 100], dim=1)
    expected = theirs(maps, regions)
    torch.testing.assert_close(ours(maps, regions), expected, rtol=0, atol=0)

    def error(extractor):
        output = extractor([features.to(dtype) for features in maps], regions).float()
        return (output - expected).norm() / expected.norm()

    assert error(ours) < 5e-3 < error(theirs)


def test_gradients_reach_maps_in_half_precision():
    extractor = MODELS.build(dict(
        type='visionssm.SingleRoIExtractor', out_channels=4, featmap_strides=[4, 8],
        roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0)))
    maps = [torch.randn(1, 4, 16 // scale, 16 // scale, dtype=torch.bfloat16, requires_grad=True) for scale in (1, 2)]
    with torch.autocast('cpu', torch.bfloat16):
        output = extractor(maps, torch.tensor([[0., 4, 4, 40, 50]]))
        empty = extractor(maps, torch.zeros(0, 5))
    assert output.dtype == torch.float32 and empty.shape == (0, 4, 3, 3)
    grad, = torch.autograd.grad(output.sum(), maps[0])
    assert grad.dtype == torch.bfloat16 and grad.any()
