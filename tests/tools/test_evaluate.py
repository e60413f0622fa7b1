"""tools/test.py: tables and JSON, ImageNet's class order from a folder of JPEGs, every kind of checkpoint."""
import json
import shutil
import struct
import uuid

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image

from visionssm.checkpoints import save_safetensors
from visionssm.openmmlab.checkpoint import export_best
from visionssm.openmmlab.classifier import ImageClassifier
from visionssm.openmmlab.datasets import IDX_FILES, load_fashion_mnist
from visionssm.openmmlab.evaluate import evaluate, format_table, model_config, test_config

test_config.__test__ = False
TENCH, GOLDFISH, TISSUE = 'n01440764', 'n01443537', 'n15075141'


@pytest.fixture
def imagenet(tmp_path):
    """A few JPEGs below <root>/val/<synset>, as ImageNet is laid out."""
    rng = np.random.default_rng(0)
    for synset in (TENCH, TISSUE, GOLDFISH):
        folder = tmp_path / 'imagenet' / 'val' / synset
        folder.mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'ILSVRC2012_val_{number:08d}.JPEG')
    return tmp_path / 'imagenet'


@pytest.fixture
def always_tissue(tmp_path):
    """Weights of a 1000-class model that always answers the last class, then goldfish."""
    model = timm.create_model('test_vit')
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    model.head.bias.data[999], model.head.bias.data[1] = 5.0, 3.0
    return str(save_safetensors(model.state_dict(), tmp_path / 'tissue.safetensors'))


@pytest.fixture
def config(tmp_path):
    """A config of 60 pictures of the embedded subset with timm's smallest ViT."""
    images, labels, _ = load_fashion_mnist('test', 'embedded')
    root = tmp_path / 'fashion'
    root.mkdir()
    for name, magic, data in zip(IDX_FILES['test'], (0x803, 0x801), (images[:60], labels[:60]), strict=True):
        (root / name).write_bytes(struct.pack(f'>{1 + data.ndim}I', magic, *data.shape) + data.tobytes())
    path = tmp_path / f'tiny_{uuid.uuid4().hex}.py'
    path.write_text(f"""
default_scope = 'visionssm'
work_dir = {str(tmp_path / 'run')!r}
model = dict(type='ImageClassifier', model=dict(name='test_vit', img_size=28, patch_size=7, in_chans=1,
             num_classes=10), data_preprocessor=dict(mean=[0.3], std=[0.35]))
test_dataloader = dict(batch_size=30, num_workers=0, sampler=dict(type='SeededSampler', shuffle=False),
    collate_fn=dict(type='collate_images'), dataset=dict(type='FashionMNIST', split='test', root={str(root)!r}))
test_evaluator = dict(type='Accuracy')
test_cfg = dict()
custom_hooks = [dict(type='EMAHook', decay=0.9)]
log_level = 'WARNING'
""")
    return path


def results_of(folder):
    return json.loads((folder / 'accuracy.json').read_text())


def test_a_config_and_a_checkpoint_give_a_table_and_json(config, weights, tmp_path, capsys):
    assert evaluate([str(config), weights]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = results_of(tmp_path / 'run' / 'test')
    assert lines[-1] == f'top-1: {results["top1"]:.2f}'
    assert any(line.split()[:2] == ['Ankle', 'boot'] for line in lines)
    assert results['count'] == 60 and len(results['classes']) == 10 and results['checkpoint'] == weights
    assert np.trace(results['confusion']) == pytest.approx(0.6 * results['top1'], abs=1e-3)
    assert {'confusion_matrix.png', 'predictions.png'} <= {p.name for p in (tmp_path / 'run' / 'test').iterdir()}
    assert evaluate([str(config), weights, '--json']) == 0
    assert json.loads(capsys.readouterr().out) == results


@pytest.fixture
def expected_confusion(tiny_model):
    """What the model says about the config's pictures, without any of the engine."""
    images, labels, _ = load_fashion_mnist('test', 'embedded')
    with torch.inference_mode():
        logits = tiny_model((torch.from_numpy(images[:60])[:, None].float() / 255 - 0.3) / 0.35)
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (labels[:60], logits.argmax(-1).numpy()), 1)
    return confusion.tolist()


