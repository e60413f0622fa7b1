"""MHS-VM's U-Net: what it computes on any image, its names, its official weights."""
import copy
from collections.abc import Callable

import pytest
import torch

import visionssm
from visionssm.checkpoints import CheckpointError
from visionssm.segmentation import MHSUNet
from visionssm.segmentation._unet import PatchExpand

TINY = {'depths': (1, 1, 2), 'depths_decoder': (1, 2, 1), 'dims': (8, 16, 32), 'd_state': 4}
CONFIG = {'depths': [1, 1, 2], 'depths_decoder': [1, 2, 1], 'dims': [8, 16, 32], 'dims_decoder': [32, 16, 8],
          'd_state': 4, 'para_dict': {'head_num': 4, 'with_proj': True, 'gfu_t': 0.2}}


@pytest.fixture
def make() -> Callable[..., MHSUNet]:
    def build(**options) -> MHSUNet:
        torch.manual_seed(0)
        model = MHSUNet(**{**TINY, **options}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model
    return build


def test_models_are_listed_under_their_task():
    names = visionssm.list_models(task='segmentation')
    assert {'mhs_vm_unet_3h', 'mhs_vm_unet_4h', 'mhs_vm_unet_pico'} <= set(names)
    assert set(names) <= set(visionssm.list_models()) and not set(names) & set(visionssm.list_models('classification'))


@pytest.mark.parametrize(('name', 'size'), [
    ('mhs_vm_unet_4h', 17_257_129), ('mhs_vm_unet_3h', 17_386_153), ('mhs_vm_unet_pico', 83_741)])
def test_registered_models_have_their_published_size(name: str, size: int):
    model = visionssm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == size
    assert model(torch.empty(2, *model.default_cfg['input_size'], device='meta')).shape[:2] == (2, 1)


def test_arguments_reach_the_model_and_unknown_ones_are_refused():
    assert visionssm.create_model('mhs_vm_unet_pico', num_classes=9, threshold=0.5).final_conv.out_channels == 9
    with pytest.raises(TypeError, match='embed_dims'):
        visionssm.create_model('mhs_vm_unet_pico', embed_dims=3)
    with pytest.raises(ValueError, match='mhs_vm_unet_pico is no backbone'):
        visionssm.create_model('mhs_vm_unet_pico', features_only=True)


def test_tags_name_the_weights():
    model = visionssm.create_model('mhs_vm_unet_4h.isic18', device='meta')
    assert model.pretrained_cfg['url'].endswith('/best_4h.pth') and model.pretrained_cfg['tag'] == 'isic18'
    with pytest.raises(ValueError, match="mhs_vm_unet_4h has no weights 'isic19'. Did you mean 'isic18'"):
        visionssm.create_model('mhs_vm_unet_4h.isic19')
    with pytest.raises(ValueError, match="Unknown model 'mhs_vm_unet_5h'. Did you mean 'mhs_vm_unet_"):
        visionssm.create_model('mhs_vm_unet_5h')


@pytest.mark.parametrize('size', [(32, 32), (64, 32), (33, 47), (1, 1), (5, 70)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_any_image_gives_a_map_of_its_size(make, size: tuple[int, int]):
    out = make()(torch.rand(2, 3, *size))
    assert out.shape == (2, 1, *size) and ((out > 0) & (out < 1)).all()


def test_images_that_do_not_fit_are_padded_with_their_edge(make):
    model = make()
    x = torch.rand(1, 3, 20, 45)
    padded = torch.cat([x, x[..., -1:].expand(-1, -1, -1, 3)], 3)
    padded = torch.cat([padded, padded[:, :, -1:].expand(-1, -1, 12, -1)], 2)
    torch.testing.assert_close(model(x), model(padded)[:, :, :20, :45])


def test_one_class_gives_probabilities_and_more_give_logits(make):
    x = torch.rand(2, 3, 32, 32)
    model = make()
    assert torch.equal(model(x), model.forward_logits(x).sigmoid())
    for options in ({'num_classes': 3}, {'probabilities': False}):
        model = make(**options)
        assert torch.equal(model(x), model.forward_logits(x)) and model(x).shape[2:] == (32, 32)


def test_gray_images_are_repeated_for_three_channels_only(make):
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(make()(x), make()(x.expand(-1, 3, -1, -1)))
    assert make(in_chans=1)(x).shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match='Expected images with 4 channels, got 1'):
        make(in_chans=4)(x)


@pytest.mark.parametrize('shape', [(3, 32, 32), (2, 3, 0, 32), (2, 2, 32, 32)], ids=str)
def test_other_shapes_are_refused_clearly(make, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match='Expected images'):
        make()(torch.zeros(shape))


def test_the_decoder_adds_what_the_encoder_read_and_leaves_the_finest_map_out(make):
    model = make()
    x = torch.rand(1, 3, 32, 32)
    deep, skips = model.encode(x)
    y = model.up_stages[0](deep)
    y = model.up_stages[1](y + skips[2])
    y = model.up_stages[2](y + skips[1])
    y = model.final_conv(model.final_up(y).permute(0, 3, 1, 2))
    assert torch.equal(model.forward_logits(x), y) and [s.shape[1] for s in skips] == [8, 4, 2]


def test_expansion_puts_row_offsets_before_column_offsets():
    layer = PatchExpand(2, 3, 2)
    layer.norm = torch.nn.Identity()
    x = torch.randn(1, 2, 3, 2)
    out = layer(x)
    parts = layer.expand(x).unflatten(-1, (4, 3))
    for i in (0, 1):
        for j in (0, 1):
            assert torch.equal(out[:, i::2, j::2], parts[..., 2 * i + j, :])


def test_batches_are_independent_and_may_be_empty(make):
    model = make()
    x = torch.rand(3, 3, 32, 48)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), atol=1e-5, rtol=1e-4)
    assert model(x[:0]).shape == (0, 1, 32, 48) and model(x[:0, :, :30]).shape == (0, 1, 30, 48)


