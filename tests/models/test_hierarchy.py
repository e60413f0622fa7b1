"""The base of hierarchical backbones, on a toy: layers, taps, pruning, the list of maps, refused arguments."""
import pytest
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from visionssm.models._hierarchy import DenseBackbone, Hierarchy, Stage, stage_drop_path_rates

DIMS = (4, 6, 8, 10)


class Conv(nn.Conv2d):
    """A convolution on channels-last maps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class Toy(Hierarchy):
    def __init__(self, num_classes: int = 5, depths: tuple[int, ...] = (1, 2, 1, 1), stage_norm: bool = False) -> None:
        stages = [
            Stage(nn.Identity() if i == 0 else Conv(DIMS[i - 1], dim, 2, 2),
                  [nn.Sequential(nn.Linear(dim, dim), nn.GELU()) for _ in range(depth)],
                  nn.LayerNorm(dim) if stage_norm else None)
            for i, (dim, depth) in enumerate(zip(DIMS, depths))]
        stage_drop_path_rates(0., depths)
        super().__init__(Stem(3, DIMS[0], 4, 4), stages, DIMS, 3, num_classes, norm=nn.LayerNorm(DIMS[-1]))
        self.init_weights(needs_reset=False)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 32)


def test_taps_are_what_the_stages_put_out(image):
    model = Toy().eval()
    final, maps = model.forward_intermediates(image)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 16, 8), (2, 6, 8, 4), (2, 8, 4, 2), (2, 10, 2, 1)]
    torch.testing.assert_close(final, model.forward_features(image))
    torch.testing.assert_close(model.forward_head(final), model(image))
    last, = model.forward_intermediates(image, [3], norm=True, output_fmt='NHWC', intermediates_only=True)
    torch.testing.assert_close(last, final)


def test_stopping_early_leaves_out_the_rest(image):
    model = Toy().eval()
    x, maps = model.forward_intermediates(image, [0, 1], stop_early=True)
    torch.testing.assert_close(x.permute(0, 3, 1, 2), maps[-1])


def test_other_formats_are_refused(image):
    with pytest.raises(ValueError, match="output_fmt is 'NLC'; allowed are 'NCHW' and 'NHWC'"):
        Toy().forward_intermediates(image, output_fmt='NLC')


def test_pruned_model_keeps_its_taps_and_takes_a_new_classifier(image):
    model = Toy().eval()
    expected = model.forward_intermediates(image, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2 and model.num_features == 6 and isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model.forward_intermediates(image, [1], intermediates_only=True)[0], expected)
    model.reset_classifier(7, 'avg')
    assert model(image).shape == (2, 7)
    assert model.forward_head(model.forward_features(image), pre_logits=True).shape == (2, model.head_hidden_size)


def test_a_classifier_that_was_taken_off_comes_back_in_the_type_of_the_model():
    model = Toy().double()
    model.reset_classifier(0)
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float64


def test_layers_are_grouped_from_stem_to_head():
    model = Toy(stage_norm=True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = ['stem.weight', 'stages.0.blocks.0.0.weight', 'stages.0.norm.weight', 'stages.1.downsample.weight',
             'stages.1.blocks.1.0.weight', 'stages.3.blocks.0.0.weight', 'norm.weight']
    assert [groups[name] for name in order] == sorted(groups[name] for name in order)
    assert groups['stem.weight'] < groups['stages.0.blocks.0.0.weight'] < groups['stages.1.blocks.1.0.weight']
    assert groups['stages.1.blocks.0.0.weight'] < groups['stages.1.blocks.1.0.weight']
    assert groups['stages.1.norm.weight'] == groups['stages.1.blocks.1.0.weight']
    assert max(groups.values()) == 1 + 5, 'the stem, five blocks and the head, but a closing norm is no layer'
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse['stages.1.norm.weight'] == coarse['stages.1.blocks.0.0.bias'] == coarse['stem.weight'] + 2


def test_linear_layers_are_drawn_narrow_and_without_bias():
    class Wide(Toy):
        linear_std = None

    assert Toy().stages[0].blocks[0][0].weight.std() < 0.05 and not Toy().head.fc.bias.any()
    assert Wide().stages[0].blocks[0][0].weight.std() > 0.1 and Wide().head.fc.bias.any()


def test_drop_path_rates_rise_over_all_blocks():
    rates = stage_drop_path_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 2, 1]
    assert sum(rates, []) == pytest.approx([0., 0.1, 0.2, 0.3])


@pytest.mark.parametrize('norm_layer', [None, nn.LayerNorm], ids=['plain', 'normed'])
def test_dense_backbone_returns_its_taps(image, norm_layer):
    backbone = Toy().eval()
    expected = backbone.forward_intermediates(image, [1, 3], intermediates_only=True)
    dense = DenseBackbone(backbone, (-1, 1), norm_layer).eval()
    assert dense.out_indices == [1, 3] and [info['num_chs'] for info in dense.feature_info] == [6, 10]
    for actual, tap, info in zip(dense(image), expected, dense.feature_info, strict=True):
        if norm_layer is not None:
            tap = nn.functional.layer_norm(tap.permute(0, 2, 3, 1), [info['num_chs']]).permute(0, 3, 1, 2)
        torch.testing.assert_close(actual, tap)
    names = {name.split('.')[0] for name, _ in dense.named_parameters()}
    assert names == ({'backbone', 'out_norms'} if norm_layer else {'backbone'})
    assert not any(name.startswith(('backbone.head', 'backbone.norm')) for name, _ in dense.named_parameters())


@pytest.mark.parametrize('out_indices', [(4,), (0, -5), ()])
def test_dense_backbone_refuses_stages_that_are_not_there(out_indices):
    with pytest.raises(ValueError, match='choose among the stages 0 to 3'):
        DenseBackbone(Toy(), out_indices)


@pytest.mark.parametrize(('options', 'message'), [
    ({'num_classes': -1}, 'num_classes is -1; at least 0'), ({'depths': (1, 0, 1, 1)}, 'at least one block')])
def test_impossible_sizes_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Toy(**options)


@pytest.mark.parametrize('rate', [-0.1, 1.0, 2.0])
def test_impossible_drop_path_rates_are_refused(rate: float):
    with pytest.raises(ValueError, match=f'drop_path_rate is {rate}; it must be at least 0 and below 1'):
        stage_drop_path_rates(rate, (1, 1))