def test_results_go_where_the_options_say(config, weights, tmp_path, expected_confusion):
    evaluate([str(config), weights, '--out', str(tmp_path / 'r.json')])
    assert json.loads((tmp_path / 'r.json').read_text())['confusion'] == expected_confusion


def test_imagenet_folders_count_in_the_official_order(imagenet, always_tissue, tmp_path, capsys):
    command = ['--model', 'test_vit', '--data', str(imagenet), always_tissue, '--work-dir', str(tmp_path / 'out')]
    assert evaluate(command) == 0
    results = results_of(tmp_path / 'out')
    counts = {row['class']: (row['count'], row['top1'], row['top5']) for row in results['classes'] if row['count']}
    assert counts == {TENCH: (3, 0.0, 100.0), GOLDFISH: (3, 0.0, 100.0), TISSUE: (3, 100.0, 100.0)}
    assert capsys.readouterr().out.splitlines()[-1] == 'top-1: 33.33'


def test_an_unreadable_test_image_is_left_out_and_counted(imagenet, always_tissue, tmp_path):
    damaged = sorted((imagenet / 'val' / TISSUE).iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:300])
    evaluate(['--model', 'test_vit', '--data', str(imagenet), always_tissue, '--work-dir', str(tmp_path / 'out')])
    results = results_of(tmp_path / 'out')
    assert results['count'] == 8 and results['unreadable'] == 1 and results['top1'] == pytest.approx(25)


def test_the_tool_itself_runs(run_python, imagenet, always_tissue, tmp_path):
    done = run_python('tools/test.py', '--model', 'test_vit', '--data', str(imagenet), always_tissue,
                      '--work-dir', str(tmp_path / 'out'), '--amp')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'top-1: 33.33'


@pytest.fixture
def grey_folders(tmp_path):
    """Four small grey pictures of three classes each below <root>/val/<class>, and the pixels by class."""
    rng = np.random.default_rng(3)
    pictures = {name: rng.integers(0, 255, (4, 28, 28), dtype=np.uint8) for name in ('zebra', 'ant', 'kind 0')}
    for name, pixels in pictures.items():
        folder = tmp_path / 'data' / 'val' / name
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f'{number}.png')
    return tmp_path / 'data', pictures


def test_a_model_by_name_has_the_classes_of_its_checkpoint(tiny_model, grey_folders, tmp_path):
    root, pictures = grey_folders
    classes = ('zebra', 'ant', *(f'kind {number}' for number in range(8)))
    model = {'name': 'test_vit', 'img_size': 28, 'patch_size': 7, 'in_chans': 1, 'num_classes': 10,
             'pretrained_cfg_overlay': {'crop_pct': 1.0}}
    classifier = ImageClassifier(model, data_preprocessor={'mean': [0.3], 'std': [0.4]})
    classifier.model.load_state_dict(tiny_model.state_dict())
    path = str(export_best(classifier, classifier.state_dict(), tmp_path / 'best', classes))
    assert evaluate(['--model', 'test_vit', '--data', str(root), path, '--work-dir', str(tmp_path / 'out')]) == 0
    expected = np.zeros((10, 10), dtype=int)
    with torch.inference_mode():
        for name, pixels in pictures.items():
            logits = tiny_model((torch.from_numpy(pixels)[:, None].float() / 255 - 0.3) / 0.4)
            np.add.at(expected, (classes.index(name), logits.argmax(-1).numpy()), 1)
    assert results_of(tmp_path / 'out')['confusion'] == expected.tolist()


def test_bare_weights_by_name_say_their_classes_and_channels(weights, grey_folders):
    cfg = test_config(evaluate.parse(['--model', 'test_vit', '--data', str(grey_folders[0]), weights]))
    assert (cfg.model.model.num_classes, cfg.model.model.in_chans) == (10, 1)
    assert (cfg.test_dataloader.dataset.mode, cfg.test_dataloader.dataset.class_map) == ('L', None)