def test_drop_path_rises_through_the_encoder_and_falls_through_the_decoder(make):
    model = make(drop_path_rate=0.3)
    rates = [[getattr(block.drop_path, 'drop_prob', 0.) for stage in stages for block in stage.blocks]
             for stages in (model.stages, model.up_stages)]
    assert rates == [pytest.approx([0., 0.1, 0.2, 0.3]), pytest.approx([0.3, 0.2, 0.1, 0.])]


def test_checkpointing_changes_no_gradient(make):
    x = torch.rand(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model = make(drop_path_rate=0.).train()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert all(grad is not None and grad.isfinite().all() for grad in grads[0].values())
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_autocast_stays_near_float32(make, dtype: torch.dtype):
    model = make()
    x = torch.rand(2, 3, 32, 32)
    expected = model.forward_logits(x)
    with torch.autocast('cpu', dtype):
        out = model.forward_logits(x)
    assert (out.float() - expected).norm() / expected.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


SHALLOW = {'depths': (1, 1), 'depths_decoder': (1, 1), 'dims': (8, 16), 'num_heads': 3}


def test_scripts(make):
    model = make(**SHALLOW)
    scripted = torch.jit.script(model)
    for x in (torch.rand(2, 3, 32, 32), torch.rand(2, 1, 21, 30)):
        torch.testing.assert_close(scripted(x), model(x))


def test_compiles_without_graph_breaks(make):
    model = make(**SHALLOW)
    x = torch.rand(2, 3, 16, 16)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x), atol=1e-5, rtol=1e-4)


def test_exported_program_equals_the_model(make):
    model = make(**SHALLOW)
    x = torch.rand(2, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    x = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


def test_weights_can_be_drawn_after_to_empty():
    model = MHSUNet(device='meta', dtype=torch.float64, **TINY).to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float('nan'))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(('options', 'message'), [
    ({'depths_decoder': (1, 1)}, 'each of the 3 stages of the encoder needs one'),
    ({'dims': (10, 20, 40)}, 'need a multiple of 4'),
    ({'num_classes': 0}, 'num_classes is 0'),
    ({'num_heads': 5}, 'num_heads is 5')])
def test_impossible_options_are_explained(make, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def official(model: MHSUNet) -> dict[str, torch.Tensor]:
    return visionssm.to_official('mhs_vm', model)


def test_conversion_there_and_back_is_the_identity(make):
    weights = official(make())
    model = visionssm.from_official('mhs_vm', weights, CONFIG)
    back = official(model)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], value) for key, value in weights.items())
    assert model.up_stages[0].blocks[0].mixer.scan.threshold == 0.2


