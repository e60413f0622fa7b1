"""Weights of Vim: official files through every road that timm offers, adaptation, and refusal of foreign files."""
import argparse
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import visionssm
from visionssm.checkpoints import CheckpointError, save_safetensors
from visionssm.models.vim import checkpoint_filter_fn


def model(**options) -> torch.nn.Module:
    return timm.create_model('vim_pico', **{'embed_dim': 16, 'depth': 2, **options}).eval()


@pytest.fixture
def trained() -> torch.nn.Module:
    return model()


@pytest.fixture
def official(trained) -> dict[str, torch.Tensor]:
    """The weights of `trained` as the official code names them."""
    state_dict = visionssm.to_official('vim', trained)
    assert 'layers.1.mixer.A_b_log' in state_dict
    return state_dict


@pytest.fixture
def official_file(official, tmp_path: Path) -> Path:
    """A training checkpoint as the official code writes it; its averaged weights differ from the others."""
    path = tmp_path / 'official.pth'
    torch.save({
        'model': official, 'model_ema': {key: value + 1 for key, value in official.items()}, 'epoch': 299,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]}, 'args': argparse.Namespace(lr=1e-3, model='vim'),
    }, path)
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def assert_same_output(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(actual(x), expected(x), rtol=0, atol=0)


def test_official_file_named_in_the_configuration(trained, official_file: Path):
    loaded = model(pretrained=True, pretrained_cfg_overlay={'file': str(official_file)})
    assert_same_output(loaded, trained)
    assert loaded.pretrained_cfg['file'] == str(official_file)
    assert 'state_dict' not in loaded.pretrained_cfg


def test_official_file_behind_an_address(trained, official_file: Path, server: str, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(official_file.parent / 'cache'))
    loaded = model(pretrained=True, pretrained_cfg_overlay={'url': f'{server}/official.pth'})
    assert_same_output(loaded, trained)


def test_official_state_dict_handed_over(trained, official):
    assert_same_output(model(pretrained=True, pretrained_cfg_overlay={'state_dict': official}), trained)


def test_official_file_through_our_create_model(trained, official_file: Path):
    loaded = visionssm.create_model('vim_pico', checkpoint_path=official_file, embed_dim=16, depth=2).eval()
    assert_same_output(loaded, trained)


def test_our_create_model_keeps_the_classifier(tmp_path: Path):
    trained = model(num_classes=7)
    path = save_safetensors(trained.state_dict(), tmp_path / 'w.safetensors')
    options = {'checkpoint_path': path, 'embed_dim': 16, 'depth': 2}
    assert_same_output(visionssm.create_model('vim_pico', num_classes=7, **options).eval(), trained)
    with pytest.raises(CheckpointError, match=r'head.weight is \(7, 16\), expected \(10, 16\)'):
        visionssm.create_model('vim_pico', num_classes=10, **options)


def test_our_create_model_loads_feature_extractors(trained, official_file: Path):
    loaded = visionssm.create_model(
        'vim_pico', checkpoint_path=official_file, embed_dim=16, depth=2, features_only=True, out_indices=[0])
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x)[0], trained.forward_intermediates(x, intermediates_only=True)[0])


def test_official_file_through_timm_s_checkpoint_path(trained, official, tmp_path: Path):
    torch.save({'model': official, 'args': argparse.Namespace(lr=1.)}, tmp_path / 'c.pth')
    assert_same_output(model(checkpoint_path=str(tmp_path / 'c.pth')), trained)


def test_plain_load_state_dict_understands_official_keys(trained, official):
    loaded = model()
    loaded.load_state_dict(official)
    assert_same_output(loaded, trained)


def test_official_keys_load_below_a_prefix(trained, official):
    wrapper = torch.nn.ModuleDict({'backbone': model()})
    wrapper.load_state_dict({f'backbone.{key}': value for key, value in official.items()})
    assert_same_output(wrapper['backbone'], trained)


def test_stored_rotary_tables_are_dropped():
    trained = model(class_token='head', rope='both')
    official = visionssm.to_official('vim', trained)
    assert official['rope.freqs_cos'].shape == (49, 16)
    loaded = model(class_token='head', rope='both')
    loaded.load_state_dict(official)
    assert_same_output(loaded, trained)


