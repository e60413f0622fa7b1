"""tools/test.py on configs of MMDetection and MMSegmentation, on trees of COCO's and ADE20K's layout."""
import contextlib
import copy
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='needs the extra [det]')
pytest.importorskip('mmseg', reason='needs the extra [seg]')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from PIL import Image  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from visionssm.checkpoints import CheckpointError, load_state_dict, save_safetensors  # noqa: E402
from visionssm.openmmlab.checkpoint import read_training_checkpoint  # noqa: E402
from visionssm.openmmlab.evaluate import evaluate  # noqa: E402
from visionssm.openmmlab.evaluate_dense import format_scores  # noqa: E402
from visionssm.openmmlab.predict import predict  # noqa: E402
from visionssm.utils.paths import find_config  # noqa: E402

KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
FLIPS = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]


def error_of(capsys, *argv):
    assert evaluate(list(argv)) == 1
    message = capsys.readouterr().err.partition('error: ')[2]
    assert message and 'Traceback' not in message and 'error: ' not in message
    return message


def last_lines(capsys, number=1):
    return capsys.readouterr().out.strip().splitlines()[-number:]


def truth_as_predictions(coco_tree, path):
    """COCO results that are almost the ground truth, with some boxes moved."""
    rng = np.random.default_rng(0)
    content = json.loads((coco_tree / 'annotations/instances_val2017.json').read_text())
    rows = [{'image_id': row['image_id'], 'category_id': row['category_id'], 'score': float(rng.uniform(0.3, 1)),
             'bbox': [value + float(rng.uniform(-2, 2)) for value in row['bbox']]} for row in content['annotations']]
    path.write_text(json.dumps(rows))


def official_scores(coco_tree, predictions):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco_tree / 'annotations/instances_val2017.json'))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else None for value in evaluation.stats[:6]]


@pytest.fixture(scope='module')
def tested(det_config, on_disk, export):
    """A detector's config, weights and the results of a test that also drew pictures."""
    cfg = det_config()
    weights, folder = export(cfg), Path(cfg.work_dir)
    assert evaluate([on_disk(cfg), weights, '--out', str(folder / 'out.json'), '--show-dir', str(folder / 'show'),
                     '--score-thr', '0.4', '--batch-size', '3', '--debug']) == 0
    return cfg, weights, folder


def test_results_of_a_detector_are_those_of_pycocotools(tested, coco_tree):
    results = json.loads((tested[2] / 'out.json').read_text())
    names = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
    assert [results['bbox'][name] for name in names] == pytest.approx(
        official_scores(coco_tree, results['predictions']['bbox']))
    assert results['summary']['bbox AP'] == results['bbox']['AP'] > 0
    rows = results['bbox']['classes']
    assert [row['class'] for row in rows] == ['cat', 'dog', 'bird'] and sum(row['count'] for row in rows) == 10
    assert np.mean([row['AP'] for row in rows]) == pytest.approx(results['bbox']['AP'])


