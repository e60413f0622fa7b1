"""Class tokens in a sequence and position embeddings that change their grid."""
import pytest
import torch
import torch.nn.functional as F

from visionssm.layers import (
    class_token_index,
    drop_class_tokens,
    insert_class_tokens,
    resize_pos_embed,
    resize_pos_embed_leading,
)

KINDS = ['none', 'head', 'middle', 'double']
PLACES = {'none': [], 'head': [0], 'middle': [3], 'double': [0, 8]}


def rows(kind: str, num_patches: int) -> torch.Tensor:
    """Patches 0, 1, 2, ... with class tokens of -1."""
    patches = torch.arange(num_patches, dtype=torch.float32).reshape(1, -1, 1)
    return insert_class_tokens(patches, kind, torch.full((1, 1, 1), -1.), torch.full((1, 1, 1), -1.))


@pytest.mark.parametrize('kind', KINDS)
def test_class_tokens_stand_where_they_belong(kind: str):
    x = rows(kind, 7)[0, :, 0]
    assert (x == -1).nonzero().flatten().tolist() == PLACES[kind]
    assert x[x >= 0].tolist() == list(range(7))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('num_patches', [1, 2, 9, 16])
def test_dropping_undoes_inserting(kind: str, num_patches: int):
    x = torch.randn(3, num_patches, 4)
    token, tail = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    torch.testing.assert_close(drop_class_tokens(insert_class_tokens(x, kind, token, tail), kind), x, rtol=0, atol=0)


@pytest.mark.parametrize(('kind', 'patches', 'index'), [('middle', 196, 98), ('middle', 25, 12), ('head', 25, 0)])
def test_index_of_the_class_token(kind: str, patches: int, index: int):
    assert class_token_index(kind, patches) == index


@pytest.mark.parametrize('kind', KINDS)
def test_resizing_keeps_the_class_rows_apart(kind: str):
    """A constant grid stays constant, and the class row keeps its value and moves to its new place."""
    table = rows(kind, 12)
    table[table >= 0] = 5.
    resized = resize_pos_embed(table, [3, 4], [5, 7], kind)
    expected = rows(kind, 35)
    expected[expected >= 0] = 5.
    torch.testing.assert_close(resized, expected)


def test_patches_keep_their_place_in_the_picture():
    """A ramp along the rows of the grid is a ramp after resizing, whatever stands in the middle of the sequence."""
    ramp = torch.arange(6.).repeat_interleave(6).reshape(1, 36, 1)
    table = insert_class_tokens(ramp, 'middle', torch.full((1, 1, 1), 100.))
    grid = drop_class_tokens(resize_pos_embed(table, [6, 6], [12, 12], 'middle'), 'middle').reshape(12, 12)
    assert (grid.std(dim=1) < 1e-5).all()
    assert (grid[:, 0].diff() > 0).all()


def test_equal_grid_returns_the_same_tensor():
    table = torch.randn(1, 13, 4)
    assert resize_pos_embed(table, [3, 4], [3, 4], 'middle') is table


def test_equal_number_of_patches_in_another_grid_is_resized():
    table = torch.randn(1, 12, 4)
    assert not torch.allclose(resize_pos_embed(table, [3, 4], [4, 3]), table)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype):
    assert resize_pos_embed(torch.randn(1, 9, 4).to(dtype), [3, 3], [5, 4]).dtype == dtype


def test_gradient_reaches_the_table():
    table = torch.randn(1, 10, 4, requires_grad=True)
    resize_pos_embed(table, [3, 3], [7, 5], 'middle').sum().backward()
    assert (table.grad != 0).all()


def test_official_resize_needs_a_square():
    with pytest.raises(ValueError, match='11 rows without 1 leading ones are 10'):
        resize_pos_embed_leading(torch.randn(1, 11, 4), 5, 1)


def test_official_resize_keeps_an_equal_grid():
    table = torch.randn(1, 10, 4)
    assert resize_pos_embed_leading(table, 3, 1) is table


def test_official_resize_takes_no_means_when_it_shrinks():
    table = torch.randn(1, 1 + 8 * 8, 4)
    grid = table[:, 1:].reshape(1, 8, 8, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(3, 3), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    small = resize_pos_embed_leading(table, 3, 1)
    assert torch.equal(small[:, :1], table[:, :1])
    torch.testing.assert_close(small[:, 1:], expected)
