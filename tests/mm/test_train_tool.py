"""tools/train.py end to end, its options, and what it says about a config that is wrong."""
import logging
from pathlib import Path

import pytest
from mmengine.config import Config

from visionssm.openmmlab.check import ConfigError, check_config
from visionssm.openmmlab.cli import train, train_config
from visionssm.openmmlab.runner import VisionRunner

ONE_EPOCH = dict(by_epoch=True, max_epochs=1)


@pytest.fixture
def on_disk(toy_config, tmp_path):
    """A function that writes the toy config and returns the path."""

    def write(**overrides):
        cfg = toy_config(**overrides)
        path = tmp_path / 'toy.py'
        cfg.dump(str(path))
        return str(path)

    return write


def options(*argv):
    return train_config(train.parse(argv))


def test_a_run_ends_with_its_accuracy_and_leaves_logs_and_weights(toy_config, run_tool, tmp_path):
    cfg = toy_config('run', train_cfg=ONE_EPOCH, log_level='INFO', visualizer=dict(
        type='Visualizer', vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]))
    cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_best='accuracy/top1', interval=1),
                             logger=dict(type='LoggerHook', interval=2))
    done = run_tool(cfg)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith('top-1: ')
    assert 0 <= float(last.removeprefix('top-1: ')) <= 100
    assert 'Epoch(train) [1][2/8]' in done.stdout + done.stderr
    names = {path.name for path in (tmp_path / 'run').rglob('*')}
    assert {'epoch_1.pth', 'model.safetensors', 'config.json', 'curves.png', 'scalars.json'} <= names
    assert any(name.startswith('events.out.tfevents') for name in names)
    assert '\r' not in done.stderr


