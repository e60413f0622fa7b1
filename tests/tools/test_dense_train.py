"""tools/train.py on configs of MMDetection and MMSegmentation: runs, resumption, exports, and what it refuses."""
import importlib.util
import shutil
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('mmseg', reason='needs the extra [seg]')

import torch  # noqa: E402

from visionssm.openmmlab.cli import train, train_config  # noqa: E402
from visionssm.openmmlab.facts import describe_dense  # noqa: E402
from visionssm.openmmlab.scopes import find_any_config, headlines  # noqa: E402


def state(path):
    return torch.load(path, weights_only=True)['state_dict']


def assert_same(one, two):
    one, two = state(one), state(two)
    assert one.keys() == two.keys()
    assert not [key for key in one if not torch.equal(one[key], two[key])]


def error_of(capsys, cfg, on_disk, *options):
    assert train([on_disk(cfg), *options]) == 1
    message = capsys.readouterr().err.partition('error: ')[2]
    assert message and 'Traceback' not in message and 'error: ' not in message
    return message


@pytest.fixture(scope='module')
def detector(det_config, on_disk):
    """Config and work dir of a detector that was trained for two epochs of three steps."""
    cfg = det_config()
    assert train([on_disk(cfg), '--debug']) == 0
    return cfg, Path(cfg.work_dir)


def test_a_detector_leaves_curves_logs_and_an_export_that_rebuilds_it(detector):
    cfg, folder = detector
    names = {path.name for path in folder.rglob('*')}
    assert {'iter_6.pth', 'curves.png', 'scalars.json', 'model.safetensors', 'config.json'} <= names
    facts = describe_dense(str(folder / 'best' / 'model.safetensors'))
    assert facts.dataset_meta['classes'] == ['cat', 'dog', 'bird']
    assert facts.cfg.model.bbox_head == cfg.model.bbox_head
    assert facts.cfg.test_dataloader.dataset.pipeline[1].scale == (64, 64)
    assert 'train_dataloader' not in facts.cfg


def test_a_training_checkpoint_of_a_detector_says_what_it_is(detector):
    cfg, folder = detector
    assert describe_dense(str(folder / 'iter_6.pth')).cfg.model.neck == cfg.model.neck


def test_a_detector_resumes_exactly_at_the_end_of_an_epoch(detector, det_config, on_disk, capsys):
    _, folder = detector
    cfg = det_config()
    shutil.copy(folder / 'iter_3.pth', cfg.work_dir)
    assert train([on_disk(cfg), '--resume']) == 0
    assert_same(Path(cfg.work_dir) / 'iter_6.pth', folder / 'iter_6.pth')
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith('bbox AP: ') and 0 <= float(last.removeprefix('bbox AP: ')) <= 100


def test_the_middle_of_an_epoch_needs_a_sampler_that_can_skip(detector, det_config, on_disk, capsys):
    message = error_of(capsys, det_config(), on_disk, '--resume', str(detector[1] / 'iter_2.pth'))
    assert 'the sampler DefaultSampler cannot skip' in message and 'SeededSampler' in message


def test_an_averaged_detector_with_the_seeded_sampler_resumes_in_mid_epoch(det_config, on_disk):
    def run(*options):
        cfg = det_config(val_dataloader=None, val_cfg=None, val_evaluator=None,
                         custom_hooks=[dict(type='visionssm.EMAHook', decay=0.9)])
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
        cfg.train_dataloader.sampler = dict(type='visionssm.SeededSampler')
        assert train([on_disk(cfg), *options]) == 0
        return Path(cfg.work_dir)

    whole = run()
    assert_same(run('--resume', str(whole / 'iter_4.pth')) / 'iter_6.pth', whole / 'iter_6.pth')


