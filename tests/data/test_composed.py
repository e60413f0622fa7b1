"""Data composed from garments and photographs: exact, repeatable, and never half-written."""
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from visionssm.data.composed import (
    ComposeOptions,
    Photographs,
    compose,
    encode_rle,
    garment_mask,
    make_composed_data,
)
from visionssm.data.fashion import FASHION_CLASSES, embedded_fashion_mnist

OPTIONS = ComposeOptions(size=64, max_garments=4, max_scale=2.0)


@pytest.fixture(scope='module')
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'photo{number}.png')
    return folder


@pytest.fixture(scope='module')
def made(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    photographs = Photographs.split_folder(photo_folder)
    return make_composed_data(tmp_path_factory.mktemp('made'), photographs, {'train': 5, 'val': 3}, OPTIONS)


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('make_composed_data')


def decode_rle(segmentation: dict) -> np.ndarray:
    values = np.arange(len(segmentation['counts'])) % 2
    return np.repeat(values, segmentation['counts']).reshape(segmentation['size'], order='F').astype(bool)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def compose_one(seed: int, options: ComposeOptions = OPTIONS):
    pictures, labels = embedded_fashion_mnist('train')
    rng = np.random.default_rng(seed)
    background = np.full((options.size, options.size, 3), 7, np.uint8)
    return compose(rng, pictures, labels, background, options), background


@pytest.mark.parametrize('mask', [
    np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool), ~np.eye(5, 3, dtype=bool)])
def test_run_lengths_give_the_mask_back(mask):
    encoded = encode_rle(mask)
    assert sum(encoded['counts']) == mask.size and all(count > 0 for count in encoded['counts'][1:])
    assert (decode_rle(encoded) == mask).all()


def test_run_lengths_are_those_of_pycocotools():
    coco = pytest.importorskip('pycocotools.mask', reason='needs the extra [det]')
    mask = np.random.default_rng(0).random((17, 23)) > 0.5
    encoded = encode_rle(mask)
    assert (coco.decode(coco.frPyObjects(encoded, *encoded['size'])) == mask).all()


def test_a_mask_closes_dark_spots_keeps_openings_and_drops_fringe_and_specks():
    picture = np.zeros((28, 28), np.uint8)
    picture[5:20, 5:20] = 200
    picture[10, 10] = 0  # a dark spot
    picture[12:18, 12:18] = 0  # an opening
    picture[20, 5:20] = 2  # fringe
    picture[25, 25] = 200  # a speck
    expected = np.zeros((28, 28), bool)
    expected[5:20, 5:20] = True
    expected[12:18, 12:18] = False
    assert (garment_mask(picture) == expected).all()


def test_a_black_picture_has_no_mask():
    assert not garment_mask(np.zeros((28, 28), np.uint8)).any()


@pytest.mark.parametrize('seed', range(6))
def test_masks_are_exactly_what_differs_from_the_background(seed):
    composition, background = compose_one(seed)
    covered = np.logical_or.reduce(composition.masks)
    assert sum(mask.sum() for mask in composition.masks) == covered.sum()
    assert (composition.image[~covered] == background[~covered]).all()
    assert ((composition.class_map() > 0) == covered).all()


def test_no_garment_is_hidden_beyond_the_limit():
    crowded = ComposeOptions(size=64, max_garments=40, min_visible=0.6, max_scale=2.0)
    composition, _ = compose_one(3, crowded)
    alone = ComposeOptions(size=64, max_garments=40, min_visible=1.0, max_scale=2.0)
    assert len(composition.masks) > 3
    # nothing may be covered at all when all of it must be seen
    apart, background = compose_one(3, alone)
    assert all((apart.image[mask] != background[mask]).any() for mask in apart.masks)


def test_boxes_areas_and_class_maps_agree_with_the_masks(made):
    content = json.loads((made['coco'] / 'annotations' / 'instances_train.json').read_text())
    assert [category['name'] for category in content['categories']] == list(FASHION_CLASSES)
    assert len(content['images']) == 5 and content['annotations']
    for image in content['images']:
        stem = Path(image['file_name']).stem
        class_map = np.asarray(Image.open(made['ade'] / 'annotations' / 'training' / f'{stem}.png'))
        expected = np.zeros_like(class_map)
        for annotation in (a for a in content['annotations'] if a['image_id'] == image['id']):
            mask = decode_rle(annotation['segmentation'])
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation['bbox']
            assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
            assert annotation['area'] == mask.sum() and annotation['iscrowd'] == 0
            assert not expected[mask].any()
            expected[mask] = annotation['category_id']
        assert (class_map == expected).all()
        first, second = ((made[form] / folder / image['file_name']).read_bytes()
                         for form, folder in (('coco', 'train'), ('ade', 'images/training')))
        assert first == second


