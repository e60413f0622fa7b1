"""`visionssm convert`: official files to ours and back, for every family, and what is said where they do not fit."""
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn

import visionssm
from visionssm.checkpoints import CheckpointError, entries, load_state_dict, save_safetensors
from visionssm.checkpoints.load import read_metadata
from visionssm.cli import main
from visionssm.conversion import Source, convert, convert_back, read_source
from visionssm.models._official import families

KEYS = Path(__file__).resolve().parent.parent.parent.parent / 'shared' / 'keys'
MODELS = {
    'dis': ('dis_pico', {'num_classes': 5}), 'mamba2d': ('mamba2d_pico', {'d_state': 16}),
    'mamba_yolo': ('mamba_yolo_pico', {}),
    'mambair': ('mambair_pico', {}), 'mambairv2': ('mambairv2_pico', {}), 'mhs_vm': ('mhs_vm_unet_pico', {}),
    'spatial_mamba': ('spatial_mamba_pico', {}), 'vim': ('vim_pico', {'num_classes': 4}),
    'vmamba': ('vmamba_pico', {'num_classes': 7}), 'vssd': ('vssd_pico', {})}


def official(family: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    name, options = MODELS[family]
    model = visionssm.create_model(name, **options).eval()
    return model, {key: value.clone() for key, value in visionssm.to_official(family, model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(b[key], value) and b[key].dtype == value.dtype
                                        for key, value in a.items())


def run(*words: object) -> int:
    return main(['convert', *map(str, words)])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """What the official training of a small VMamba leaves."""
    path = tmp_path / 'ckpt.pth'
    torch.save({'model': official('vmamba')[1], 'model_ema': official('vmamba', 1)[1], 'optimizer': {'lr': 1.},
                'epoch': 3}, path)
    return path


def test_every_family_is_converted_here():
    assert set(families()) == set(MODELS)


@pytest.mark.parametrize('family', MODELS)
def test_there_and_back_is_the_identity_and_the_file_says_what_it_holds(family: str, tmp_path: Path):
    model, state_dict = official(family)
    found = convert(Source(tmp_path / 'given.pth', 'hash', state_dict))
    name, options = MODELS[family]
    assert (found.family, found.name, found.arguments, found.gaps) == (family, name, options, {})
    path = found.save(tmp_path / 'ours.safetensors')
    config = json.loads(read_metadata(path)['config'])
    arguments = {key: config[key] for key in ('num_classes',) if key in config} | config.get('model_args', {})
    assert same(visionssm.create_model(config['architecture'], checkpoint_path=path, **arguments).state_dict(),
                model.state_dict())
    back = convert_back(read_source(path)).save(tmp_path / 'back.pth')
    assert same(torch.load(back, weights_only=True)['model'], state_dict)
    assert same(load_state_dict(convert_back(read_source(path)).save(tmp_path / 'b.safetensors')), state_dict)


def test_the_way_back_needs_no_header_where_the_keys_tell_the_model(tmp_path: Path):
    model, state_dict = official('vssd')
    torch.save({'state_dict': {f'model.{key}': value for key, value in model.state_dict().items()}, 'meta': {}},
               tmp_path / 'epoch_1.pth')
    assert same(dict(convert_back(read_source(tmp_path / 'epoch_1.pth')).state_dict), state_dict)


def test_models_that_keys_cannot_tell_apart_need_a_name():
    with torch.device('meta'):
        ours = visionssm.create_model('vim_tiny_rope').state_dict()
    source = Source(Path('rope.pth'), 'hash', ours)
    with pytest.raises(CheckpointError, match='vim_tiny.*give --name'):
        convert_back(source)
    assert 'rope.freqs_cos' in convert_back(source, 'vim_tiny_rope').state_dict


def test_options_that_the_authors_do_not_have_are_refused_on_the_way_back():
    ours = visionssm.create_model('mamba2d_pico').state_dict()  # with fewer states than the official code can have
    with pytest.raises(CheckpointError, match='no counterpart .*mis-shaped, the first one backbone.stages.0.0.token'):
        convert_back(Source(Path('p.pth'), 'hash', ours), 'mamba2d_pico')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_data_types_stay(dtype: torch.dtype, tmp_path: Path):
    state_dict = {key: value.to(dtype) for key, value in official('mambairv2')[1].items() if value.is_floating_point()}
    state_dict['relative_position_index_SA'] = official('mambairv2')[1]['relative_position_index_SA']
    found = convert(Source(tmp_path / 'half.pth', 'hash', state_dict))
    assert {value.dtype for value in found.state_dict.values()} == {dtype}
    path = found.save(tmp_path / 'half.safetensors')
    assert same(dict(convert_back(read_source(path)).state_dict), state_dict)


def key_lists() -> list[Path]:
    return sorted(KEYS.glob('*/*.json'))


@pytest.mark.slow
@pytest.mark.parametrize('path', key_lists() or [pytest.param(None, marks=pytest.mark.skip(reason='no key lists'))],
                         ids=lambda path: getattr(path, 'stem', 'absent'))
def test_every_official_size_is_recognised_and_comes_back(path: Path):
    content = json.loads(path.read_text())['keys']
    state_dict = {key: torch.empty(value['shape'], dtype=getattr(torch, value['dtype']), device='meta')
                  for key, value in content.items()}
    whole = not path.stem.startswith(('vimdet', 'vimseg'))
    if not whole:
        state_dict = {key.removeprefix('backbone.'): value for key, value in state_dict.items()
                      if key.startswith('backbone.')}
    found = convert(Source(path, 'hash', state_dict))  # which fails where two families fit
    assert found.family.removesuffix('v2') == path.parent.name
    models = {entry.model for entry in entries() if entry.keys == f'{path.parent.name}/{path.stem}'}
    if whole:
        assert not models or models & {found.name, *found.alike}
    source = Source(path, 'hash', found.state_dict, metadata=found.metadata)
    assert {key: tuple(value.shape) for key, value in convert_back(source).state_dict.items()} == {
        key: tuple(value.shape) for key, value in state_dict.items()}


def test_sizes_that_are_not_registered_keep_their_arguments(tmp_path: Path):
    config = {'depths': [1, 1], 'embed_dim': 16, 'num_heads': [2, 4], 'num_classes': 3, 'ssd_expansion': 2,
              'attn_types': ['mamba2', 'standard'], 'd_state': 8}
    build = visionssm.models._official.find_official('vssd').build
    model = build('VMAMBA2', config)
    state_dict = visionssm.to_official('vssd', model)
    for given in (config, None):
        found = convert(Source(tmp_path / 'own.pth', 'hash', state_dict), 'vssd', given)
        path = found.save(tmp_path / 'own.safetensors')
        again = visionssm.create_model(found.name, checkpoint_path=path, **found.arguments)
        assert same(again.state_dict(), model.state_dict())
        assert found.arguments['depths'] == [1, 1] and found.arguments['num_classes'] == 3


def test_the_command_reports_and_writes(weights: Path, tmp_path: Path, capsys):
    out = tmp_path / 'ours.safetensors'
    assert run(weights, '-o', out) == 0
    text = capsys.readouterr().out
    assert 'vmamba (VSSM), 114 keys fit' in text and 'vmamba_pico(num_classes=7)' in text
    assert 'left out    3 (beside the weights in the file): model_ema, optimizer, epoch' in text
    assert same(load_state_dict(out), official('vmamba')[0].state_dict())
    assert json.loads(read_metadata(out)['notes'])['source'] == 'ckpt.pth'
    assert timm.create_model('vmamba_pico', num_classes=7, checkpoint_path=out) is not None
    assert run(weights, '-o', out) == 1
    assert 'is there already; --force replaces it' in capsys.readouterr().err
    assert run(weights, '-o', out, '--force', '--ema', '--json') == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts['model'], facts['arguments'], facts['missing']) == ('vmamba_pico', {'num_classes': 7}, [])
    assert facts['dropped'].keys() == {'model', 'optimizer', 'epoch'}
    assert same(load_state_dict(out), official('vmamba', 1)[0].state_dict())
    assert run(out, '--to-official', '-o', tmp_path / 'back.pth') == 0
    assert same(load_state_dict(tmp_path / 'back.pth'), official('vmamba', 1)[1])


def test_a_choice_between_sets_needs_two(tmp_path: Path, capsys):
    torch.save(official('vmamba')[1], tmp_path / 'one.pth')
    for option in ('--ema', '--no-ema'):
        assert run(tmp_path / 'one.pth', '-o', tmp_path / 'o.safetensors', option) == 1
        assert f'one set of weights, so there is none to choose: leave out {option}' in capsys.readouterr().err


@pytest.mark.parametrize('form', ['literal', 'file'])
def test_a_configuration_counts_more_than_what_shapes_tell(form: str, tmp_path: Path, capsys):
    torch.save(official('mambair')[1], tmp_path / 'm.pth')
    config = {'embed_dim': 32, 'depths': [2, 2], 'd_state': 4, 'mlp_ratio': 1.2, 'upscale': 2,
              'upsampler': 'pixelshuffledirect', 'img_range': 255.}
    (tmp_path / 'c.json').write_text(json.dumps(config))
    given = json.dumps(config) if form == 'literal' else tmp_path / 'c.json'
    assert run(tmp_path / 'm.pth', '-o', tmp_path / 'o.safetensors', '--config', given) == 0
    assert 'mambair_pico(img_range=255.0)' in capsys.readouterr().out
    assert json.loads(read_metadata(tmp_path / 'o.safetensors')['config'])['model_args'] == {'img_range': 255.}


def broken(weights: Path, change) -> Path:
    content = torch.load(weights, weights_only=True)
    change(content['model'])
    torch.save(content, weights)
    return weights


@pytest.mark.parametrize(('change', 'line'), [
    (lambda sd: sd.pop('layers.1.blocks.0.norm2.weight'), 'missing     1: layers.1.blocks.0.norm2.weight'),
    (lambda sd: sd.update({'extra.weight': torch.zeros(2)}), 'unexpected  1: extra.weight'),
    (lambda sd: sd.update({'layers.1.blocks.0.norm2.weight': torch.zeros(2)}),
     'mis-shaped  1: layers.1.blocks.0.norm2.weight is (2,), expected (32,)'),
    (lambda sd: [sd.pop(key) for key in list(sd) if key.startswith('layers.2.blocks.1.')],
     'missing     ')])
def test_what_does_not_fit_is_listed_and_nothing_is_written(change, line: str, weights: Path, tmp_path: Path, capsys):
    out = tmp_path / 'o.safetensors'
    code = run(broken(weights, change), '-o', out)
    captured = capsys.readouterr()
    if line.strip() == 'missing':  # a whole block less is a smaller model
        assert code == 0 and 'depths=[1, 1, 1, 1]' in captured.out
        return
    assert code == 1 and line in captured.out and not out.exists()
    assert f'error: {weights} does not fit, so nothing was written' in captured.err


def test_long_lists_are_cut_unless_asked_for(weights: Path, tmp_path: Path, capsys):
    broken(weights, lambda sd: sd.update({f'extra.{i}': torch.zeros(1) for i in range(15)}))
    run(weights, '-o', tmp_path / 'o.safetensors')
    assert 'extra.9 and 5 more (--verbose lists them)' in capsys.readouterr().out
    run(weights, '-o', tmp_path / 'o.safetensors', '--verbose')
    assert 'extra.14' in capsys.readouterr().out


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(('make', 'words', 'message'), [
    (lambda folder, good: folder / 'gone.pth', [], 'There is no file'),
    (lambda folder, good: folder, [], 'is a folder'),
    (lambda folder, good: 'vmamba_tinny', [], "Unknown weights 'vmamba_tinny'. Did you mean 'vmamba_tiny'"),
    (lambda folder, good: save(folder / 'x.pth', {'a.b': torch.zeros(2)}), [], 'keys of no known family; the first of'),
    (lambda folder, good: save(folder / 'x.pth', {'lr': 1}), [], 'holds no tensors. It holds: lr'),
    (lambda folder, good: good, ['--family', 'vim'], 'All its keys fit vmamba'),
    (lambda folder, good: good, ['--family', 'vmambas'], "Unknown family 'vmambas'. Did you mean 'vmamba'"),
    (lambda folder, good: good, ['--name', 'vim_pico'], "'vim_pico' is no model of the family vmamba"),
    (lambda folder, good: good, ['--backbone'], 'no keys that begin with "backbone."'),
    (lambda folder, good: good, ['--config', '{'], 'this is no JSON'),
    (lambda folder, good: good, ['--config', '{"depths": [1, 2, 3'], 'this is no JSON'),
    (lambda folder, good: good, ['--to-official'], 'in the layout of the authors of vmamba already'),
    (lambda folder, good: save(folder / 'x.pth', official('vmamba')[0].state_dict()), [],
     'is in our layout already (vmamba)')])
def test_mistakes_are_one_line(make, words: list[str], message: str, weights: Path, tmp_path: Path, capsys):
    assert run(make(tmp_path, weights), '-o', tmp_path / 'o.safetensors', *words) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error
    assert not (tmp_path / 'o.safetensors').exists()


def test_damaged_files_and_bad_targets_are_told(weights: Path, tmp_path: Path, capsys):
    (tmp_path / 'cut.pth').write_bytes(weights.read_bytes()[:5000])
    assert run(tmp_path / 'cut.pth', '-o', tmp_path / 'o.safetensors') == 1
    assert 'cut off, damaged or not a checkpoint' in capsys.readouterr().err
    assert run(weights, '-o', tmp_path / 'none' / 'o.safetensors') == 1
    assert 'there is no folder' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(weights, '-o', tmp_path / 'o.pth')
    with pytest.raises(SystemExit):
        run(weights, '-o', tmp_path / 'o.pth', '--to-official', '--family', 'vmamba')


def test_a_full_disk_leaves_nothing_behind(weights: Path, tmp_path: Path, monkeypatch, capsys):
    def full(handle: int) -> None:
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('visionssm.checkpoints.load.os.fsync', full)
    before = set(tmp_path.iterdir())
    assert run(weights, '-o', tmp_path / 'o.safetensors') == 1
    assert 'No space left' in capsys.readouterr().err and set(tmp_path.iterdir()) == before


def test_of_a_detector_the_backbone_is_taken_when_asked_for(tmp_path: Path, capsys):
    torch.manual_seed(0)
    dense = visionssm.create_model('vmamba_pico', num_classes=0).dense()
    backbone = visionssm.to_official('vmamba', dense)
    content = {**{f'backbone.{key}': value for key, value in backbone.items()}, 'neck.fpn.weight': torch.zeros(2),
               'bbox_head.fc.weight': torch.zeros(2)}
    path, out = save(tmp_path / 'det.pth', {'state_dict': content, 'meta': {}}), tmp_path / 'o.safetensors'
    assert run(path, '-o', out) == 1
    assert 'and 2 of bbox_head, neck. --backbone converts' in capsys.readouterr().err
    assert run(path, '-o', out, '--backbone') == 0
    text = capsys.readouterr().out
    assert 'a backbone without classifier' in text and 'not of the backbone): neck.fpn.weight' in text
    assert same(load_state_dict(out), dense.state_dict())
    assert same(dict(convert_back(read_source(out)).state_dict), backbone)
    module = pytest.importorskip('visionssm.openmmlab.backbone')
    built = module.Backbone('vmamba_pico', init_cfg={'type': 'Pretrained', 'checkpoint': str(out)})
    built.init_weights()
    assert same(built.model.state_dict(), dense.state_dict())


def test_a_name_of_the_catalogue_is_fetched_and_its_licence_noted(weights: Path, tmp_path: Path, server, add_catalogue):
    server.files['v.pth'] = weights.read_bytes()
    add_catalogue('vmamba', 'weights:\n- {name: vmamba_pico.x, file: v.pth, keys: k, metric: {top1: 50.0}, sources: '
                            f'["{server.url("v.pth")}"]}}\n')
    assert run('vmamba_pico.x', '-o', tmp_path / 'o.safetensors') == 0
    notes = json.loads(read_metadata(tmp_path / 'o.safetensors')['notes'])
    assert (notes['weights'], notes['licence'], notes['metrics']) == ('vmamba_pico.x', 'mit', {'top1': 50.})


def test_prediction_reads_the_file(weights: Path, tmp_path: Path):
    facts = pytest.importorskip('visionssm.openmmlab.facts')
    run(weights, '-o', tmp_path / 'o.safetensors')
    found = facts.describe_checkpoint(str(tmp_path / 'o.safetensors'))
    assert found.name == 'vmamba_pico' and found.arguments['num_classes'] == 7
    convert(Source(tmp_path / 'm.pth', 'hash', official('mambair')[1])).save(tmp_path / 'm.safetensors')
    assert facts.describe_restorer(str(tmp_path / 'm.safetensors')).name == 'mambair_pico'


def nest(root: nn.Module, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """Put tensors into modules as their names say."""
    for key, value in state_dict.items():
        *path, leaf = key.split('.')
        module = root
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        module.register_buffer(leaf, value)
    return root


def test_pickled_models_of_ultralytics_bring_their_classes(tmp_path: Path, monkeypatch):
    model, state_dict = official('mamba_yolo')
    kind = type('DetectionModel', (nn.Module,), {'__module__': 'ultralytics.nn.tasks'})
    for name in ('ultralytics', 'ultralytics.nn', 'ultralytics.nn.tasks'):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules['ultralytics.nn.tasks'].DetectionModel = kind
    pickled = nest(kind(), state_dict)
    pickled.names = {i: f'thing {i}' for i in range(80)}
    path = save(tmp_path / 'best.pt', {'model': pickled, 'ema': None, 'epoch': -1})
    assert run(path, '-o', tmp_path / 'o.safetensors') == 0
    assert same(load_state_dict(tmp_path / 'o.safetensors'), model.state_dict())
    config = json.loads(read_metadata(tmp_path / 'o.safetensors')['config'])
    assert (config['task'], config['classes'][79]) == ('detection', 'thing 79')


@pytest.mark.parametrize('header', [{'config': '{'}, {'config': '3'}, {'official': '{"family": "vmamba"}'}])
def test_a_damaged_header_is_told(header: dict[str, str], tmp_path: Path):
    path = save_safetensors(official('vmamba')[0].state_dict(), tmp_path / 'x.safetensors', header)
    with pytest.raises(CheckpointError, match='header of .* is damaged'):
        convert_back(read_source(path))