def test_a_segmentor_resumes_exactly_and_prints_its_score(seg_config, on_disk, capsys):
    cfg = seg_config()
    assert train([on_disk(cfg)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith('mIoU: ') and 0 <= float(last.removeprefix('mIoU: ')) <= 100
    again = seg_config()
    assert train([on_disk(again), '--resume', str(Path(cfg.work_dir) / 'iter_3.pth')]) == 0
    assert_same(Path(again.work_dir) / 'iter_6.pth', Path(cfg.work_dir) / 'iter_6.pth')
    assert (Path(cfg.work_dir) / 'curves.png').is_file()


def test_a_loss_that_is_no_number_stops_a_detector(det_config, on_disk, capsys):
    cfg = det_config(train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1))
    cfg.optim_wrapper.optimizer.lr = 1e30
    message = error_of(capsys, cfg, on_disk)
    assert 'loss_' in message and 'at step' in message and 'lower the learning rate' in message


def test_a_head_with_other_classes_than_the_data_is_refused(det_config, seg_config, on_disk, capsys):
    cfg = det_config()
    cfg.model.bbox_head.num_classes = 80
    message = error_of(capsys, cfg, on_disk)
    assert 'the data have 3 classes (cat, dog, bird) and model.bbox_head has 80' in message
    assert 'model.bbox_head.num_classes=3' in message
    cfg = seg_config()
    cfg.model.decode_head.num_classes = 150
    assert 'model.decode_head has 150' in error_of(capsys, cfg, on_disk)


def test_weights_of_another_model_list_what_differs(detector, seg_config, on_disk, capsys):
    cfg = seg_config(load_from=str(detector[1] / 'iter_6.pth'))
    message = error_of(capsys, cfg, on_disk)
    assert 'does not fit EncoderDecoder' in message and 'missing: ' in message and 'decode_head' in message


def test_weights_of_other_classes_start_a_training(detector, det_config, on_disk, capsys):
    cfg = det_config(load_from=str(detector[1] / 'iter_6.pth'), train_cfg=dict(by_epoch=True, max_epochs=1))
    cfg.model.bbox_head.num_classes = 2
    for name in ('train_dataloader', 'val_dataloader'):
        cfg[name].dataset.metainfo = dict(classes=('cat', 'dog'))
    assert train([on_disk(cfg)]) == 0
    log = next(Path(cfg.work_dir).rglob('*.log')).read_text()
    assert 'has another number of classes; initial weights stay in bbox_head.retina_cls.weight' in log


@pytest.mark.parametrize(('option', 'wrong', 'right'), [
    ('model.bbox_head.num_clases=3', 'num_clases', 'num_classes'),
    ('model.neck.start_levl=1', 'start_levl', 'start_level'),
    ('model.backbone.type=ResNett', 'ResNett', 'ResNet'),
    ('train_dataloader.dataset.anno_file=x', 'anno_file', 'ann_file'),
    ('train_dataloader.dataset.pipeline.3.probb=1', 'probb', 'prob'),
    ('train_dataloader.dataset.pipeline.3.type=RandomFlipp', 'RandomFlipp', 'RandomFlip'),
    ('train_cfg.max_epoch=3', 'max_epoch', 'max_epochs'),
    ('val_evaluator.metrics=x', 'metrics', 'metric'),
    ('val_evaluator.type=CocoMetrik', 'CocoMetrik', 'CocoMetric'),
    ('default_hooks.visualisation.type=x', 'visualisation', 'visualization'),
], ids=lambda value: value.partition('=')[0] if '=' in value else '')
def test_a_misspelt_key_of_a_detector_is_named_with_the_nearest(det_config, on_disk, option, wrong, right):
    with pytest.raises(ValueError, match=f"'{wrong}'.*'{right}'"):
        train_config(train.parse([on_disk(det_config()), '--cfg-options', option]))


def test_amp_takes_the_wrapper_that_works_without_a_gpu(det_config, on_disk):
    cfg = train_config(train.parse([on_disk(det_config()), '--amp']))
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ('visionssm.AmpOptimWrapper', 'bfloat16')


@pytest.mark.parametrize('text', ["default_scope = 'mmdet'\nmodel = dict()\n",
                                  "_base_ = 'mmdet::_base_/default_runtime.py'\nmodel = dict()\n",
                                  "custom_imports = dict(imports=['mmdet'], allow_failed_imports=False)\n"],
                         ids=['scope', 'base', 'imports'])
def test_a_missing_package_is_named_with_its_extra(text, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *args: None if name == 'mmdet' else find(name, *args))
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda package: False)
    monkeypatch.setitem(__import__('sys').modules, 'mmdet', None)
    (tmp_path / 'config.py').write_text(text)
    assert train([str(tmp_path / 'config.py')]) == 1
    assert 'mmdet, which is not installed: pip install "visionssm[det]"' in capsys.readouterr().err.replace(
        'mmdet is not', 'mmdet, which is not')


