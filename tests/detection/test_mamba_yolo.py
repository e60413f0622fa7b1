"""Mamba-YOLO: what it returns, what it refuses, its names, its official configurations and files."""
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.detection import MambaYOLO, YOLOLoss, decode_boxes

TINY = {'num_classes': 3, 'depths': (1, 1, 2, 1), 'dims': (8, 8, 16, 16), 'neck_depth': 2, 'd_state': 4}


@pytest.fixture
def make() -> Callable[..., MambaYOLO]:
    def build(**options) -> MambaYOLO:
        torch.manual_seed(0)
        return MambaYOLO(**{**TINY, **options}).eval()
    return build


def official(model: MambaYOLO) -> dict[str, torch.Tensor]:
    return visionssm.to_official('mamba_yolo', model)


@pytest.mark.parametrize(('name', 'size'), [
    ('mamba_yolo_tiny', 6_131_704), ('mamba_yolo_base', 21_828_000), ('mamba_yolo_large', 57_631_024),
    ('mamba_yolo_pico', 471_688)])
def test_registered_models_have_their_published_size(name: str, size: int):
    assert name in visionssm.list_models('detection')
    model = visionssm.create_model(name, device='meta').eval()
    assert sum(p.numel() for p in model.parameters()) == size
    assert model(torch.empty(2, 3, 64, 96, device='meta')).shape == (2, 84, 126)


def test_models_without_weights_say_so():
    with pytest.raises(CheckpointError, match='the authors published none'):
        visionssm.create_model('mamba_yolo_tiny', pretrained=True, device='meta')


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (160, 32)], ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('num_classes', [1, 3])
def test_training_gives_maps_and_evaluation_boxes_in_the_image(make, size: tuple[int, int], num_classes: int):
    model = make(num_classes=num_classes)
    x = torch.rand(2, 3, *size)
    cells = [size[0] * size[1] // stride ** 2 for stride in model.strides]
    with torch.no_grad():
        out = model(x)
        raw = model.train()(x)
    assert [m.shape for m in raw] == [(2, 64 + num_classes, size[0] // s, size[1] // s) for s in (8, 16, 32)]
    assert out.shape == (2, 4 + num_classes, sum(cells))
    assert (out[:, 2:4] > 0).all() and ((out[:, 4:] > 0) & (out[:, 4:] < 1)).all()


def test_evaluation_is_the_decoding_of_the_raw_maps(make):
    model = make()
    x = torch.rand(2, 3, 64, 32)
    out = model(x)
    boxes, scores = decode_boxes(model.forward_raw(x), model.strides)
    torch.testing.assert_close(out[:, :2].transpose(1, 2), (boxes[..., :2] + boxes[..., 2:]) / 2)
    torch.testing.assert_close(out[:, 2:4].transpose(1, 2), boxes[..., 2:] - boxes[..., :2])
    torch.testing.assert_close(out[:, 4:].transpose(1, 2), scores.sigmoid())


def test_batches_are_independent_and_may_be_empty(make):
    model = make()
    x = torch.rand(3, 3, 32, 64)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), atol=1e-4, rtol=1e-4)
    assert model(x[:0]).shape == (0, 7, 42)


def test_memory_format_changes_nothing(make):
    model = make()
    x = torch.rand(2, 3, 32, 64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(('shape', 'message'), [
    ((1, 3, 33, 64), 'An image of 33 x 64 pixels: the sides must be multiples of 32'),
    ((1, 3, 64, 80), 'An image of 64 x 80 pixels'), ((1, 3, 0, 32), 'smaller than a patch'),
    ((1, 1, 64, 64), 'got 1: convert the images, or build the model with in_chans=1'),
    ((3, 64, 64), 'got 3 dimensions')], ids=str)
def test_images_that_do_not_fit_are_refused(make, shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(shape))


@pytest.mark.parametrize('in_chans', [1, 4])
def test_images_may_have_other_channels(make, in_chans: int):
    assert make(in_chans=in_chans)(torch.rand(1, in_chans, 32, 32)).shape == (1, 7, 21)


@pytest.mark.parametrize(('options', 'message'), [
    ({'depths': (1, 1, 1)}, 'depths are'), ({'dims': (8, 8, 15, 16)}, 'choose even numbers'),
    ({'dims': (8, 8, 16)}, 'dims are'), ({'num_classes': 0}, 'num_classes is 0'),
    ({'neck_depth': 0}, 'neck_depth is 0'), ({'depths': (1, 0, 1, 1)}, 'four numbers from 1 on')])
def test_impossible_options_are_explained(make, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_head_starts_with_few_objects(make):
    raw = MambaYOLO(80, dims=(8, 8, 8, 8)).head
    assert [branch[-1].bias[0].item() for branch in raw.classes] == pytest.approx([-11.537, -10.150, -8.764], abs=1e-3)
    assert all((branch[-1].bias == 1).all() for branch in raw.boxes)
    ssm = make().backbone.stages[2].blocks[0].mixers[0].ssm
    assert (ssm.A_log == 0).all() and (ssm.D == 1).all() and 0.7 < ssm.dt_bias.std() < 1.3


def test_norms_have_the_constants_of_the_official_model(make):
    norms = {(type(m).__name__, m.eps, getattr(m, 'momentum', None)) for m in make().modules() if hasattr(m, 'eps')}
    assert norms == {
        ('BatchNormAct2d', 1e-3, 0.03), ('LayerNorm2d', 1e-6, None), ('WideLayerNorm', 1e-5, None)}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_mixed_precision_trains_in_float32_losses(make, dtype: torch.dtype):
    model = make().train()
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6], [1, 2, 0.3, 0.3, 0.2, 0.2]])
    with torch.autocast('cpu', dtype):
        losses = YOLOLoss(3)(model(torch.rand(2, 3, 64, 64)), targets)
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.autocast('cpu', dtype), torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 32, 32)).dtype == torch.float32


