"""Folders of images and masks: how they are paired and read, and what is refused with the file's name."""
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmseg', reason='needs the extra [seg]')

import torch  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from PIL import Image  # noqa: E402

from visionssm.openmmlab.segmentation.medical_data import (  # noqa: E402
    ISICDataset,
    LoadBinaryMask,
    LoadMedicalImage,
    MedicalResize,
    MedicalRotate,
    PackMedicalInputs,
    StretchIntensity,
)
from visionssm.openmmlab.segmentation.medical_metric import BinarySegMetric  # noqa: E402
from visionssm.segmentation import prepare_image  # noqa: E402

LOAD = ({'type': 'visionssm.LoadMedicalImage'}, {'type': 'visionssm.LoadBinaryMask'})


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def dataset(root: Path, split: str = 'train', pipeline: tuple = LOAD, **options) -> ISICDataset:
    prefix = {'img_path': f'{split}/images', 'seg_map_path': f'{split}/masks'}
    return ISICDataset(data_root=str(root), data_prefix=prefix, pipeline=list(pipeline), **options)


def pair(folder: Path, image: Image.Image, mask: Image.Image, exif: int | None = None) -> dict:
    """One pair of files, and what a dataset says about them."""
    more = {}
    if exif is not None:
        more['exif'] = Image.Exif()
        more['exif'][0x0112] = exif
    image.save(folder / 'a.jpg' if exif else folder / 'a.png', **more)
    mask.save(folder / 'm.png')
    return {'img_path': str(folder / ('a.jpg' if exif else 'a.png')), 'seg_map_path': str(folder / 'm.png')}


def grey(width: int, height: int, mode: str = 'L') -> Image.Image:
    return Image.fromarray((np.arange(width * height) % 251).astype(np.uint8).reshape(height, width)).convert(mode)


def load(results: dict, exif: str = 'match', soft: bool = False) -> dict:
    return LoadBinaryMask(soft)(LoadMedicalImage(exif)(results))


def test_masks_are_found_with_and_without_the_ending(lesions):
    data = dataset(lesions)
    assert len(data) == 8 and data.metainfo['classes'] == ('background', 'lesion')
    for sample in data:
        stems = [Path(sample[key]).stem for key in ('img_path', 'seg_map_path')]
        assert stems[1].removesuffix('_segmentation') == stems[0]
        dark = sample['img'].mean(2) < 120
        assert (dark == sample['gt_seg_map']).mean() > 0.95


def test_other_files_in_the_folders_are_passed_over(lesions):
    (lesions / 'train/images/readme.txt').write_text('x')
    shutil.copy(lesions / 'train/images/ISIC_000.png', lesions / 'train/images/ISIC_000_superpixels.png')
    assert len(dataset(lesions)) == 8


def test_names_that_differ_pair_in_order(lesions):
    for number, file in enumerate(sorted((lesions / 'train/masks').iterdir())):
        file.rename(file.with_name(f'mask{number}.png'))
    with pytest.raises(ValueError, match=r'8 images without a mask: .*ISIC_000.png.*8 masks without an image: .*mask0'):
        dataset(lesions)
    assert len(dataset(lesions, pairing='order')) == 8
    (lesions / 'train/masks/mask3.png').unlink()
    with pytest.raises(ValueError, match=r'as many masks as images: .*images has 8 and .*masks 7'):
        dataset(lesions, pairing='order')
    with pytest.raises(ValueError, match="pairing='oder'|'oder'"):
        dataset(lesions, pairing='oder')


def test_what_is_missing_is_named(lesions):
    (lesions / 'train/masks/ISIC_002.png').unlink()
    with pytest.raises(ValueError, match=r'1 images without a mask: .*ISIC_002.png'):
        dataset(lesions)
    for file in (lesions / 'val/masks').iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r'val/masks has no images'):
        dataset(lesions, 'val')
    with pytest.raises(FileNotFoundError, match=r'test/images does not exist; expected ROOT/train/images'):
        dataset(lesions, 'test')
    shutil.copy(lesions / 'train/masks/ISIC_004.png', lesions / 'train/masks/ISIC_004_segmentation.png')
    with pytest.raises(ValueError, match='ISIC_004.png and .*ISIC_004_segmentation.png have the same name'):
        dataset(lesions)


