"""Scores of binary masks and the preparation of images: the official numbers, and images without any contrast."""
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionssm.segmentation import binary_confusion, binary_scores, prepare_image
from visionssm.segmentation.preprocessing import resize_map, stretch_intensity

GOLDEN = load_file(Path(__file__).resolve().parent.parent / 'golden/mhs_vm/losses_metrics_preproc.safetensors')
NAMES = {'mIoU': 'miou', 'DSC': 'f1_or_dsc', 'accuracy': 'accuracy', 'sensitivity': 'sensitivity',
         'specificity': 'specificity'}


def test_scores_equal_the_official_ones_pooled_over_the_images():
    pooled = sum(binary_confusion(p, t) for p, t in zip(GOLDEN['prob'], GOLDEN['target'], strict=True))
    assert torch.equal(pooled, binary_confusion(GOLDEN['prob'], GOLDEN['target']))
    scores = binary_scores(pooled)
    assert scores == {ours: pytest.approx(GOLDEN[f'metric.{theirs}'].item(), abs=1e-12)
                      for ours, theirs in NAMES.items()}


def test_rows_are_masks_and_columns_predictions():
    prob, mask = torch.tensor([0.5, 0.9, 0.49, 0.]), torch.tensor([1., 0., 0.5, 0.2])
    assert binary_confusion(prob, mask).tolist() == [[1, 1], [1, 1]]
    assert binary_confusion(prob, mask, threshold=0.95).tolist() == [[2, 0], [2, 0]]


def test_scores_without_a_denominator_are_no_numbers():
    nothing = binary_scores(binary_confusion(torch.zeros(2, 3), torch.zeros(2, 3)))
    assert nothing['accuracy'] == nothing['specificity'] == 1
    assert all(math.isnan(nothing[name]) for name in ('mIoU', 'DSC', 'sensitivity'))
    assert all(math.isnan(value) for value in binary_scores(torch.zeros(2, 2, dtype=torch.long)).values())


def test_maps_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r'The prediction is \(2, 3\) and the mask \(3, 2\)'):
        binary_confusion(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize('name', ['isic18.test', 'isic18.train', 'isic17.test', 'isic17.train'])
def test_prepared_images_equal_the_official_ones(name: str):
    expected = GOLDEN[f'pre.{name}.noantialias.image']
    image = prepare_image(GOLDEN['pre.image'].permute(2, 0, 1), expected.shape[1:])
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)


def test_resized_masks_equal_the_official_ones():
    expected = GOLDEN['pre.isic18.test.noantialias.mask']
    mask = resize_map(GOLDEN['pre.mask'][None] / 255, expected.shape[1:])
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


def test_images_of_one_value_become_black():
    assert torch.equal(prepare_image(torch.full((3, 1, 1), 77, dtype=torch.uint8), (2, 2)), torch.zeros(3, 2, 2))


def test_any_type_and_range_is_stretched():
    for image in (torch.tensor([[-3., 1.], [5., 0.]]), torch.tensor([[0, 65535]], dtype=torch.int32)):
        out = stretch_intensity(image)
        assert out.dtype == torch.float32 and out.min() == 0 and out.max() == pytest.approx(255)
    with pytest.raises(ValueError, match=r'The image is empty: its shape is \(3, 0, 4\)'):
        stretch_intensity(torch.zeros(3, 0, 4))
