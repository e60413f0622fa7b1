"""What a Vim computes and offers, over its constructor options."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from visionssm.layers import apply_rotary, class_token_index
from visionssm.models import Vim
from visionssm.models.vim import rotary_rows


def forward_by_hand(model: Vim, x: torch.Tensor) -> torch.Tensor:
    """All normalised tokens of a model without class tokens at the ends, as an ordinary pre-norm residual network."""
    x = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=model.patch_embed.stride)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    if model.class_token == 'middle':
        x = torch.cat([x[:, :middle], model.cls_token.expand(len(x), -1, -1), x[:, middle:]], dim=1)
    x = x + model.pos_embed
    for block in model.blocks:
        normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
        x = x + block.mixer(normed)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight


@pytest.mark.parametrize('class_token', ['middle', 'none'])
def test_is_a_prenorm_residual_network(make, image, class_token: str):
    model = make(class_token=class_token).double()
    expected = forward_by_hand(model, image.double())
    torch.testing.assert_close(model.forward_features(image.double()), expected, rtol=0, atol=1e-12)


def test_logits_come_from_the_middle_token(make, image):
    model = make()
    tokens = model.forward_features(image)
    torch.testing.assert_close(model(image), model.head(tokens[:, 8]))


def test_double_token_is_averaged(make, image):
    model = make(class_token='double', num_classes=0)
    tokens = model.forward_features(image)
    torch.testing.assert_close(model(image), (tokens[:, 0] + tokens[:, -1]) / 2)


@pytest.mark.parametrize(('pool', 'expected'), [
    ('avg', lambda t, head: head(t.mean(1))),
    ('max', lambda t, head: head(t.amax(1))),
    ('last', lambda t, head: head(t[:, -1])),
    ('logit_max', lambda t, head: head(t).amax(1)),
    ('', lambda t, head: head(t))])
def test_pooling_without_a_class_token(make, image, pool: str, expected):
    model = make(class_token='none', global_pool=pool)
    torch.testing.assert_close(model(image), expected(model.forward_features(image), model.head))


def test_average_pooling_leaves_the_class_token_out(make, image):
    model = make(global_pool='avg', num_classes=0)
    tokens = model.forward_features(image)
    torch.testing.assert_close(model(image), torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1).mean(1))


def test_every_parameter_gets_a_gradient(make, variant, image):
    model = make(**variant).train()
    model(image).square().sum().backward()
    # Not None is all that holds everywhere: the decay of a last block has no influence on a token at the very end.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_scripted_model_equals_the_eager_one(make, variant, image):
    model = make(**variant)
    torch.testing.assert_close(torch.jit.script(model)(image), model(image))


def test_checkpointed_gradients_are_the_same(make, variant, image):
    model = make(**variant, drop_path_rate=0.).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_taps_end_in_the_final_features(make, variant, image):
    model = make(**variant)
    final, taps = model.forward_intermediates(image, norm=True, output_fmt='NLC')
    torch.testing.assert_close(final, model.forward_features(image))
    patches = final.shape[1] - model.num_prefix_tokens
    assert [tap.shape for tap in taps] == [(2, patches, 16)] * 3
    # The last tap is the final map without its class tokens.
    kept = sorted(set(range(final.shape[1])) - set(class_rows(model, final.shape[1])))
    torch.testing.assert_close(taps[-1], final[:, kept])


def class_rows(model: Vim, length: int) -> list[int]:
    if model.class_token == 'double':
        return [0, length - 1]
    return [] if model.class_token == 'none' else [class_token_index(model.class_token, length - 1)]


@pytest.mark.parametrize('size', [(32, 32), (40, 24), (33, 47), (8, 8), (64, 16)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_any_image_size_works(make, variant, size: tuple[int, int]):
    model = make(**variant)
    assert torch.isfinite(model(torch.randn(1, 3, *size))).all()


@pytest.mark.parametrize('size', [(40, 24), (56, 56)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_resizing_the_model_equals_resizing_on_the_fly(make, size: tuple[int, int]):
    model = make()
    x = torch.randn(1, 3, *size)
    expected = model(x)
    model.set_input_size(size)
    assert model.pos_embed.shape[1] == size[0] // 8 * (size[1] // 8) + 1
    torch.testing.assert_close(model(x), expected)


def test_resized_embedding_stays_frozen(make):
    model = make().requires_grad_(False)
    model.set_input_size(64)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize('in_chans', [1, 3, 7])
def test_number_of_channels_is_free(make, in_chans: int):
    assert make(in_chans=in_chans)(torch.randn(1, in_chans, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(('shape', 'message'), [
    ((1, 1, 32, 32), 'Expected images with 3 channels, got 1'),
    ((1, 3, 4, 32), '4 x 32 pixels is smaller than a patch')])
def test_unusable_images_are_refused(make, shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(shape))


@pytest.mark.parametrize(('options', 'message'), [
    ({'class_token': 'tail'}, "class_token is 'tail'; allowed are 'middle', 'head', 'double', 'none'"),
    ({'rope': 'yes'}, "rope is 'yes'"),
    ({'rope': 'both', 'embed_dim': 18}, 'embed_dim is 18'),
    ({'norm_layer': 'batchnorm'}, "norm_layer is 'batchnorm'"),
    ({'global_pool': 'token', 'class_token': 'none'}, 'needs a class token'),
    ({'global_pool': 'mean'}, "global_pool is 'mean'"),
    ({'bimamba_type': 'v9'}, "bimamba_type is 'v9'"),
    ({'img_size': 4}, 'smaller than a patch'),
    ({'depth': 0}, 'depth is 0; at least 1'),
    ({'d_state': 0}, 'd_state is 0; at least 1')])
def test_impossible_options_are_refused(make, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_class_rows_of_the_rotary_table_keep_still(make):
    table = rotary_rows(torch.zeros(1, 1, 8), 4, 4, 'middle', 14., official=False)
    x = torch.randn(1, 17, 8)
    torch.testing.assert_close(apply_rotary(x, table)[:, 8], x[:, 8])
    official = rotary_rows(torch.zeros(1, 1, 8), 4, 4, 'middle', 14., official=True)
    torch.testing.assert_close(official[:, 1:], torch.cat([table[:, :8], table[:, 9:]], dim=1))


def test_drop_path_rates_rise_and_lag_by_one_block(make):
    model = make(drop_path_rate=0.2)
    assert isinstance(model.blocks[0].drop_path, torch.nn.Identity)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks] + [model.drop_path.drop_prob]
    assert rates == pytest.approx([0., 0., 0.1, 0.2])


def test_pruned_model_keeps_its_taps_and_its_drop_path(make, image):
    model = make(drop_path_rate=0.2)
    expected = model.forward_intermediates(image, intermediates_only=True)[1]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1]) == [1]
    assert len(pruned.blocks) == 2
    assert pruned.drop_path.drop_prob == pytest.approx(0.1)
    torch.testing.assert_close(pruned.forward_intermediates(image, intermediates_only=True)[-1], expected)


@pytest.mark.parametrize('prune_norm', [False, True])
def test_pruned_model_trains_all_that_is_left(make, image, prune_norm: bool):
    model = make().train()
    taps = model.prune_intermediate_layers([0], prune_norm=prune_norm)
    model.forward_intermediates(image, indices=taps, norm=not prune_norm, intermediates_only=True)[0].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_pruned_model_takes_a_new_classifier(make, image):
    model = make()
    model.prune_intermediate_layers([1], prune_norm=True)
    model.reset_classifier(7, 'avg')
    assert model.forward_head(model.forward_features(image), pre_logits=True).shape[1] == model.head_hidden_size == 16
    assert model(image).shape == (2, 7)


def test_feature_extractor_trains_with_checkpointing(image):
    grads = []
    for enable in (False, True):
        torch.manual_seed(0)
        extractor = timm.create_model('vim_pico', features_only=True, embed_dim=16).train()
        extractor.model.set_grad_checkpointing(enable)
        sum(m.square().mean() for m in extractor(image)).backward()
        grads.append([p.grad for p in extractor.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_layers_are_grouped_for_layer_decay(make):
    model = make()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['patch_embed.proj.weight'] == groups['pos_embed'] == groups['cls_token'] == 0
    assert [groups[f'blocks.{i}.mixer.ssm.A_log'] for i in range(3)] == [1, 2, 3]
    assert groups['norm.weight'] >= 3 and groups['head.weight'] > 3


def test_state_parameters_are_not_decayed(make):
    fixed = make().no_weight_decay()
    assert {'pos_embed', 'cls_token', 'blocks.0.mixer.ssm.A_log', 'blocks.2.mixer.ssm_b.dt_bias'} <= fixed
    assert not any(name.endswith('weight') for name in fixed)


def test_classifier_can_be_replaced(make, image):
    model = make()
    model.reset_classifier(9)
    assert model(image).shape == (2, 9)
    model.reset_classifier(0, 'avg')
    assert model(image).shape == (2, 16)


def test_feature_maps_have_the_shape_of_the_picture():
    model = timm.create_model('vim_pico', features_only=True, out_indices=(0, -1))
    maps = model(torch.randn(2, 3, 24, 40))
    width = model.feature_info.channels()
    assert [tuple(m.shape) for m in maps] == [(2, width[0], 5, 9), (2, width[1], 5, 9)]
    assert model.feature_info.reduction() == [4, 4]


def test_a_refused_input_size_leaves_the_model_as_it_was(make, image):
    model = make()
    expected = model(image)
    with pytest.raises(ValueError, match='smaller than a patch'):
        model.set_input_size(2)
    assert torch.equal(model(image), expected)


def test_a_tap_of_the_dense_form_that_is_named_twice_comes_once(make, image):
    model = make()
    last = len(model.blocks) - 1
    dense = model.dense(out_indices=(last, -1))
    assert len(dense(image)) == len(dense.feature_info) == 1
