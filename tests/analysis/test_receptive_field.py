"""Effective receptive fields: by hand for convolutions, and for every family."""
import pytest
import timm
import torch
from torch import nn

import visionssm
from visionssm.analysis import ReceptiveField, effective_receptive_field
from visionssm.export.inputs import example_inputs

PICO = [name for name in visionssm.list_models() if name.endswith('_pico')]


class Taps(nn.Module):
    """A backbone for dense prediction in small: a list of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 1, 3, padding=1, bias=False)
        self.second = nn.Conv2d(1, 1, 2, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.first(x), self.second(self.first(x))]


def test_the_field_of_a_convolution_is_its_kernel():
    model = nn.Conv2d(2, 1, 3, padding=1, bias=False).double()
    field = effective_receptive_field(model, torch.randn(3, 2, 7, 9, dtype=torch.float64))
    expected = torch.zeros(7, 9, dtype=torch.float64)
    expected[2:5, 3:6] = model.weight.detach()[0].abs().sum(0)
    torch.testing.assert_close(field.gradient, expected)
    assert field.centre == pytest.approx((3.5, 4.5), abs=1) and field.feature_size == (7, 9) and field.images == 3


def test_the_square_of_a_share_grows_around_the_centre():
    model = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    nn.init.ones_(model.weight)
    field = effective_receptive_field(model, torch.randn(1, 1, 9, 9))
    assert field.centre == pytest.approx((4.5, 4.5))
    assert field.sides((0.04, 0.05, 9 / 25, 0.4, 1)) == {0.04: 1, 0.05: 3, 9 / 25: 3, 0.4: 5, 1: 5}
    with pytest.raises(ValueError, match=r'shares are \[0.5, 0\]; 0 is not above 0'):
        field.sides([0.5, 0])


def test_the_centre_is_where_the_gradient_is_halved():
    model = Taps()
    for weight in model.parameters():
        nn.init.ones_(weight)
    field = effective_receptive_field(model, torch.randn(1, 2, 8, 12))
    assert field.feature_size == (4, 6) and field.centre == pytest.approx((5., 7.))
    assert field.sides((1,))[1] == 4  # two pixels of the stride, and one around them
    first = effective_receptive_field(model, torch.randn(1, 2, 8, 12), stage=0)
    assert first.feature_size == (8, 12) and first.sides((1,))[1] == 3


def test_paddings_of_strided_convolutions_move_the_centre():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3, 2, 1, bias=False) for _ in range(4)])
    for weight in model.parameters():
        nn.init.ones_(weight)
    field = effective_receptive_field(model, torch.randn(1, 1, 96, 96))
    # the middle pixel of the map, 3, looks at pixel 3 * 16, and not at the middle of its 16 pixels
    assert field.feature_size == (6, 6) and field.centre == pytest.approx((48.5, 48.5), abs=1e-5)
    assert field.sides((1,))[1] == 31


def test_the_mean_is_taken_over_images():
    model = visionssm.create_model('vmamba_pico').double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    single = [effective_receptive_field(model, image[None]).gradient for image in images]
    torch.testing.assert_close(effective_receptive_field(model, images).gradient, sum(single) / 2)


@pytest.mark.parametrize('name', PICO)
def test_every_family_has_a_field(name: str):
    torch.manual_seed(0)
    model = visionssm.create_model(name).train()
    size = None if name == 'dis_pico' else (16, 24) if name.startswith('mambair') else (32, 64)
    images = example_inputs(model, size, 2).tensors[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        field = effective_receptive_field(model, images)
    assert field.gradient.shape == images.shape[2:] and bool((field.gradient >= 0).all())
    sides = field.sides()
    assert 1 <= sides[0.2] <= sides[0.5] <= sides[0.99] <= 2 * max(images.shape[2:])
    # behind a LayerNorm too, what is left is no rounding error
    assert float(field.gradient.max()) > 1e-6
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scans_see_further_than_convolutions():
    torch.manual_seed(0)
    conv = effective_receptive_field(timm.create_model('test_resnet.r160_in1k'), size=64)
    scan = effective_receptive_field(visionssm.create_model('vmamba_pico'), size=64)
    assert conv.images == scan.images == 8
    assert float((scan.gradient > 0).double().mean()) == 1


def test_restoration_sees_from_a_pixel_of_its_output():
    field = effective_receptive_field(visionssm.create_model('mambair_pico'), torch.rand(1, 3, 16, 24))
    assert field.feature_size == (32, 48) and field.centre == pytest.approx((8.25, 12.25), abs=1)
    row, column = divmod(int(field.gradient.argmax()), 24)
    assert abs(row - 8) <= 1 and abs(column - 12) <= 1


def test_stages_are_seen_one_by_one():
    model = visionssm.create_model('vmamba_pico')
    sizes = [effective_receptive_field(model, torch.randn(1, 3, 64, 64), stage).feature_size for stage in range(4)]
    assert sizes == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_progress_counts_the_images():
    seen: list[int] = []

    def progress(steps: range) -> list[int]:
        seen.extend(steps)
        return seen

    effective_receptive_field(nn.Conv2d(1, 1, 1), torch.randn(3, 1, 2, 2), progress=progress)
    assert seen == [0, 1, 2]


def test_what_has_no_field_is_refused():
    with pytest.raises(ValueError, match=r'images are \(3, 8, 8\)'):
        effective_receptive_field(nn.Conv2d(3, 1, 1), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match='Sequential puts out no map'):
        effective_receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match='stage is 4; VMamba has 4 maps'):
        effective_receptive_field(visionssm.create_model('vmamba_pico'), torch.zeros(1, 3, 32, 32), 4)
    with pytest.raises(ValueError, match='stage is 1; Conv2d puts out 1 maps'):
        effective_receptive_field(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), 1)
    dead = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(dead.weight)
    with pytest.raises(ValueError, match='gradient of Conv2d is zero'):
        effective_receptive_field(dead, torch.randn(1, 1, 2, 2))
    nn.init.constant_(dead.weight, float('nan'))
    with pytest.raises(ValueError, match='gradient of Conv2d is not finite'):
        effective_receptive_field(dead, torch.randn(1, 1, 2, 2))


def test_a_field_can_be_made_by_hand():
    field = ReceptiveField(torch.eye(3, dtype=torch.float64), (1.5, 1.5), (1, 1), 1)
    assert field.sides((1 / 3, 0.5)) == {1 / 3: 1, 0.5: 3}