def test_half_precision_weights_give_float32_boxes(make):
    model = make()
    x = torch.rand(1, 3, 32, 32)
    expected = model(x)
    out = model.bfloat16()(x.bfloat16())
    assert out.dtype == torch.float32 and (out - expected).abs().max() < 2


def test_a_frozen_backbone_gets_no_gradient(make):
    model = make().train()
    model.backbone.requires_grad_(False).eval()
    before = copy.deepcopy(model.backbone.state_dict())
    loss = sum(YOLOLoss(3)(model(torch.rand(2, 3, 64, 64)), torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]])).values())
    loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.neck.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_the_bins_are_no_part_of_training(make):
    assert [name for name, p in make().named_parameters() if not p.requires_grad] == ['head.bins']


def test_checkpointing_changes_no_gradient(make):
    x = torch.rand(2, 3, 32, 64)
    grads = []
    for enable in (False, True):
        model = make()  # in evaluation mode: a second pass would move the averages of BatchNorm
        model.set_grad_checkpointing(enable)
        sum(m.square().mean() for m in model.forward_raw(x)).backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-4)


def test_learns_one_picture(make):
    model, loss = make().train(), YOLOLoss(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    x = torch.zeros(2, 3, 64, 64)
    x[:, :, 16:48, 16:48] = 1
    targets = torch.tensor([[i, 1, 0.5, 0.5, 0.5, 0.5] for i in range(2)])
    values = []
    for _ in range(15):
        total = sum(loss(model(x), targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.6 * values[0]  # observed: 0.45


def test_fused_models_give_the_same_and_are_for_inference_only(make):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.rand(1, 3, 32, 32)
    expected = model(x)
    fused = model.fuse()
    assert fused is model and not fused.training and not any(p.requires_grad for p in fused.parameters())
    torch.testing.assert_close(fused(x), expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match='has no counterpart'):
        official(fused)


def test_weights_can_be_drawn_after_to_empty():
    model = MambaYOLO(device='meta', dtype=torch.float64, **TINY).to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float('nan'))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.head.bins.flatten(), torch.arange(16.).double())


def test_conversion_there_and_back_is_the_identity(make):
    weights = official(make())
    assert 'model.1.op.A_logs' in weights and 'model.5.1.op.A_logs' in weights
    assert weights['model.11.ss2d.1.in_proj.weight'].shape == (64, 16, 1, 1)
    assert weights['model.21.dfl.conv.weight'].shape == (1, 16, 1, 1)
    again = visionssm.from_official('mamba_yolo', weights)
    back = official(again)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], value) for key, value in weights.items())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.eval()(x), make()(x))


@pytest.mark.parametrize('config', [
    {'depth_multiple': 0.33, 'width_multiple': 0.25, 'max_channels': 1024, 'nc': 80},
    {'scale': [0.33, 0.25, 1024], 'nc': 80, 'ch': 3, 'imgsz': 640},
    {'scales': {'T': [0.33, 0.25, 1024]}, 'scale': '', 'nc': 80, 'backbone': [], 'head': []},
    {'scales': {'L': [0.67, 0.75, 768], 'T': [0.33, 0.25, 1024]}, 'scale': 'T', 'nc': 80}],
    ids=['factors', 'scale', 'yaml', 'named'])
def test_official_configurations_are_understood(config: dict):
    with torch.device('meta'):
        weights = official(visionssm.create_model('mamba_yolo_tiny'))
        model = visionssm.from_official('mamba_yolo', weights, config)
    assert sum(p.numel() for p in model.parameters()) == 6_131_704


def test_wrong_configurations_and_files_are_explained(make):
    weights = official(make())
    with pytest.raises(ValueError, match="config has no 'max_channels'"):
        visionssm.from_official('mamba_yolo', weights, {'depth_multiple': 1, 'width_multiple': 1})
    with pytest.raises(ValueError, match='not the keys of an official Mamba-YOLO state dict'):
        visionssm.from_official('mamba_yolo', {'conv1.weight': torch.zeros(1)})
    del weights['model.21.dfl.conv.weight']
    with pytest.raises(CheckpointError, match=r'1 missing: model\.21\.dfl\.conv\.weight'):
        visionssm.from_official('mamba_yolo', weights)


@pytest.mark.parametrize('names', ['official', 'ours'])
def test_state_dicts_of_both_names_load(tmp_path: Path, names: str):
    donor = visionssm.create_model('mamba_yolo_pico', num_classes=2)
    weights = official(donor) if names == 'official' else donor.state_dict()
    torch.save(weights, tmp_path / 'weights.pth')
    model = visionssm.create_model('mamba_yolo_pico', checkpoint_path=tmp_path / 'weights.pth', num_classes=2)
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.state_dict().items())
    model = visionssm.create_model('mamba_yolo_pico', num_classes=2)
    model.load_state_dict(weights)
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_compiles_without_graph_breaks(make):
    model = make(depths=(1, 1, 1, 1), neck_depth=1)
    x = torch.rand(2, 3, 32, 32)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x), atol=1e-4, rtol=1e-4)