def test_filter_leaves_our_own_keys_alone(trained):
    state_dict = dict(sorted(trained.state_dict().items()))
    filtered = checkpoint_filter_fn(state_dict, model())
    assert filtered.keys() == state_dict.keys()
    assert all(filtered[key] is value for key, value in state_dict.items())


def test_weights_without_a_head_load_into_a_model_without_one(trained):
    trained.reset_classifier(0)
    loaded = model(num_classes=0)
    loaded.load_state_dict(checkpoint_filter_fn(dict(sorted(trained.state_dict().items())), loaded))
    assert_same_output(loaded, trained)


def test_other_number_of_classes_keeps_the_trunk(trained, official_file: Path):
    loaded = model(num_classes=4, pretrained=True, pretrained_cfg_overlay={'file': str(official_file)})
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.forward_features(x), trained.forward_features(x))


def test_grey_images_sum_the_channels_of_the_first_convolution(trained, official_file: Path):
    loaded = model(in_chans=1, pretrained=True, pretrained_cfg_overlay={'file': str(official_file)})
    torch.testing.assert_close(
        loaded.patch_embed.proj.weight, trained.patch_embed.proj.weight.sum(1, keepdim=True))


@pytest.mark.parametrize('img_size', [64, (24, 40)])
def test_position_embedding_is_resampled(trained, official_file: Path, img_size):
    loaded = model(img_size=img_size, pretrained=True, pretrained_cfg_overlay={'file': str(official_file)})
    trained.set_input_size(img_size)
    torch.testing.assert_close(loaded.pos_embed, trained.pos_embed)


def test_feature_extractor_loads_official_weights(trained, official_file: Path):
    loaded = model(features_only=True, pretrained=True, pretrained_cfg_overlay={'file': str(official_file)})
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x)[-1], trained.forward_intermediates(x, intermediates_only=True)[-1])


@pytest.mark.parametrize('resize', [False, True], ids=['as-built', 'resized'])
def test_folder_for_the_hub_round_trips(trained, tmp_path: Path, resize: bool):
    if resize:
        trained.set_input_size((24, 40))
        trained.reset_classifier(3, 'avg')
    save_for_hf(trained, tmp_path / 'model', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(loaded(x), trained(x), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['vim_tiny.in1k', 'vim_base.in1k', 'vim_small_stride8.ft_in1k'])
def test_configurations_name_the_published_files(name: str):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id.startswith('hustvl/Vim-')
    assert cfg.url == f'https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename}'
    assert cfg.license == 'apache-2.0' and cfg.crop_pct == 0.875 and cfg.interpolation == 'bicubic'


def load_by_create_model(path: Path) -> torch.nn.Module:
    return visionssm.create_model('vim_pico', checkpoint_path=path, embed_dim=16, depth=2)


def load_by_configuration(path: Path) -> torch.nn.Module:
    return model(pretrained=True, pretrained_cfg_overlay={'file': str(path)})


@pytest.mark.parametrize('load', [load_by_create_model, load_by_configuration])
def test_weights_of_another_model_are_refused_with_what_differs(tmp_path: Path, load):
    path = save_safetensors(model(depth=3, embed_dim=16, class_token='none').state_dict(), tmp_path / 'w.safetensors')
    with pytest.raises(CheckpointError) as error:
        load(path)
    message = str(error.value)
    assert 'does not fit vim_pico' in message
    assert '1 missing: cls_token' in message
    assert 'blocks.2.norm.weight' in message
    assert 'pos_embed is (1, 49, 16), expected (1, 50, 16)' in message


@pytest.mark.parametrize('load', [load_by_create_model, load_by_configuration])
def test_weights_of_another_family_are_refused(tmp_path: Path, load):
    path = save_safetensors(timm.create_model('test_vit').state_dict(), tmp_path / 'w.safetensors')
    with pytest.raises(CheckpointError, match='(?s)missing: .*unexpected: '):
        load(path)


@pytest.mark.parametrize('load', [load_by_create_model, load_by_configuration])
@pytest.mark.parametrize(('keep', 'message'), [(0, 'is empty'), (900, 'cut off')])
def test_damaged_file_is_refused(official_file: Path, load, keep: int, message: str):
    official_file.write_bytes(official_file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=message):
        load(official_file)
