"""Losses of networks for photographs: perceptual, adversarial, and against sharpened targets."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import VGG19_Weights
from torchvision.transforms.functional import normalize

from visionssm.checkpoints import CheckpointError
from visionssm.restoration.losses import VGG_LAYERS, GANLoss, PerceptualLoss, PixelLoss
from visionssm.restoration.sharpen import unsharp_mask

SMALL = {'conv1_2': 0.1, 'conv2_2': 1.}


def loss_of(**options) -> PerceptualLoss:
    torch.manual_seed(0)
    return PerceptualLoss(**{'weights': 'random', 'layers': SMALL, **options})


def test_layers_are_the_convolutions_of_vgg19_before_activation():
    loss = loss_of(layers=None)
    assert [type(loss.net[place]).__name__ for place in VGG_LAYERS.values()] == ['Conv2d'] * 16
    assert loss.factors == {2: 0.1, 7: 0.1, 16: 1., 25: 1., 34: 1.} and len(loss.net) == 35
    maps = loss.features(torch.rand(1, 3, 32, 32))
    assert [tuple(x.shape[1:]) for x in maps.values()] == [
        (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert all(x.min() < 0 for x in maps.values())


def test_the_network_sees_images_as_it_was_trained_on_them():
    loss = loss_of(layers={'conv1_1': 1.})
    x = torch.rand(1, 3, 8, 8)
    expected = loss.net[0](normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(loss.features(x)[0], expected)


@pytest.mark.parametrize('kind', ['l1', 'mse'])
def test_equal_pictures_have_no_loss_and_others_the_weighted_sum(kind):
    loss = loss_of(kind=kind, weight=0.5)
    x, y = torch.rand(2, 2, 3, 16, 16)
    assert loss(x, x) == 0
    gaps = [(a - b).abs() if kind == 'l1' else (a - b).square()
            for a, b in zip(loss.features(x).values(), loss.features(y).values())]
    torch.testing.assert_close(loss(x, y), 0.5 * (0.1 * gaps[0].mean() + 1. * gaps[1].mean()))


def test_the_network_sees_normalised_pictures_and_stays_as_it_is():
    loss = loss_of()
    gray = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(loss.features(gray)[2], loss.features(gray.expand(-1, 3, -1, -1))[2])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    first = loss.net[:3](torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(loss.features(mean)[2], first)
    assert not any(param.requires_grad for param in loss.parameters())


def test_the_perceptual_loss_is_in_float32_under_autocast():
    loss = loss_of()
    x, y = torch.rand(2, 1, 3, 16, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = loss(x, y)
    assert found.dtype == torch.float32 and torch.equal(found, loss(x, y))


def test_gradients_are_right_in_float64():
    loss = loss_of(kind='mse', layers={'conv1_2': 1.}).double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: loss(a, y), x)
    loss(x, y).backward()
    assert y.grad is None and x.grad.abs().sum() > 0
    logits = torch.tensor([-1.5, 0.3, 2.], dtype=torch.float64, requires_grad=True)
    for kind in ('vanilla', 'lsgan', 'hinge'):
        for turn in ((True, False), (True, True), (False, True)):
            assert torch.autograd.gradcheck(GANLoss(kind, 0.1), (logits, *turn))


def test_weights_come_from_a_file_of_vgg19(tmp_path: Path, monkeypatch):
    source = loss_of()
    state = {f'features.{key}': value for key, value in source.net.state_dict().items()}
    # later convolutions and the classifier are of no use
    state |= {'features.34.weight': torch.zeros(2), 'classifier.6.bias': torch.zeros(1000)}
    torch.save(state, tmp_path / 'vgg19.pth')
    save_file(state, tmp_path / 'vgg19.safetensors')
    torch.manual_seed(7)
    for name in ('vgg19.pth', 'vgg19.safetensors'):
        found = PerceptualLoss(tmp_path / name, SMALL).net.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in source.net.state_dict().items())
    monkeypatch.setattr(VGG19_Weights, 'get_state_dict', lambda self, **options: state)
    assert torch.equal(PerceptualLoss(layers=SMALL).net[0].weight, source.net[0].weight)
    torch.save({key: value for key, value in state.items() if '.5.' not in key}, tmp_path / 'vgg19.pth')
    with pytest.raises(CheckpointError, match=r'(?s)takes weights of VGG19.*missing: 5\.weight'):
        PerceptualLoss(tmp_path / 'vgg19.pth', SMALL)


def test_weights_that_are_not_there_are_named(monkeypatch):
    def offline(self, **options):
        raise OSError('no route to host')

    monkeypatch.setattr(VGG19_Weights, 'get_state_dict', offline)
    with pytest.raises(FileNotFoundError, match=r'vgg19-dcbb9e9d.pth.*no route.*weights=PATH'):
        PerceptualLoss()
    for weights in ('absent.pth', None):
        with pytest.raises(FileNotFoundError, match=rf'{weights}.*vgg19-dcbb9e9d.pth'):
            PerceptualLoss(weights)


def test_targets_are_sharpened_where_that_is_asked_for():
    x = torch.zeros(1, 3, 24, 24)
    x[..., 12:] = 0.5
    sharp = unsharp_mask(x)
    assert sharp.shape == x.shape and sharp.min() >= 0 and sharp.max() <= 1
    assert sharp[..., 12].mean() > 0.55 and x.equal(unsharp_mask(x, threshold=300.))
    assert torch.equal(unsharp_mask(torch.full((3, 9, 7), 0.3)), torch.full((3, 9, 7), 0.3))
    torch.testing.assert_close(PixelLoss(sharpen=True)(x, x), (sharp - x).abs().mean())
    assert loss_of(sharpen=True)(sharp, x) == 0 and loss_of()(sharp, x) > 0


def test_sharpening_is_in_float32_under_autocast_and_turns_with_the_picture():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 30, 21)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = unsharp_mask(x)
    assert torch.equal(found, unsharp_mask(x)) and found.dtype == torch.float32
    torch.testing.assert_close(unsharp_mask(x.transpose(-1, -2)), found.transpose(-1, -2))
    torch.testing.assert_close(unsharp_mask(x[1, 2]), found[1, 2])


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: loss_of(layers={'conv6_1': 1.}), 'conv6_1'),
    (lambda: loss_of(layers={}), 'layers is empty'),
    (lambda: loss_of(kind='cosine'), 'mse'),
    (lambda: loss_of()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)), 'scale of the model'),
    (lambda: loss_of()(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)), '4 channels'),
    (lambda: unsharp_mask(torch.zeros(3, 8, 8), side=50), 'must be odd'),
])
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