def test_pairs_of_different_sizes_and_damaged_files_are_found_before_the_training(lesions):
    Image.new('L', (36, 41)).save(lesions / 'train/masks/ISIC_002.png')
    (lesions / 'train/images/ISIC_005.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'2 of 8 pairs .*ISIC_002.png has 36x40 pixels and its mask .* 36x41; '
                                         r'.*images/ISIC_005.png: not a readable image'):
        dataset(lesions)
    late = dataset(lesions, check_files=False)
    with pytest.raises(ValueError, match=r'ISIC_002.png has \(40, 36\) pixels .* and its mask .*\(41, 36\)'):
        late[2]
    with pytest.raises(OSError, match='ISIC_005.png: not a readable image'):
        late[5]


def test_a_file_that_ends_early_is_named(lesions):
    path = lesions / 'train/images/ISIC_001.png'
    path.write_bytes(path.read_bytes()[:-2000])
    data = dataset(lesions)
    with pytest.raises(OSError, match='ISIC_001.png: not a readable image'):
        data[1]


def test_folders_without_masks_can_be_predicted(lesions):
    data = ISICDataset(data_root=str(lesions), data_prefix={'img_path': 'val/images'},
                       pipeline=[*LOAD, {'type': 'visionssm.PackMedicalInputs'}])
    assert 'gt_sem_seg' not in data[0]['data_samples']
    with pytest.raises(ValueError, match=r'ISIC_008.png has no mask to compare with'):
        BinarySegMetric().process({}, [{'img_path': 'ISIC_008.png'}])


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', '1', 'CMYK', 'I;16'])
def test_images_of_any_mode_become_three_channels(tmp_path, mode: str):
    image = grey(7, 5, mode) if mode != 'I;16' else Image.fromarray(np.full((5, 7), 65535, np.uint16))
    path = tmp_path / ('a.tif' if mode == 'CMYK' else 'a.png')
    image.save(path)
    results = LoadMedicalImage()({'img_path': str(path)})
    assert results['img'].shape == (5, 7, 3) and results['img'].dtype == np.uint8 and results['ori_shape'] == (5, 7)
    assert mode != 'I;16' or (results['img'] == 255).all()


def test_channels_are_stored_as_bgr_and_arrays_pass(tmp_path):
    Image.new('RGB', (2, 2), (255, 1, 7)).save(tmp_path / 'a.png')
    assert LoadMedicalImage()({'img_path': str(tmp_path / 'a.png')})['img'][0, 0].tolist() == [7, 1, 255]
    assert LoadMedicalImage()({'img': np.zeros((3, 4, 3), np.uint8)})['ori_shape'] == (3, 4)


@pytest.mark.parametrize(('size', 'turned'), [((6, 9), True), ((9, 6), False)])
def test_a_turned_photograph_follows_its_mask(tmp_path, size: tuple[int, int], turned: bool):
    results = load(pair(tmp_path, grey(9, 6), Image.new('L', size), exif=6))
    assert results['img'].shape[:2] == size[::-1]
    upright = np.asarray(Image.open(results['img_path']).convert('L'))
    upright = np.rot90(upright, -1) if turned else upright
    assert np.array_equal(results['img'][..., 0], upright)


def test_a_turned_photograph_that_fits_both_ways_is_refused(tmp_path):
    for image, orientation in ((grey(9, 6), 3), (grey(6, 6), 8)):
        results = pair(tmp_path, image, Image.new('L', image.size), exif=orientation)
        with pytest.raises(ValueError, match=rf'a.jpg is stored turned \(EXIF orientation {orientation}\)'):
            load(dict(results))
        stored = np.asarray(Image.open(results['img_path']).convert('L'))
        assert np.array_equal(load(dict(results), 'ignore')['img'][..., 0], stored)
        turned = np.rot90(stored, 2 if orientation == 3 else 1)
        assert np.array_equal(load(dict(results), 'apply')['img'][..., 0], turned)


def test_a_turned_photograph_whose_mask_fits_neither_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'a.jpg has \(6, 9\) pixels \(height, width\) and its mask .*m.png \(7, 9\)'):
        load(pair(tmp_path, grey(9, 6), Image.new('L', (9, 7)), exif=6))


@pytest.mark.parametrize(('values', 'expected'), [
    ([0, 255], [0, 1]), ([0, 1], [0, 1]), ([0, 0], [0, 0]), ([255, 255], [1, 1]), ([1, 1], [1, 1])])
def test_masks_of_0_and_255_or_0_and_1_are_binary(tmp_path, values: list[int], expected: list[int]):
    mask = Image.fromarray(np.array([values], np.uint8))
    assert load(pair(tmp_path, grey(2, 1), mask))['gt_seg_map'].tolist() == [expected]


