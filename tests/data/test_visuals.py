"""Pictures of a run: drawn from real logs, complete files, and never the reason why a training fails."""
import errno
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from visionssm.openmmlab import visuals
from visionssm.openmmlab.visuals import (
    VisualReportHook,
    read_scalars,
    save_confusion_matrix,
    save_curves,
    save_predictions,
    save_top_classes,
    to_picture,
)


def write_log(folder, epochs, steps=10, loss=1.0):
    (folder / 'vis_data').mkdir(parents=True)
    lines = []
    for epoch in epochs:
        for step in range(4, steps + 1, 3):
            done = (epoch - 1) * steps + step
            lines.append({'lr': 0.1 / done, 'loss': loss, 'epoch': epoch, 'iter': done, 'step': done})
        lines.append({'accuracy/top1': 10.0 * epoch, 'accuracy/top5': 50.0, 'data_time': 0.1, 'step': epoch})
    (folder / 'vis_data' / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n')


def pixels(path):
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert('RGB'))


def test_validation_is_placed_at_the_step_where_its_epoch_ends(tmp_path):
    write_log(tmp_path / '1', [1, 2, 3])
    train, validation = read_scalars(tmp_path)
    assert [record['iter'] for record in train] == [4, 7, 10, 14, 17, 20, 24, 27, 30]
    assert [(record['iter'], record['accuracy/top1']) for record in validation] == [(10, 10), (20, 20), (30, 30)]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    write_log(tmp_path / '20260101_000000', [1, 2], loss=1.0)
    write_log(tmp_path / '20260102_000000', [2, 3], loss=0.5)
    train, validation = read_scalars(tmp_path)
    assert [record['loss'] for record in train] == [1.0] * 3 + [0.5] * 6
    assert len(validation) == 3


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path, caplog):
    write_log(tmp_path / '1', [1])
    path = tmp_path / '1' / 'vis_data' / 'scalars.json'
    path.write_text(path.read_text() + '{"loss": 0.')
    with caplog.at_level(logging.WARNING, 'visionssm'):
        assert len(read_scalars(tmp_path)[0]) == 3
    assert 'damaged line' in caplog.text


@pytest.mark.parametrize('epochs', [[1], list(range(1, 40))], ids=['one-epoch', 'many'])
def test_curves_are_drawn(tmp_path, epochs):
    write_log(tmp_path / '1', epochs)
    image = pixels(save_curves(tmp_path))
    assert image.shape[1] > 2.5 * image.shape[0]
    blue = (image[..., 2] > image[..., 0].astype(int) + 60).any(axis=0)
    assert blue[:image.shape[1] // 3].any() and blue[-image.shape[1] // 3:].any(), 'loss and accuracy have a line'


def test_without_a_log_there_are_no_curves(tmp_path):
    assert save_curves(tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', [2, 10, 100])
def test_confusion_matrix_is_darkest_on_the_diagonal(tmp_path, number):
    path = save_confusion_matrix(np.eye(number, dtype=int) * 7, list(map(str, range(number))), tmp_path / 'matrix.png')
    image = pixels(path).astype(int)
    dark = image.sum(axis=-1) < 330
    rows, columns = np.nonzero(dark[:, :int(image.shape[1] * 0.8)])
    assert np.corrcoef(rows, columns)[0, 1] > 0.5


def test_colours_of_a_confusion_matrix_are_shares_of_the_true_class(tmp_path):
    image = pixels(save_confusion_matrix([[9, 0], [3, 0]], ['a', 'b'], tmp_path / 'matrix.png')).astype(int)
    # both cells of the first column are as dark as the scale goes
    assert (image[:, :int(image.shape[1] * 0.8)].sum(axis=-1) < 330).mean() > 0.3


def test_right_and_wrong_predictions_differ_in_colour(tmp_path):
    image = np.zeros((28, 28), dtype=np.uint8)
    sample = {'image': image, 'predicted': 1, 'probability': 0.75}

    def colours(label):
        path = save_predictions([{**sample, 'label': label}], ['cat', 'dog'], tmp_path / f'{label}.png')
        picture = pixels(path).astype(int)
        return (picture[..., 0] - picture[..., 1] > 80).sum(), (picture[..., 1] - picture[..., 0] > 50).sum()

    wrong, right = colours(0), colours(1)
    assert wrong[0] > 0 == wrong[1] and right[1] > 0 == right[0]


def test_a_grid_needs_images(tmp_path):
    with pytest.raises(ValueError, match='no images'):
        save_predictions([], [], tmp_path / 'grid.png')


def test_top_classes_are_drawn_beside_the_image(tmp_path):
    photo = np.full((120, 90, 3), (200, 30, 30), dtype=np.uint8)
    image = pixels(save_top_classes(photo, ['cat', 'dog'], [0.9, 0.1], tmp_path / 'top.png')).astype(int)
    half = image.shape[1] // 2
    red, blue = image[..., 0] - image[..., 2] > 100, image[..., 2] - image[..., 0] > 100
    assert red[:, :half].sum() > 10000 and blue[:, half:].sum() > 5000


@pytest.mark.parametrize('inputs,expected', [
    (torch.full((1, 2, 2), 9, dtype=torch.uint8), (2, 2)), (torch.full((3, 2, 2), 9 / 255), (2, 2, 3)),
    (torch.full((3, 2, 2), 9, dtype=torch.uint8), (2, 2, 3))], ids=['grey', 'float', 'colour'])
def test_inputs_become_pictures(inputs, expected):
    picture = to_picture(inputs)
    assert picture.shape == expected and picture.dtype == np.uint8 and (picture == 9).all()


def test_a_full_disk_leaves_no_half_picture_and_no_error(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    class Runner:
        work_dir = tmp_path
        val_loop = None
        logger = logging.getLogger('visionssm')

    write_log(tmp_path / '1', [1, 2])
    monkeypatch.setattr(visuals, 'atomic_write', refuse)
    with caplog.at_level(logging.WARNING, 'visionssm'):
        VisualReportHook().after_train(Runner())
    assert 'No space left' in caplog.text and not list(tmp_path.glob('*.png'))
