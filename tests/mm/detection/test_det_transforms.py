"""The pictures and boxes that Mamba-YOLO sees: boxes stay on what they enclose, and batches have official shapes."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='needs the extra [det]')

from mmdet.structures.bbox import HorizontalBoxes, bbox_flip  # noqa: E402
from mmengine.dataset import BaseDataset  # noqa: E402
from safetensors import safe_open  # noqa: E402

import visionssm.openmmlab  # noqa: E402, F401
from visionssm.openmmlab.detection import transforms as T  # noqa: E402
from visionssm.openmmlab.hooks import seed_step  # noqa: E402
from visionssm.registry import TRANSFORMS  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
PLACES = [os.environ.get('VISIONSSM_GOLDEN', ''), ROOT.parent / 'shared' / 'golden', ROOT / 'tests' / 'golden']


def sample(boxes, size=(60, 90), **extra):
    """An image of noise-free grey with the boxes drawn in white, as a pipeline has it after loading."""
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    image = np.full((*size, 3), 50, np.uint8)
    for x1, y1, x2, y2 in boxes.astype(int):
        image[y1:y2, x1:x2] = 255
    return {'img': image, 'img_shape': size, 'ori_shape': size, 'img_path': 'drawn.png',
            'gt_bboxes': HorizontalBoxes(boxes, clone=False), 'gt_bboxes_labels': np.arange(len(boxes)),
            'gt_ignore_flags': np.zeros(len(boxes), bool), **extra}


def drawn_box(image):
    """The box around what is white."""
    rows, columns = np.flatnonzero((image > 160).any((1, 2))), np.flatnonzero((image > 160).any((0, 2)))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def assert_on_its_pixels(results, atol=1.0):
    assert len(results['gt_bboxes']) == 1
    np.testing.assert_allclose(results['gt_bboxes'].numpy()[0], drawn_box(results['img']), atol=atol)


@pytest.fixture(scope='module')
def letterbox_fixture():
    found = [Path(place) / 'mamba_yolo' / 'letterbox.safetensors' for place in PLACES if str(place)]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        pytest.skip('the fixture letterbox.safetensors is neither in ../shared/golden nor in tests/golden')
    with safe_open(path, 'np') as file:
        return json.loads(file.metadata()['config']), {key: file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize('case', ['0', '1', '2', '3'])
def test_letterbox_equals_the_official_one(letterbox_fixture, case):
    config, tensors = letterbox_fixture
    options = config[case]
    letterbox = T.Letterbox(options['new_shape'], options.get('scaleup', True), options.get('auto', False),
                            options.get('scaleFill', False))
    image = tensors[f'{case}.image']
    results = letterbox({'img': image.copy(), 'ori_shape': image.shape[:2]})
    expected = tensors[f'{case}.out']
    assert results['img'].shape == expected.shape
    assert np.abs(results['img'].astype(int) - expected).max() <= 1


@pytest.mark.parametrize('case', ['0', '1', '2'])
def test_boxes_return_to_the_original_image_as_officially(letterbox_fixture, case):
    config, tensors = letterbox_fixture
    height, width = config[case]['hw']
    out_height, out_width, _ = config[case]['out']
    # the official function knows neither the ratio nor the pads that were used and guesses them from the two shapes
    gain = min(out_height / height, out_width / width)
    top, left = round((out_height - height * gain) / 2 - 0.1), round((out_width - width * gain) / 2 - 0.1)
    meta = {'ori_shape': (height, width), 'scale_factor': (gain, gain), 'pad_param': (top, 0, left, 0)}
    boxes = T.to_original(torch.from_numpy(tensors[f'{case}.boxes_in']), meta)
    torch.testing.assert_close(boxes, torch.from_numpy(tensors[f'{case}.boxes_scaled_back']), atol=1e-3, rtol=0)


@pytest.mark.parametrize('size', [(60, 90), (90, 60), (37, 41), (64, 64)])
def test_letterboxed_boxes_come_back_exactly(size):
    boxes = [[4, 6, 20, 30]]
    results = T.Letterbox(64)(T.ResizeLongSide(64)(sample(boxes, size)))
    assert results['img'].shape[:2] == (64, 64)
    assert_on_its_pixels(results)
    back = T.to_original(results['gt_bboxes'].tensor, results)
    torch.testing.assert_close(back, torch.tensor(boxes, dtype=torch.float32))


@pytest.mark.parametrize('mirrored', [0.0, 1.0])
def test_boxes_of_a_mirrored_view_come_back_although_its_pads_are_uneven(mirrored):
    flip = TRANSFORMS.build(dict(type='mmdet.RandomFlip', prob=mirrored))
    results = T.Letterbox(64, minimal=True)(flip(T.ResizeLongSide(64)(sample([[4, 6, 20, 30]], (90, 52)))))
    assert results['pad_param'][2] != results['pad_param'][3]
    back = T.to_original(results['gt_bboxes'].tensor, results)
    if results['flip']:
        back = bbox_flip(back, results['ori_shape'], 'horizontal')
    torch.testing.assert_close(back, torch.tensor([[4.0, 6.0, 20.0, 30.0]]), atol=1e-4, rtol=0)


def test_long_side_is_never_exceeded_and_no_side_vanishes():
    assert T.ResizeLongSide(64)(sample([], (1, 1)))['img'].shape[:2] == (64, 64)
    assert T.ResizeLongSide(64)(sample([], (2, 900)))['img'].shape[:2] == (1, 64)
    assert T.ResizeLongSide(64)(sample([], (77, 131)))['img'].shape[:2] == (38, 64)


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('size', [(128, 128), (40, 64)])
def test_boxes_follow_the_affine_map_exactly(seed, size):
    seed_step(0, seed)
    middle, reach = np.array(size[::-1]) / 2, 8
    box = [*(middle - reach).astype(int), *(middle + reach).astype(int)]
    results = T.RandomScaleShift(64, scale=0.5, shift=0.1)(sample([box], size))
    assert results['img'].shape[:2] == (64, 64)
    # half a pixel, as far as the blurred edge is exact
    assert_on_its_pixels(results, atol=0.75)


def test_affine_map_drops_slivers_and_keeps_the_rest_in_the_picture():
    seed_step(0, 0)
    boxes = [[0, 0, 66, 66], [64, 64, 64.5, 120], [10, 60, 110, 60.9], [70, 70, 90, 80]]
    still = T.RandomScaleShift(64, scale=0.0, shift=0.0)
    # the middle 64 x 64 of 128 x 128: the first has 34 x 34 of 66 x 66 left, the second and third are too thin
    results = still(sample(boxes, (128, 128)))
    np.testing.assert_allclose(results['gt_bboxes'].numpy(), [[0, 0, 34, 34], [38, 38, 58, 48]])
    assert results['gt_bboxes_labels'].tolist() == [0, 3]
    assert len(results['gt_ignore_flags']) == 2
    far = still(sample([[0, 0, 40, 40]], (128, 128)))
    assert len(far['gt_bboxes']) == 0, 'less than a tenth of its area is left'


def test_scale_one_is_refused():
    with pytest.raises(ValueError, match='scale must be in'):
        T.RandomScaleShift(64, scale=1.0)


def test_hsv_gains_multiply_and_grey_keeps_its_hue():
    seed_step(0, 1)
    image = np.full((4, 4, 3), 100, np.uint8)
    changed = T.RandomHSV(0.015, 0.7, 0.4)({'img': image})['img']
    assert changed.dtype == np.uint8
    assert np.ptp(changed) == 0 and 60 <= changed[0, 0, 0] <= 140
    same = T.RandomHSV(0, 0, 0)({'img': image})['img']
    np.testing.assert_array_equal(same, image)


def test_masks_are_refused_by_name():
    for transform in (T.ResizeLongSide(64), T.Letterbox(64), T.RandomScaleShift(64)):
        with pytest.raises(ValueError, match=r'drawn\.png.*with_mask=False'):
            transform(sample([[4, 4, 9, 9]], gt_masks=object()))


class Drawn(BaseDataset):
    """Images in memory, some without objects."""

    METAINFO = {'classes': ('square',)}

    def __init__(self, sizes, boxes=((4, 4, 20, 20),), pipeline=(), **kwargs):
        self.sizes, self.boxes = sizes, boxes
        super().__init__(pipeline=list(pipeline), serialize_data=False, **kwargs)

    def load_data_list(self):
        return [{'height': height, 'width': width, 'img_id': index, **sample(self.boxes, (height, width))}
                for index, (height, width) in enumerate(self.sizes)]


TRAIN = [dict(type='mmdet.Mosaic', img_scale=(64, 64)), dict(type='visionssm.RandomScaleShift', size=64),
         dict(type='visionssm.RandomHSV'), dict(type='mmdet.RandomFlip', prob=0.5), dict(type='mmdet.PackDetInputs')]


def mixed(boxes=((4, 4, 20, 20),), pipeline=TRAIN):
    inner = Drawn([(40, 64), (64, 30), (64, 64)], boxes, pipeline=[T.ResizeLongSide(64)])
    return T.MixDataset(dataset=inner, pipeline=pipeline)


def test_mosaic_puts_boxes_on_their_pixels():
    seed_step(0, 2)
    dataset = mixed(pipeline=TRAIN[:1])
    results = dataset[0]
    assert results['img'].shape == (128, 128, 3)
    assert len(results['gt_bboxes']) > 0
    for x1, y1, x2, y2 in results['gt_bboxes'].numpy().round().astype(int):
        if x2 - x1 > 4 and y2 - y1 > 4:
            assert results['img'][y1 + 1:y2 - 1, x1 + 1:x2 - 1].min() > 160


@pytest.mark.parametrize('mixup', [False, True])
def test_images_without_objects_go_through_the_whole_pipeline(mixup):
    pipeline = [*TRAIN[:2], dict(type='mmdet.MixUp', img_scale=(64, 64)), *TRAIN[2:]] if mixup else TRAIN
    packed = mixed(boxes=(), pipeline=pipeline)[1]
    assert packed['inputs'].shape == (3, 64, 64)
    assert packed['data_samples'].gt_instances.bboxes.shape == (0, 4)


def test_mixup_adds_the_objects_of_another_image():
    seed_step(0, 0)
    pipeline = [dict(type='visionssm.RandomScaleShift', size=64, scale=0.0, shift=0.0),
                dict(type='mmdet.MixUp', img_scale=(64, 64), ratio_range=(1.0, 1.0))]
    assert len(mixed(pipeline=pipeline)[2]['gt_bboxes']) == 2


def test_closed_mosaic_leaves_one_letterboxed_image_and_can_be_opened_again():
    dataset = mixed(pipeline=[TRAIN[0], dict(type='visionssm.RandomScaleShift', size=64, scale=0.0, shift=0.0)])
    dataset.close_mosaic()
    closed = dataset[0]
    np.testing.assert_allclose(closed['gt_bboxes'].numpy(), [[4, 16, 20, 32]])
    assert (closed['img'][:11] == 114).all() and (closed['img'][13:51] != 114).all()
    dataset.close_mosaic(False)
    assert dataset[0]['img'].shape == (64, 64, 3)
    assert not dataset._skip_type_keys


def test_workers_that_live_on_see_that_mosaic_is_closed():
    dataset = mixed(pipeline=TRAIN[:1])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True,
                                         collate_fn=lambda item: item['img'].shape)
    assert set(loader) == {(128, 128, 3)}
    dataset.close_mosaic()
    assert (128, 128, 3) not in set(loader)
    loader._iterator._shutdown_workers()


def rectangular(sizes, batch_size):
    steps = [T.ResizeLongSide(64), T.Letterbox(64, scale_up=False, minimal=True), TRANSFORMS.build(
        dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param')))]
    return T.RectangularDataset(Drawn(sizes, pipeline=steps), batch_size=batch_size, size=64)


def test_rectangular_batches_have_the_official_shapes():
    dataset = rectangular([(90, 60), (60, 90), (64, 64), (30, 90), (120, 60)], batch_size=2)
    # flat images first; ceil(share * 64 / 32 + 0.5) * 32
    assert dataset.order.tolist() == [3, 1, 2, 0, 4]
    assert dataset.shapes == [(64, 96), (64, 96), (96, 96), (96, 96), (96, 64)]
    for index, shape in enumerate(dataset.shapes):
        packed = dataset[index]
        assert packed['inputs'].shape[1:] == shape
        assert packed['data_samples'].img_id == dataset.order[index]
        boxes = packed['data_samples'].gt_instances.bboxes.tensor
        torch.testing.assert_close(T.to_original(boxes, packed['data_samples'].metainfo),
                                   torch.tensor([[4.0, 4.0, 20.0, 20.0]]))
    assert len(dataset) == 5
    assert dataset.metainfo['classes'] == ('square',)


def test_images_of_640_are_validated_at_672():
    assert rectangular([(480, 480)], 1).shapes == [(96, 96)]
    assert T.RectangularDataset(Drawn([(480, 640)]), batch_size=1).shapes == [(512, 672)]