def test_the_copy_that_the_official_code_loads_last_wins_and_one_is_enough(make):
    model = make()
    weights = official(model)
    repeats = [key for key in weights if 'x_ssproj_W' in key or '.mambaeng.' in key]
    assert len(repeats) == (1 + 4 * 5) * 8
    wrong = {**weights, **{key: torch.zeros_like(weights[key]) for key in repeats}}
    without = {key: value for key, value in weights.items() if key not in repeats}
    only = {key: value for key, value in weights.items() if not key.endswith('x_ssproj.weight')
            and '.seq2seq_engine.' not in key}
    x = torch.rand(1, 3, 32, 32)
    for given in (wrong, without, only):
        again = visionssm.from_official('mhs_vm', given).eval()
        assert torch.equal(again(x), model(x)), len(given)


def test_the_inner_official_class_returns_logits(make):
    weights = {key.removeprefix('vmunet.'): value for key, value in official(make()).items()}
    model = visionssm.from_official('mhs_vm', weights, CONFIG, official_class='VSSM').eval()
    assert visionssm.to_official('mhs_vm', model).keys() == weights.keys()
    assert visionssm.from_official('mhs_vm', weights).official_class == 'VSSM'
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(x), model.forward_logits(x))


def test_a_weight_that_is_missing_under_both_names_is_named(make):
    weights = official(make())
    scan = 'vmunet.layers.0.blocks.0.self_attention.mhs.'
    del weights[f'{scan}x_ssproj_W'], weights[f'{scan}x_ssproj.weight']
    with pytest.raises(CheckpointError, match=r'1 missing: vmunet\.layers\.0\.blocks\.0\..*x_ssproj\.weight'):
        visionssm.from_official('mhs_vm', weights, CONFIG)


@pytest.mark.parametrize('way', ['create_model', 'load_state_dict', 'pretrained', 'ours'])
def test_official_files_load_however_they_are_given(make, tmp_path, way: str):
    donor = visionssm.create_model('mhs_vm_unet_pico')
    weights = {**official(donor), 'total_ops': torch.zeros(1), 'vmunet.layers.0.total_params': torch.zeros(1)}
    weights = donor.state_dict() if way == 'ours' else weights
    path = tmp_path / 'best.pth'
    torch.save(weights, path)
    if way == 'load_state_dict':
        model = visionssm.create_model('mhs_vm_unet_pico')
        model.load_state_dict(torch.load(path))
    elif way == 'pretrained':
        model = visionssm.create_model(
            'mhs_vm_unet_pico', pretrained=True, pretrained_cfg_overlay={'file': str(path)})
    else:
        model = visionssm.create_model('mhs_vm_unet_pico', checkpoint_path=path)
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.state_dict().items())


def test_pretrained_weights_keep_their_trunk_for_other_classes_and_channels(tmp_path):
    donor = visionssm.create_model('mhs_vm_unet_pico')
    path = tmp_path / 'best.pth'
    torch.save(official(donor), path)
    model = visionssm.create_model(
        'mhs_vm_unet_pico', pretrained=True, pretrained_cfg_overlay={'file': str(path)}, num_classes=4)
    assert torch.equal(model.final_up.expand.weight, donor.final_up.expand.weight)
    with pytest.raises(CheckpointError, match='final_conv.weight is'):
        visionssm.create_model('mhs_vm_unet_pico', checkpoint_path=path, num_classes=4)


@pytest.mark.parametrize(('option', 'message'), [
    ({'dims_decoder': [32, 16, 16]}, 'dims_decoder'), ({'dims': [8, 24, 48], 'dims_decoder': None}, 'double'),
    ({'patch_size': 2}, 'patch_size is 2')])
def test_what_the_official_network_cannot_run_is_refused(option: dict, message: str):
    with pytest.raises(ValueError, match=message):
        visionssm.from_official('mhs_vm', {}, {**CONFIG, **option}, official_class='VMUNet')


def test_foreign_weights_are_recognised():
    with pytest.raises(ValueError, match='not the keys of an official MHS-VM state dict'):
        visionssm.from_official('mhs_vm', {'conv1.weight': torch.zeros(1)})


def test_copies_are_independent(make):
    model = make()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.final_conv.bias.add_(1)
    x = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(twin(x), model(x))
