"""The classifier around timm's models: modes, losses, mixing, normalisation, and its errors."""
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from visionssm.openmmlab.classifier import ClsDataPreprocessor, ImageClassifier
from visionssm.openmmlab.data import collate_images
from visionssm.openmmlab.transforms import TimmTransform

NET = dict(name='test_vit', img_size=32, num_classes=5)
SOFT = dict(type='SoftTargetCrossEntropy')
MIXUP = dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)


def batch(size=4, channels=3):
    torch.manual_seed(0)
    return dict(inputs=torch.randint(0, 256, (size, channels, 32, 32), dtype=torch.uint8),
                labels=torch.arange(size) % 5, paths=[f'{i}.png' for i in range(size)],
                indices=list(range(7, 7 + size)))


def test_tensor_mode_gives_the_logits_of_the_model():
    classifier = ImageClassifier(NET).eval()
    data = classifier.data_preprocessor(batch())
    assert torch.equal(classifier(data['inputs']), classifier.model(data['inputs']))


def test_predict_mode_describes_each_image():
    predictions = ImageClassifier(NET).eval().test_step(batch())
    assert [(p['index'], p['label'], p['path']) for p in predictions] == [
        (7, 0, '0.png'), (8, 1, '1.png'), (9, 2, '2.png'), (10, 3, '3.png')]
    torch.testing.assert_close(torch.stack([p['scores'] for p in predictions]).sum(1), torch.ones(4))


def test_inputs_are_normalised_with_the_models_statistics():
    classifier = ImageClassifier(NET)
    cfg, data = classifier.model.pretrained_cfg, batch()
    expected = (data['inputs'] / 255 - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    torch.testing.assert_close(classifier.data_preprocessor(data)['inputs'], expected)


def test_bytes_and_floats_in_0_to_1_are_normalised_alike():
    prepare = ClsDataPreprocessor(mean=[0.5] * 3, std=[0.2] * 3)
    data = batch()
    floats = {**data, 'inputs': data['inputs'].float() / 255}
    assert torch.equal(prepare(data)['inputs'], prepare(floats)['inputs'])


def test_random_erasing_leaves_the_other_pixels_as_they_are_without_it():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    prepare = ClsDataPreprocessor(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    images = []
    for probability in (0.0, 1.0):
        transform = TimmTransform(32, is_training=True, re_prob=probability)
        random.seed(0)
        torch.manual_seed(0)
        sample = dict(inputs=transform(photo), label=0, path='', index=0)
        images.append(prepare(collate_images([sample]))['inputs'])
    same = torch.isclose(*images, atol=1e-5).all(dim=1).float().mean()
    assert 0.5 < same < 1


@pytest.mark.parametrize(('loss', 'mixup'), [
    (None, None), (dict(type='LabelSmoothingCrossEntropy'), None), (dict(type='BinaryCrossEntropy'), None),
    (None, MIXUP), (SOFT, MIXUP), (dict(type='BinaryCrossEntropy'), MIXUP)],
    ids=['default', 'smoothing', 'bce', 'default-mixup', 'soft-mixup', 'bce-mixup'])
def test_losses_reach_every_parameter(loss, mixup):
    classifier = ImageClassifier(NET, loss=loss, mixup=mixup)
    data = classifier.data_preprocessor(batch(), training=True)
    classifier(**data, mode='loss')['loss'].backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_mixing_happens_in_training_only():
    prepare = ClsDataPreprocessor(mixup=MIXUP, num_classes=5)
    assert prepare(batch(), training=True)['labels'].shape == (4, 5)
    assert prepare(batch(), training=False)['labels'].shape == (4,)


def test_an_odd_batch_is_mixed_but_for_its_last_image():
    prepare = ClsDataPreprocessor(mixup=MIXUP, num_classes=5)
    data = batch(5)
    mixed = prepare(data, training=True)
    assert mixed['labels'].sum(1).tolist() == pytest.approx([1.0] * 5)
    assert torch.equal(mixed['inputs'][4], data['inputs'][4].float() / 255)
    assert mixed['labels'][4].argmax() == data['labels'][4]


def test_mixing_leaves_the_loaders_batch_alone():
    prepare = ClsDataPreprocessor(mixup=MIXUP, num_classes=5)
    data = batch()
    data['inputs'] = data['inputs'].float()
    before = data['inputs'].clone()
    prepare(data, training=True)
    assert torch.equal(data['inputs'], before)


def test_loaded_weights_survive_the_runners_initialisation(tmp_path):
    from safetensors.torch import save_file
    weights = {key: torch.full_like(value, 0.25) for key, value in timm.create_model(
        'test_vit', img_size=32, num_classes=5).state_dict().items()}
    save_file(weights, tmp_path / 'w.safetensors')
    classifier = ImageClassifier(dict(NET, checkpoint_path=str(tmp_path / 'w.safetensors')))
    classifier.init_weights()
    assert all(torch.equal(value, weights[key]) for key, value in classifier.model.state_dict().items())


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(model=dict(name='vim_tinny')), "Unknown model 'vim_tinny'.*'vim_tiny'"),
    (dict(model=dict(NET, drop_pth_rate=0.1)), "no argument 'drop_pth_rate'.*'drop_path_rate'"),
    (dict(model=dict(num_classes=3)), "model needs a 'name'"),
    (dict(model=NET, loss=dict(type='LabelSmoothingCrossEntropy'), mixup=MIXUP), 'reads class indices'),
    (dict(model=NET, loss=SOFT), 'needs densities'),
    (dict(model=NET, mixup=dict(mixup_alfa=1)), "no key 'mixup_alfa'.*'mixup_alpha'"),
    (dict(model=NET, data_preprocessor=dict(mean=[0.5])), 'one value a channel each'),
], ids=['model', 'argument', 'no-name', 'index-loss', 'soft-loss', 'mixup-key', 'statistics'])
def test_errors_name_the_mistake_and_the_way_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**kwargs)


def test_a_wrong_channel_count_is_told():
    classifier = ImageClassifier(NET)
    with pytest.raises(ValueError, match=r'1 channels.*3 values'):
        classifier.test_step(batch(channels=1))
    with pytest.raises(ValueError, match=r'takes 3 channels and the images have 1.*in_chans=1'):
        classifier(torch.zeros(1, 1, 32, 32))


def test_layer_depth_grows_from_the_input_to_the_head():
    classifier = ImageClassifier(NET)
    depths = [classifier.get_layer_depth(f'model.{name}')[0] for name in (
        'patch_embed.proj.weight', 'blocks.0.mlp.fc1.weight', 'blocks.3.mlp.fc1.weight', 'head.weight')]
    assert depths == sorted(set(depths))
    assert depths[-1] == classifier.get_layer_depth('model.head.weight')[1] - 1


def test_an_argument_of_a_wrong_type_is_one_error_that_names_the_model():
    with pytest.raises(ValueError, match="Model 'test_vit' cannot be built with.*'ten'"):
        ImageClassifier(dict(name='test_vit', num_classes='ten'))