def test_the_work_directory_is_named_after_the_config(on_disk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = on_disk(work_dir=None)
    assert options(path).work_dir == 'work_dirs/toy'
    assert options(path, '--work-dir', 'elsewhere').work_dir == 'elsewhere'


def test_options_override_the_config(on_disk):
    cfg = options(on_disk(), '--cfg-options', 'train_cfg.max_epochs=7', 'model.model.num_classes=3', '--seed', '11')
    assert (cfg.train_cfg.max_epochs, cfg.model.model.num_classes, cfg.randomness.seed) == (7, 3, 11)


@pytest.mark.parametrize(('argv', 'dtype'), [(['--amp'], 'bfloat16'), (['--amp', 'fp16'], 'float16')])
def test_amp_chooses_the_wrapper(on_disk, argv, dtype):
    cfg = options(on_disk(), *argv)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ('AmpOptimWrapper', dtype)


@pytest.mark.parametrize(('argv', 'expected'), [([], (None, None)), (['--resume'], (True, None)),
                                                (['--resume', 'a.pth'], (True, 'a.pth'))],
                         ids=['not', 'newest', 'path'])
def test_resume_takes_a_path_or_the_newest(on_disk, argv, expected):
    cfg = options(on_disk(), *argv)
    assert (cfg.get('resume'), cfg.get('load_from')) == expected


def test_the_learning_rate_scales_with_the_batch(on_disk, train_toy):
    cfg = options(on_disk(auto_scale_lr=dict(base_batch_size=32), param_scheduler=None, train_cfg=ONE_EPOCH),
                  '--auto-scale-lr')
    assert train_toy(cfg).optim_wrapper.get_lr()['lr'][0] == pytest.approx(2e-3 * 8 / 32)


def test_scaling_the_rate_needs_the_batch_it_is_meant_for(on_disk):
    with pytest.raises(ConfigError, match='base_batch_size'):
        options(on_disk(), '--auto-scale-lr')


@pytest.mark.parametrize(('option', 'wrong', 'right'), [
    ('optim_wraper.optimizer.lr=1', 'optim_wraper', 'optim_wrapper'),
    ('model.modle.name=x', 'modle', 'model'),
    ('train_dataloader.batchsize=3', 'batchsize', 'batch_size'),
    ('train_dataloader.dataset.transfrom=x', 'transfrom', 'transform'),
    ('train_dataloader.sampler.shufle=x', 'shufle', 'shuffle'),
    ('train_cfg.max_epoch=3', 'max_epoch', 'max_epochs'),
    ('optim_wrapper.clip_gard.max_norm=1', 'clip_gard', 'clip_grad'),
    ('optim_wrapper.clip_grad.max_nrom=1', 'max_nrom', 'max_norm'),
    ('optim_wrapper.optimizer.weight_decey=1', 'weight_decey', 'weight_decay'),
    ('optim_wrapper.optimizer.type=AdamW2', 'AdamW2', 'AdamW'),
    ('default_hooks.chekpoint.interval=1', 'chekpoint', 'checkpoint'),
    ('param_scheduler.0.T_maks=1', 'T_maks', 'T_max'),
    ('randomness.sed=1', 'sed', 'seed'),
    ('val_evaluator.topc=1', 'topc', 'topk'),
    ('val_evaluator.type=Acuracy', 'Acuracy', 'Accuracy'),
    ('model.type=ImageClasifier', 'ImageClasifier', 'ImageClassifier'),
], ids=lambda value: value.partition('=')[0] if '=' in value else '')
def test_a_misspelt_key_is_named_with_the_nearest_one(on_disk, option, wrong, right):
    with pytest.raises(ValueError, match=f"'{wrong}'.*'{right}'"):
        options(on_disk(), '--cfg-options', option)


@pytest.mark.parametrize('option', ['max_epochs=1', 'maxx_epochs=1', 'data_root=/data'])
def test_an_override_that_comes_too_late_is_refused(on_disk, option):
    with pytest.raises(ConfigError, match=f'nothing reads the key {option.partition("=")[0]!r}.*train_cfg.max_epochs'):
        options(on_disk(), '--cfg-options', option)


def test_a_learning_rate_that_is_no_number_is_refused(on_disk):
    with pytest.raises(ConfigError, match="optimizer.lr must be a number, got 'fast'"):
        options(on_disk(), '--cfg-options', 'optim_wrapper.optimizer.lr=fast')


def test_a_number_of_epochs_that_is_none_is_refused(on_disk):
    with pytest.raises(ConfigError, match="train_cfg.val_interval must be a whole number, got 'often'"):
        options(on_disk(), '--cfg-options', 'train_cfg.val_interval=often')


def test_an_override_without_a_value_is_refused(on_disk, capsys):
    with pytest.raises(SystemExit):
        options(on_disk(), '--cfg-options', 'train_cfg')
    assert "takes KEY=VALUE, got 'train_cfg'" in capsys.readouterr().err


def test_a_config_that_is_no_python_is_named(tmp_path):
    (tmp_path / 'broken.py').write_text('model = dict(\n')
    with pytest.raises(ConfigError, match='broken.py is no Python: .* was never closed'):
        options(str(tmp_path / 'broken.py'))


def test_variables_of_a_config_are_no_mistake(toy_config):
    check_config(toy_config(my_epochs=3, data_root='somewhere', img_size=8))


def test_a_wrong_config_gives_one_line_and_no_traceback(on_disk, capsys):
    assert train([on_disk(), '--cfg-options', 'model.model.name=tset_vit']) == 1
    error = capsys.readouterr().err
    assert 'Traceback' not in error
    lines = [line for line in error.splitlines() if "Unknown model 'tset_vit'" in line]
    assert len(lines) == 1
    assert "'test_vit'" in lines[0]


def test_an_interrupt_is_one_line_that_says_how_to_go_on(on_disk, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(VisionRunner, 'train', interrupt)
    assert train([on_disk()]) == 130
    assert '--resume' in capsys.readouterr().err


def test_an_unknown_config_names_the_nearest():
    with pytest.raises(FileNotFoundError, match='nearest'):
        options('classification/vim-pico_fashion-mnits.py')


def test_a_config_without_data_says_what_is_missing(toy_config, tmp_path):
    cfg = Config({key: value for key, value in toy_config().items() if key != 'train_dataloader'})
    path = tmp_path / 'toy.py'
    cfg.dump(str(path))
    with pytest.raises(ConfigError, match="lacks the key 'train_dataloader'"):
        options(str(path))


def test_a_progress_bar_shows_on_a_terminal_only(train_toy, monkeypatch, capsys):
    train_toy(train_cfg=ONE_EPOCH)
    assert 'step/s' not in capsys.readouterr().err
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    train_toy(train_cfg=ONE_EPOCH)
    bar = capsys.readouterr().err
    assert '8/8' in bar
    assert 'epoch' in bar or 'step/s' in bar


def test_every_warning_reaches_the_log_with_its_own_values(toy_config, tmp_path):
    runner = VisionRunner.from_cfg(toy_config())
    for name in ('first.jpg', 'second.jpg', 'second.jpg'):
        logging.getLogger('visionssm').warning('unreadable: %s', name)
    text = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert [text.count(f'unreadable: {name}') for name in ('first.jpg', 'second.jpg')] == [1, 1]


def test_what_the_package_notes_reaches_the_log(toy_config):
    runner = VisionRunner.from_cfg(toy_config(log_level='INFO'))
    logging.getLogger('visionssm').info('4 pictures found')
    assert '4 pictures found' in next(Path(runner.log_dir).glob('*.log')).read_text()


def test_data_with_more_classes_than_the_model_is_refused_before_the_first_step(toy_config, train_toy):
    cfg = toy_config()
    cfg.model.model.num_classes = 3
    with pytest.raises(ValueError, match=r'has 4 classes \(quadrant 0.* and the model 3; set .*num_classes=4'):
        train_toy(cfg)


def test_splits_whose_labels_mean_different_classes_are_refused(toy_config, train_toy):
    cfg = toy_config()
    cfg.val_dataloader.dataset = dict(type='FashionMNIST', split='test', source='embedded')
    with pytest.raises(ValueError, match="label 0 is 'T-shirt/top' in the validation data and 'quadrant 0' in the"):
        train_toy(cfg)