def test_the_data_say_what_they_are(made):
    content = json.loads((made['coco'] / 'annotations' / 'instances_val.json').read_text())
    assert 'not photographs of garments' in content['info']['description']
    for folder in made.values():
        text = (folder / 'README.txt').read_text()
        assert 'not photographs of garments' in text and 'MIT' in text and 'photo4.png' in text


def test_equal_seeds_give_equal_files_and_more_images_keep_the_first(made, photo_folder, tmp_path):
    photographs = Photographs.split_folder(photo_folder)
    again = make_composed_data(tmp_path / 'a', photographs, {'train': 5, 'val': 3}, OPTIONS)
    assert files(again['coco']) == files(made['coco']) and files(again['ade']) == files(made['ade'])
    more = make_composed_data(tmp_path / 'b', photographs, {'train': 6, 'val': 3}, OPTIONS, ['coco'])
    for name, content in files(made['coco']).items():
        if name.endswith('.jpg'):
            assert (more['coco'] / name).read_bytes() == content
    other = make_composed_data(tmp_path / 'c', photographs, {'train': 5, 'val': 3},
                               ComposeOptions(size=64, max_scale=2.0, seed=1))
    assert files(other['coco'])['train/train_000001.jpg'] != files(made['coco'])['train/train_000001.jpg']


def test_training_and_validation_share_no_photograph(photo_folder):
    split = Photographs.split_folder(photo_folder)
    assert len(split['train']) == 5 and [path.name for path in split['val'].paths] == ['photo4.png']


def test_nothing_is_overwritten_unless_asked_and_foreign_folders_never(photo_folder, tmp_path):
    photographs = Photographs.split_folder(photo_folder)
    counts = {'train': 1, 'val': 1}
    make_composed_data(tmp_path, photographs, counts, OPTIONS, ['ade'])
    with pytest.raises(FileExistsError, match='composed-ade exists.*--force'):
        make_composed_data(tmp_path, photographs, counts, OPTIONS)
    assert not (tmp_path / 'composed-coco').exists()
    make_composed_data(tmp_path, photographs, {'train': 2, 'val': 1}, OPTIONS, force=True)
    assert len(list((tmp_path / 'composed-ade' / 'images' / 'training').iterdir())) == 2
    (tmp_path / 'composed-coco' / 'README.txt').unlink()
    with pytest.raises(FileExistsError, match='not made by this tool'):
        make_composed_data(tmp_path, photographs, counts, OPTIONS, force=True)


def test_an_interrupted_run_leaves_nothing(photo_folder, tmp_path):
    def interrupt(numbers):
        yield next(iter(numbers))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_composed_data(tmp_path, Photographs.split_folder(photo_folder), {'train': 3, 'val': 1}, OPTIONS,
                           progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('options, match', [
    (dict(size=32), 'size=32 is smaller than a garment'), (dict(min_scale=3.0), 'min_scale=3.0'),
    (dict(max_garments=0), 'max_garments=0'), (dict(quality=101), 'quality=101')])
def test_impossible_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ComposeOptions(**options)


def test_the_tool_uses_a_folder_of_photographs_and_names_broken_ones(tool, photo_folder, tmp_path, capsys):
    arguments = ['--output', str(tmp_path / 'out'), '--train', '2', '--val', '1', '--size', '64', '--scale', '0.8', '2',
                 '--formats', 'coco']
    sheet = tmp_path / 'sheet.png'
    assert tool.main([*arguments, '--backgrounds', str(photo_folder), '--sheet', str(sheet)]) == 0
    with Image.open(sheet) as image:
        assert image.size == (8 * 128, 128)
    assert 'composed-coco: 2 images for training, 1 for validation' in capsys.readouterr().out
    broken = tmp_path / 'broken'
    broken.mkdir()
    for name in 'ab':
        (broken / f'{name}.jpg').write_bytes(b'no picture')
    with pytest.raises(SystemExit, match=r'\.jpg cannot be read as a photograph'):
        tool.main([*arguments, '--force', '--backgrounds', str(broken)])
    with pytest.raises(SystemExit, match='has 0 images'):
        tool.main([*arguments, '--force', '--backgrounds', str(tmp_path / 'nowhere')])


def test_the_photographs_of_scikit_image_are_found_without_importing_it(tool):
    pytest.importorskip('skimage', reason='needs the extra [det]')
    split = tool.skimage_photographs()
    assert not set(split['train'].paths) & set(split['val'].paths)
    crop = split['val'].crop(np.random.default_rng(0), 48)
    assert crop.shape == (48, 48, 3) and crop.dtype == np.uint8
