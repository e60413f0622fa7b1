"""`pretrained=True` and `visionssm://NAME`: files come by name, are converted once, and fit any use of timm."""
from pathlib import Path

import pytest
import timm
import torch

import visionssm
from visionssm.checkpoints import CheckpointError, converted, find_entry, load_pretrained
from visionssm.models import _builder


@pytest.fixture
def trained() -> torch.nn.Module:
    return visionssm.create_model('vim_pico', num_classes=5).eval()


@pytest.fixture
def published(server, add_catalogue, trained, tmp_path: Path) -> None:
    """Weights of a small Vim as their authors would publish them, in the catalogue."""
    torch.save({'model': visionssm.to_official('vim', trained), 'epoch': 3}, tmp_path / 'v.pth')
    server.files['v.pth'] = (tmp_path / 'v.pth').read_bytes()
    server.files['wrong.pth'] = server.files['v.pth']
    add_catalogue('vim', f'weights:\n- {{name: vim_pico, file: v.pth, keys: k, sources: ["{server.url("v.pth")}"]}}\n'
                         'without_weights:\n  vim2_pico: None exist.\n')
    add_catalogue('vmamba', 'weights:\n- {name: vmamba_pico, file: w.pth, keys: k, sources: '
                            f'["{server.url("wrong.pth")}"]}}\n')


def load(**options) -> torch.nn.Module:
    # the entry has five classes, which timm is told as of any configuration
    overlay = {'num_classes': 5}
    return timm.create_model('vim_pico', pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


def test_weights_come_by_name_in_both_functions(published, trained):
    x = torch.randn(2, 3, 32, 32)
    for model in (load(), visionssm.create_model(
            'vim_pico', pretrained=True, pretrained_cfg_overlay={'num_classes': 5}).eval()):
        assert torch.equal(model(x), trained(x))
        assert 'state_dict' not in model.pretrained_cfg and not model.pretrained_cfg.get('file')


def test_another_number_of_classes_gets_a_new_classifier_and_keeps_the_rest(published, trained):
    model = load(num_classes=10)
    assert model.get_classifier().out_features == 10
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.forward_features(x), trained.forward_features(x))


def test_another_number_of_channels_adapts_the_first_convolution(published, trained):
    first = trained.pretrained_cfg['first_conv']
    ours, theirs = load(in_chans=1).get_parameter(f'{first}.weight'), trained.get_parameter(f'{first}.weight')
    torch.testing.assert_close(ours, theirs.sum(1, keepdim=True))


def test_features_and_another_image_size(published, trained):
    x = torch.randn(1, 3, 32, 32)
    maps = load(features_only=True, out_indices=[0])(x)
    assert torch.equal(maps[0], trained.forward_intermediates(x, [0], intermediates_only=True)[0])
    assert load(img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_the_second_load_reads_what_was_converted(published, server, cache: Path, monkeypatch):
    first = load().state_dict()
    asked = len(server.requests)
    (cache / 'vim' / 'v.pth').write_bytes(b'not read any more')
    monkeypatch.setattr(_builder, 'rename_from_official', None)
    for key, value in load().state_dict().items():
        assert torch.equal(value, first[key])
    assert len(server.requests) == asked


@pytest.mark.parametrize('damage', ['cut', 'flip', 'no hash'])
def test_damaged_converted_weights_are_made_anew(published, cache: Path, damage: str):
    first = load().state_dict()
    kept = next((cache / 'converted').glob('*.safetensors'))
    content = bytearray(kept.read_bytes())
    if damage == 'no hash':
        kept.with_name(f'{kept.name}.sha256').unlink()
    elif damage == 'cut':
        kept.write_bytes(content[:-100])
    else:
        content[-9] ^= 1  # a single bit of a weight, which the format itself would not notice
        kept.write_bytes(content)
    for key, value in load().state_dict().items():
        assert torch.equal(value, first[key])
    assert next((cache / 'converted').glob('*.safetensors')).stat().st_size == len(content)


def test_another_version_converts_anew(published, cache: Path, monkeypatch):
    load()
    monkeypatch.setattr(converted, '__version__', '9.9')
    load()
    assert {path.name.rpartition('-')[2] for path in (cache / 'converted').glob('*.safetensors')} == {
        f'{visionssm.__version__}.safetensors', '9.9.safetensors'}


def test_the_caller_s_device_type_and_random_state_leave_no_trace(published, trained):
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device('meta'):
            weights = load_pretrained(find_entry('vim_pico'), lambda given: _builder._convert('vim', given))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in trained.state_dict().items():
        assert value.dtype == weights[key].dtype and torch.equal(weights[key], value)


def test_weights_of_another_family_are_told_with_the_file(published):
    with pytest.raises(CheckpointError, match=r'w\.pth, from http://.*wrong\.pth, is not what vmamba_pico stands for'):
        visionssm.create_model('vmamba_pico', pretrained=True)


def test_a_cache_that_cannot_keep_the_converted_weights_still_loads(published, cache: Path, caplog):
    cache.mkdir()
    (cache / 'converted').touch()
    assert load() and 'are not kept' in caplog.text


def test_models_without_weights_say_so(published):
    with pytest.raises(CheckpointError, match='No weights of vim2_pico can be fetched'):
        visionssm.create_model('vim2_pico', pretrained=True)


@pytest.mark.mm
def test_addresses_of_openmmlab_s_configs(published, trained, add_catalogue, server, tmp_path: Path):
    pytest.importorskip('mmengine')
    from visionssm.openmmlab.checkpoint import load_from_visionssm
    weights = visionssm.to_official('vim', trained)
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in weights.items()}, 'meta': {'epoch': 1}},
               tmp_path / 'd.pth')
    server.files['d.pth'] = (tmp_path / 'd.pth').read_bytes()
    add_catalogue('dense', 'weights:\n- {name: mask-rcnn_x_coco, model: vim_pico, config: c.py, file: d.pth, keys: k, '
                           f'sources: ["{server.url("d.pth")}"]}}\n')
    state = load_from_visionssm('visionssm://mask-rcnn_x_coco')['state_dict']
    assert state.keys() == {f'backbone.{key}' for key in weights}


def test_models_of_other_tasks(server, add_catalogue, tmp_path: Path):
    trained = visionssm.create_model('mambair_pico').eval()
    official = visionssm.to_official('mambair', trained)
    torch.save({'params': {key: value + 1 for key, value in official.items()}, 'params_ema': official},
               tmp_path / 'r.pth')
    server.files['r.pth'] = (tmp_path / 'r.pth').read_bytes()
    add_catalogue('mambair', 'weights:\n- {name: mambair_pico, file: r.pth, keys: k, ema: true, sources: '
                             f'["{server.url("r.pth")}"]}}\n')
    loaded = visionssm.create_model('mambair_pico', pretrained=True).eval()
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(x), trained(x))
