"""Axial rotary embedding: a rotation, of the right angle, squeezed into the trained range."""
import math

import pytest
import torch

from visionssm.layers import apply_rotary, rotary_table


def test_rotation_keeps_the_length_of_each_pair():
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    turned = apply_rotary(x, rotary_table(3, 5, 8, x))
    torch.testing.assert_close(turned.unflatten(-1, (4, 2)).norm(dim=-1), x.unflatten(-1, (4, 2)).norm(dim=-1))


@pytest.mark.parametrize(('row', 'column'), [(0, 0), (1, 3), (2, 4)])
def test_angles_of_a_pixel(row: int, column: int):
    height, width, dim = 3, 5, 8
    cos, sin = rotary_table(height, width, dim, torch.zeros(1), 14.)[:, row * width + column]
    frequencies = [1., 10000 ** -0.5]
    angles = [row / height * 14 * f for f in frequencies] + [column / width * 14 * f for f in frequencies]
    expected = torch.tensor([angle for angle in angles for _ in range(2)])
    torch.testing.assert_close(cos, expected.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(sin, expected.sin(), rtol=0, atol=2e-6)


def test_positions_of_the_reference_grid_are_integers():
    table = rotary_table(14, 14, 4, torch.zeros(1), 14.)
    assert table[1, 1, 2].item() == pytest.approx(math.sin(1.), abs=1e-6)


def test_quarter_turn():
    table = torch.tensor([[[0., 0.]], [[1., 1.]]])
    torch.testing.assert_close(apply_rotary(torch.tensor([[[3., 5.]]]), table), torch.tensor([[[-5., 3.]]]))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_table_takes_the_dtype_of_the_tokens(dtype: torch.dtype):
    assert rotary_table(2, 2, 4, torch.zeros(1, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('cut', ['all', 'strided', 'odd offset', 'odd number'])
def test_inference_turns_as_training_does(cut: str):
    whole = torch.randn(2, 15, 3, 9, dtype=torch.float64)
    x = {'all': whole[..., :8].contiguous()[:, :, 0], 'strided': whole.flatten(2)[..., 2:10],
         'odd offset': whole.flatten(2)[..., 3:11], 'odd number': whole[:, :, 0, :8]}[cut]
    table = rotary_table(3, 5, 8, x, precise=True)
    with torch.no_grad():
        found = apply_rotary(x, table)
        scripted = torch.jit.script(apply_rotary)(x, table)
    expected = apply_rotary(x, table)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(scripted, expected, rtol=0, atol=0)