def test_other_values_of_masks_are_refused_or_soft(tmp_path):
    mask = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    results = pair(tmp_path, grey(3, 1), mask)
    with pytest.raises(ValueError, match=r'the mask .*m.png has the values 0, 51, 255; a binary mask'):
        load(dict(results))
    assert load(dict(results), soft=True)['gt_seg_map'].tolist() == [[0, pytest.approx(0.2), 1]]


def test_classes_of_a_label_map_make_a_foreground(tmp_path):
    mask = Image.fromarray(np.array([[0, 3, 7]], np.uint8)).convert('P')
    mask.putdata([0, 3, 7])
    results = LoadMedicalImage()(pair(tmp_path, grey(3, 1), mask))
    assert LoadBinaryMask(labels=[3, 4])(results)['gt_seg_map'].tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match='soft=True is for masks with soft edges'):
        LoadBinaryMask(soft=True, labels=[1])


def test_images_of_one_pixel_go_through(tmp_path):
    results = load(pair(tmp_path, grey(1, 1), Image.new('L', (1, 1), 255)))
    packed = PackMedicalInputs()(MedicalResize(32)(StretchIntensity()(results)))
    assert packed['inputs'].shape == (3, 32, 32) and packed['inputs'].eq(0).all()
    assert packed['data_samples'].gt_sem_seg.data.eq(1).all()


def test_the_pipeline_prepares_images_as_the_plain_function_does(tmp_path):
    results = load(pair(tmp_path, grey(33, 21, 'RGB'), Image.new('L', (33, 21), 255)))
    expected = prepare_image(torch.from_numpy(results['img']).permute(2, 0, 1), (16, 24))
    packed = PackMedicalInputs()(MedicalResize((16, 24))(StretchIntensity()(results)))
    assert torch.equal(packed['inputs'], expected)
    assert packed['data_samples'].scale_factor == (24 / 33, 16 / 21)


def test_soft_edges_reach_the_loss_and_labels_are_their_halves(tmp_path):
    mask = Image.fromarray(np.tile(np.array([0, 0, 0, 255, 255], np.uint8), (5, 1)))
    results = load(pair(tmp_path, grey(5, 5), mask))
    sample = PackMedicalInputs()(MedicalResize(4)(results))['data_samples']
    soft = sample.gt_soft_seg.data
    assert ((soft > 0) & (soft < 1)).any()
    assert torch.equal(sample.gt_sem_seg.data, (soft >= 0.5).long())


def test_labels_of_several_classes_keep_their_values():
    results = {'img': np.zeros((9, 9, 3), np.uint8), 'seg_fields': ['gt_seg_map'],
               'gt_seg_map': np.tile(np.arange(9, dtype=np.uint8), (9, 1))}
    out = PackMedicalInputs()(MedicalResize(4)(results))['data_samples']
    assert set(out.gt_sem_seg.data.unique().tolist()) <= set(range(9)) and 'gt_soft_seg' not in out


def test_rotation_draws_an_angle_an_image_or_one_a_run():
    def angles(**options) -> set[bytes]:
        rotate = MedicalRotate(prob=1., **options)
        image = np.random.default_rng(0).random((16, 16, 3), np.float32)
        return {rotate({'img': image, 'seg_fields': []})['img'].tobytes() for _ in range(6)}

    assert len(angles()) == 6 and len(angles(per_run=True)) == 1 and len(angles(degrees=(0, 0))) == 1
    image = np.ones((16, 16, 3), np.float32)
    rotated = MedicalRotate(1., (45, 45))({'img': image, 'gt_seg_map': image[..., 0], 'seg_fields': ['gt_seg_map']})
    assert set(np.unique(rotated['img'])) == {0, 1} and np.array_equal(rotated['img'][..., 0], rotated['gt_seg_map'])
    with pytest.raises(ValueError, match='give a share in 0..1'):
        MedicalRotate(prob=2)


def test_empty_masks_score_0_with_a_warning(caplog):
    metric = BinarySegMetric(at='image')
    empty = {'data': torch.zeros(1, 4, 4)}
    metric.process({}, [{'pred_sem_seg': empty, 'gt_sem_seg': empty}] * 2)
    assert metric.evaluate(2) == {'mIoU': 0, 'DSC': 0, 'accuracy': 100, 'sensitivity': 0, 'specificity': 100}
    assert 'no mask has foreground' in caplog.text