def test_scores_far_from_zero_equal_those_of_pycocotools(coco_tree, tmp_path):
    from visionssm.openmmlab.detection.scores import coco_scores, record_coco
    truth_as_predictions(coco_tree, tmp_path / 'predictions.json')
    expected = official_scores(coco_tree, tmp_path / 'predictions.json')
    assert expected[0] > 30
    with contextlib.redirect_stdout(io.StringIO()), record_coco() as recorded:
        from mmdet.evaluation.metrics.coco_metric import COCOeval as Recording
        truth = COCO(str(coco_tree / 'annotations/instances_val2017.json'))
        evaluation = Recording(truth, truth.loadRes(str(tmp_path / 'predictions.json')), 'bbox')
        evaluation.params.maxDets = [100, 300, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = coco_scores(evaluation)
    assert [found[key] for key in list(found)[:6]] == pytest.approx(expected)
    assert recorded['bbox'] == found
    from mmdet.evaluation.metrics import coco_metric
    assert coco_metric.COCOeval is not Recording


def test_pictures_show_truth_and_prediction_side_by_side(tested):
    files = sorted((tested[2] / 'show').iterdir())
    assert [file.name for file in files] == [f'{number:012}.jpg' for number in range(1, 7)]
    assert all(Image.open(file).size == (128, 64) for file in files)


def test_the_faster_evaluator_gives_the_same_scores(tested, det_config, on_disk, coco_tree, tmp_path, capsys):
    pytest.importorskip('faster_coco_eval')
    cfg = copy.deepcopy(tested[0])
    cfg.test_evaluator.type = 'FasterCocoMetric'
    assert evaluate([on_disk(cfg), tested[1], '--out', str(tmp_path / 'out.json')]) == 0
    one, two = (json.loads(path.read_text())['bbox'] for path in (tmp_path / 'out.json', tested[2] / 'out.json'))
    assert [one[key] for key in one if key != 'classes'] == pytest.approx([two[key] for key in one if key != 'classes'])


def test_the_faster_evaluator_names_its_package_where_it_is_missing(tested, on_disk, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    cfg = copy.deepcopy(tested[0])
    cfg.test_evaluator.type = 'FasterCocoMetric'
    assert 'FasterCocoMetric needs a package that is not installed: pip install faster-coco-eval' in error_of(
        capsys, on_disk(cfg), tested[1])


def test_another_root_and_tta_are_options(tested, coco_tree, on_disk, tmp_path, capsys):
    cfg, weights, _ = tested
    shutil.copytree(coco_tree, tmp_path / 'moved')
    cfg = copy.deepcopy(cfg)
    cfg.test_dataloader.dataset.data_root = 'nowhere'
    cfg.test_evaluator.ann_file = 'nowhere/annotations/instances_val2017.json'
    cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20))
    cfg.tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(64, 64), keep_ratio=True)], FLIPS, [dict(type='LoadAnnotations', with_bbox=True)],
        [dict(type='PackDetInputs', meta_keys=KEYS)]])]
    path = on_disk(cfg)
    assert evaluate([path, weights, '--data', str(tmp_path / 'moved'), '--tta', '--out', str(tmp_path / 'o.json')]) == 0
    assert last_lines(capsys)[0].startswith('bbox AP: ')
    assert 'No such file' in error_of(capsys, path, weights)
    assert '--data /nowhere is no folder' in error_of(capsys, path, weights, '--data', '/nowhere')


def test_tta_without_its_sections_is_refused(tested, seg_config, on_disk, capsys):
    assert '--tta needs tta_model and tta_pipeline' in error_of(capsys, on_disk(tested[0]), tested[1], '--tta')
    cfg = seg_config(tta_model=dict(type='SegTTAModel'))
    assert '--tta needs tta_pipeline in the config' in error_of(capsys, on_disk(cfg), tested[1], '--tta')


def test_pictures_of_classifiers_are_refused(weights, tmp_path, capsys):
    message = error_of(capsys, '--model', 'test_vit', '--data', str(tmp_path), weights, '--show-dir', 'x')
    assert '--show-dir is for detection and segmentation' in message


def test_a_checkpoint_of_another_model_lists_what_differs(tested, on_disk, capsys):
    cfg = copy.deepcopy(tested[0])
    cfg.model.neck.out_channels = cfg.model.bbox_head.in_channels = 24
    message = error_of(capsys, on_disk(cfg), tested[1])
    assert 'does not fit RetinaNet' in message and 'mis-shaped: ' in message and 'neck.lateral_convs.0' in message


def test_weights_of_a_backbone_alone_are_no_detector(tested, on_disk, tmp_path, capsys):
    state = {key.removeprefix('backbone.'): value for key, value in load_state_dict(tested[1]).items()
             if key.startswith('backbone.')}
    path = save_safetensors(state, tmp_path / 'backbone.safetensors')
    assert 'Weights of a backbone alone belong into model.backbone' in error_of(capsys, on_disk(tested[0]), str(path))