@pytest.mark.parametrize('kind', ['timm', 'runner', 'official', 'scheme'])
def test_every_kind_of_checkpoint_is_evaluated(config, weights, tiny_model, tmp_path, kind, expected_confusion):
    state = tiny_model.state_dict()
    path = tmp_path / f'{kind}.pth'
    if kind == 'timm':
        torch.save(state, path)
    elif kind == 'official':
        torch.save({'model': state, 'epoch': 3}, path)
    elif kind == 'runner':
        torch.save({'meta': {'mmengine_version': '0'}, 'state_dict': {f'model.{k}': v for k, v in state.items()}}, path)
    address = f'visionssm://{weights}' if kind == 'scheme' else str(path)
    assert evaluate([str(config), address, '--work-dir', str(tmp_path / 'out')]) == 0
    assert results_of(tmp_path / 'out')['confusion'] == expected_confusion


@pytest.mark.parametrize('case,problem', [
    ('no-checkpoint', 'nothing.pth'), ('empty', 'empty'), ('half', 'half'), ('other-model', '36 unexpected'),
    ('key', 'nothing reads'), ('no-images', 'no images in the data folder')])
def test_wrong_input_ends_with_one_clear_error(config, weights, imagenet, tmp_path, case, problem, capsys):
    command = [str(config), weights]
    if case == 'no-checkpoint':
        command[1] = str(tmp_path / 'nothing.pth')
    elif case == 'empty':
        command[1] = str(tmp_path / 'empty.safetensors')
        (tmp_path / 'empty.safetensors').touch()
    elif case == 'half':
        with open(weights, 'rb') as file:
            (tmp_path / 'half.safetensors').write_bytes(file.read(5000))
        command[1] = str(tmp_path / 'half.safetensors')
    elif case == 'other-model':
        command += ['--cfg-options', 'model.model.depth=3']
    elif case == 'key':
        command += ['--cfg-options', 'test_dataloadr.batch_size=3']
    else:
        shutil.rmtree(imagenet / 'val' / TENCH), shutil.rmtree(imagenet / 'val' / TISSUE)
        shutil.rmtree(imagenet / 'val' / GOLDFISH)
        command = ['--model', 'test_vit', '--data', str(imagenet), '--work-dir', str(tmp_path / 'out'), weights]
    assert evaluate(command) == 1
    errors = capsys.readouterr().err.partition('error: ')[2]
    assert 'error: ' not in errors and problem in errors.lower()
    assert not list(tmp_path.rglob('accuracy.json'))


def test_an_unknown_model_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match='test_vit'):
        model_config('test_vitt', str(tmp_path))


def test_a_model_by_name_needs_data(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(['--model', 'test_vit'])
    assert '--data' in capsys.readouterr().err


def test_options_replace_parts_of_the_config(config, weights, tmp_path):
    args = evaluate.parse([str(config), weights, '--batch-size', '7', '--data', str(tmp_path), '--work-dir', 'here'])
    cfg = test_config(args)
    assert (cfg.test_dataloader.batch_size, cfg.test_dataloader.dataset.root) == (7, str(tmp_path))
    assert cfg.work_dir == 'here' and cfg.load_from == weights
    assert [hook['type'] for hook in cfg.custom_hooks] == ['VisualReportHook']


def test_the_preprocessing_is_the_models_own(tmp_path):
    cfg = model_config('vim_tiny', str(tmp_path))
    transform = cfg.test_dataloader.dataset.transform
    assert (transform.crop_pct, transform.interpolation, tuple(transform.input_size)) == (0.875, 'bicubic',
                                                                                          (3, 224, 224))
    assert isinstance(cfg, Config) and cfg.test_dataloader.dataset.class_map == 'imagenet-1k'


def test_long_tables_list_the_worst_classes():
    rows = [{'class': f'c{i}', 'count': 2, 'top1': float(i % 60)} for i in range(60)]
    table = format_table({'count': 120, 'top1': 29.5, 'classes': rows, 'confusion': []}).splitlines()
    assert '10 worst of 60' in table[0] and table[3].startswith('c0') and len(table) == 15


def test_an_interrupt_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr('visionssm.openmmlab.evaluate.run', lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert evaluate(['config.py', 'weights.pth']) == 130
    assert capsys.readouterr().err.strip() == 'stopped'