def test_a_config_of_another_package_is_found_by_its_name():
    path = find_any_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    assert path.name == 'retinanet_r50_fpn_1x_coco.py' and path.is_file()
    with pytest.raises(FileNotFoundError, match='retinanet_r50_fpn_1x_coco.py'):
        find_any_config('mmdet::retinanet/retinanet_r51_fpn_1x_coco.py')


def test_a_foreign_scope_is_refused(det_config, on_disk, capsys):
    assert "default_scope is 'mmpose'" in error_of(capsys, det_config(default_scope='mmpose'), on_disk)


def test_the_numbers_that_sum_up_come_in_a_fixed_order():
    assert headlines({'coco/segm_mAP': 0.2, 'coco/bbox_mAP': 0.1, 'loss': 3.0}) == {'bbox AP': 10, 'segm AP': 20}
    assert list(headlines({'DSC': 80.0, 'mIoU': 70.0})) == ['mIoU', 'DSC']


@pytest.fixture
def foreign(coco_tree, tmp_path):
    """MMDetection's own Mask R-CNN with one of our backbones, on the COCO tree, and the options that make it small."""
    path = tmp_path / 'foreign.py'
    path.write_text("_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n"
                    "model = dict(backbone=dict(_delete_=True, type='visionssm.Backbone', name='vmamba_pico'),\n"
                    '             neck=dict(in_channels=[16, 32, 64, 128], out_channels=32))\n')
    small = {f'model.{key}': 32 for key in (
        'rpn_head.in_channels', 'rpn_head.feat_channels', 'roi_head.bbox_head.in_channels',
        'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels',
        'roi_head.bbox_head.fc_out_channels', 'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels')}
    small |= {'model.roi_head.bbox_head.num_classes': 3, 'model.roi_head.mask_head.num_classes': 3,
              'train_dataloader.dataset.pipeline.2.scale': '(64,64)', 'train_cfg.max_epochs': 1,
              'val_evaluator.ann_file': f'{coco_tree}/annotations/instances_val2017.json'}
    for part in ('train', 'val', 'test'):
        small |= {f'{part}_dataloader.{key}': value for key, value in {
            'num_workers': 0, 'persistent_workers': False, 'dataset.data_root': f'{coco_tree}/',
            'dataset.metainfo.classes': '[cat,dog,bird]'}.items()}
    small |= {f'{part}_dataloader.dataset.pipeline.1.scale': '(64,64)' for part in ('val', 'test')}
    return [str(path), '--work-dir', str(tmp_path / 'run'), '--cfg-options',
            *(f'{key}={value}' for key, value in small.items())]


def test_a_foreign_config_with_another_backbone_trains(foreign, capsys):
    assert train(foreign) == 0
    assert [line.partition(':')[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ['bbox AP', 'segm AP']


def test_a_neck_for_other_channels_is_refused(foreign, capsys):
    assert train([*foreign, 'model.neck.in_channels=[256,512,1024,2048]']) == 1
    assert 'model.backbone gives [16, 32, 64, 128]; set model.neck.in_channels=[16' in capsys.readouterr().err