def test_a_training_checkpoint_of_openmmlab_is_read_without_running_its_code(tested, on_disk, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'ran',))

    hub = {'log_scalars': {'train/loss': HistoryBuffer([1.0, 2.0], [1, 1])}, 'runtime_info': {'x': np.float64(3)}}
    content = {'meta': {'epoch': 1}, 'message_hub': hub, 'state_dict': load_state_dict(tested[1])}
    torch.save(content, tmp_path / 'epoch_1.pth')
    assert evaluate([on_disk(tested[0]), str(tmp_path / 'epoch_1.pth'), '--work-dir', str(tmp_path)]) == 0
    assert last_lines(capsys)[0].startswith('bbox AP: ')
    torch.save({**content, 'meta': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match='evil.pth'):
        read_training_checkpoint(tmp_path / 'evil.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.fixture
def ade_config(seg_config):
    """The tiny segmentor on the tree of ADE20K's layout, by MMSegmentation's own class for it."""
    cfg = seg_config()
    for name in ('train_dataloader', 'test_dataloader', 'val_dataloader'):
        data = cfg[name].dataset
        data.type = 'ADE20KDataset'
        for key in ('metainfo', 'img_suffix', 'reduce_zero_label'):
            data.pop(key)
    cfg.model.decode_head.num_classes = 150
    return cfg


def test_a_segmentor_on_ade20k_prints_its_classes(ade_config, on_disk, export, tmp_path, capsys):
    ade_config.tta_model = dict(type='SegTTAModel')
    ade_config.tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=scale, keep_ratio=True) for scale in (0.5, 1.0)], FLIPS,
        [dict(type='LoadAnnotations', reduce_zero_label=True)], [dict(type='PackSegInputs')]])]
    path, weights = on_disk(ade_config), export(ade_config)
    options = ['--out', str(tmp_path / 'out.json'), '--show-dir', str(tmp_path / 'show')]
    for tta in ([], ['--tta']):
        assert evaluate([path, weights, *options, *tta]) == 0
        results = json.loads((tmp_path / 'out.json').read_text())
        scores = [row['IoU'] for row in results['iou'] if row['IoU'] is not None]
        assert len(results['iou']) == 150 and results['iou'][0]['class'] == 'wall'
        assert np.mean(scores) == pytest.approx(results['summary']['mIoU'], abs=0.006)
        *_, score = last_lines(capsys, 3)
        assert score == f'mIoU: {results["summary"]["mIoU"]:.2f}'
    assert sorted(file.name for file in (tmp_path / 'show').iterdir()) == [f'ADE_{i:08}.jpg' for i in range(4)]


def test_a_data_set_with_other_classes_is_refused(tested, on_disk, capsys):
    cfg = copy.deepcopy(tested[0])
    cfg.test_dataloader.dataset.metainfo = dict(classes=('cat', 'dog'))
    assert 'the data have 2 classes (cat, dog) and model.bbox_head has 3' in error_of(capsys, on_disk(cfg), tested[1])
    cfg.test_dataloader.dataset.metainfo = dict(classes=('cat'))
    assert "metainfo=dict(classes=('cat',))" in error_of(capsys, on_disk(cfg), tested[1])


def test_a_table_marks_what_does_not_occur():
    rows = [{'class': 'cat', 'count': 2, 'AP': 12.345}, {'class': 'all', 'count': 2, 'AP': None}]
    table = format_scores(rows, 'bbox')
    assert [line.split() for line in table.splitlines() if '-----' not in line] == [
        ['bbox', 'count', 'AP'], ['cat', '2', '12.35'], ['all', '2', '-']]


def test_medical_segmentation_ends_with_the_dice_score(tmp_path, export, capsys):
    rng = np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (tmp_path / 'val' / kind).mkdir(parents=True)
    for number in range(2):
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[5:25, 8:30] = 255
        Image.fromarray(mask).save(tmp_path / 'val/masks' / f'{number}.png')
        picture = rng.integers(0, 90, (40, 40, 3)) + mask[..., None] // 2
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / 'val/images' / f'{number}.png')
    name = 'segmentation/mhs-vm-unet-3h_1xb32-300e_isic2018-256x256.py'
    cfg = Config.fromfile(str(find_config(name)))
    cfg.model.model.name, cfg.work_dir = 'mhs_vm_unet_pico', str(tmp_path / 'run')
    weights = export(cfg)
    options = {'model.model.name': 'mhs_vm_unet_pico', 'test_dataloader.num_workers': 0,
               'test_dataloader.persistent_workers': False, 'test_dataloader.dataset.pipeline.2.size': 64}
    argv = [name, weights, '--data', str(tmp_path), '--work-dir', str(tmp_path), '--show-dir', str(tmp_path / 'show')]
    assert evaluate([*argv, '--cfg-options', *(f'{key}={value}' for key, value in options.items())]) == 0
    names = [line.partition(':')[0] for line in last_lines(capsys, 2)]
    assert names == ['mIoU', 'DSC']
    assert len(list((tmp_path / 'show').iterdir())) == 2
    cfg.test_dataloader.dataset.pipeline[2].size = 64
    weights = export(cfg)
    assert predict([str(tmp_path / 'val/images'), '--checkpoint', weights, '--out', str(tmp_path / 'out')]) == 0
    assert np.asarray(Image.open(tmp_path / 'out' / '0.png')).shape == (40, 40)
