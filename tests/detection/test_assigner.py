"""Task-aligned assignment on scenes small enough to check by hand."""
import pytest
import torch

from visionssm.detection import TaskAlignedAssigner, box_ciou

CENTRES = torch.stack(torch.meshgrid(torch.arange(4.), torch.arange(4.), indexing='xy'), dim=-1).view(-1, 2) * 8 + 4
LABELS = torch.tensor([[1, 0]])
OBJECTS = torch.tensor([[[0., 0., 16., 16.], [16., 0., 32., 32.]]])
VALID = torch.tensor([[True, True]])


def guesses(size: float = 14.) -> torch.Tensor:
    """A box of one size around each of 16 cells."""
    return torch.cat([CENTRES - size / 2, CENTRES + size / 2], dim=1)[None]


def assign(scores: torch.Tensor, objects: torch.Tensor = OBJECTS, labels: torch.Tensor = LABELS,
           valid: torch.Tensor = VALID, **options):
    return TaskAlignedAssigner(**options)(scores, guesses(), CENTRES, labels, objects, valid)


def test_only_cells_inside_an_object_learn_it():
    found = assign(torch.full((1, 16, 2), 0.5))
    x, y = CENTRES.T
    first, second = (x < 16) & (y < 16), x > 16
    assert torch.equal(found.positive[0], first | second)
    assert torch.equal(found.labels[0][first], torch.ones(4, dtype=torch.long))
    assert torch.equal(found.boxes[0][second], OBJECTS[0, 1].expand(8, 4))
    assert (found.scores[0, first, 0] == 0).all() and (found.scores[0, second, 1] == 0).all()


def test_the_best_cell_is_asked_for_the_overlap_that_the_object_reaches():
    scores = torch.rand(1, 16, 2)
    found = assign(scores)
    for row, label in ((0, 1), (1, 0)):
        mine = found.positive[0] & (found.index[0] == row)
        overlap = box_ciou(OBJECTS[0, row].expand(16, 4), guesses()[0]).clamp(min=0)[mine]
        metric = scores[0, mine, label].sqrt() * overlap ** 6
        torch.testing.assert_close(found.scores[0, mine, label], metric / metric.max() * overlap.max())


def test_an_object_takes_at_most_topk_cells_the_best_ones():
    scores = torch.rand(1, 16, 2)
    every, few = assign(scores), assign(scores, topk=2)
    for row in (0, 1):
        mine = few.positive[0] & (few.index[0] == row)
        assert mine.sum() == 2
        best = (every.scores[0].sum(1) * (every.positive[0] & (every.index[0] == row))).topk(2).indices
        assert set(best.tolist()) == set(mine.nonzero()[:, 0].tolist())


def test_a_cell_that_two_objects_want_goes_to_the_one_it_overlaps_most():
    objects = torch.tensor([[[0., 0., 32., 32.], [1., 1., 15., 15.]]])
    found = assign(torch.full((1, 16, 2), 0.5), objects)
    inner = (CENTRES < 16).all(1)
    assert (found.index[0][inner] == 1).all() and (found.index[0][~inner & found.positive[0]] == 0).all()


def test_rows_that_are_no_objects_take_nothing():
    found = assign(torch.full((1, 16, 2), 0.5), valid=torch.tensor([[False, True]]))
    assert set(found.index[found.positive].tolist()) == {1}
    assert not assign(torch.rand(1, 16, 2), valid=torch.zeros_like(VALID)).positive.any()


def test_no_objects_at_all_give_an_empty_assignment():
    found = assign(torch.rand(1, 16, 2), torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.long),
                   torch.zeros(1, 0, dtype=torch.bool))
    assert not found.positive.any() and not found.scores.any() and (found.labels == 2).all()
    assert found.boxes.shape == (1, 16, 4)


@pytest.mark.parametrize('box', [[5., 5., 5., 5.], [0., 0., 0., 0.], [4., 0., 4., 30.], [-50., -50., -40., -40.],
                                 [3., 3., 5., 5.]], ids=str)
def test_objects_without_area_or_cells_give_finite_scores(box: list[float]):
    found = assign(torch.rand(1, 16, 2), torch.tensor([[box]]), LABELS[:, :1], VALID[:, :1])
    assert found.scores.isfinite().all()
    assert found.positive.sum() == (1 if box == [3., 3., 5., 5.] else 0)


def test_scores_of_zero_and_fewer_cells_than_topk_are_finite():
    found = TaskAlignedAssigner(topk=50)(
        torch.zeros(1, 16, 2), guesses(), CENTRES, LABELS, OBJECTS, VALID)
    assert found.scores.isfinite().all() and not found.scores.any()


def test_images_of_a_batch_do_not_see_each_other():
    scores = torch.rand(2, 16, 2)
    both = TaskAlignedAssigner()(
        scores, guesses().expand(2, -1, -1), CENTRES, LABELS.expand(2, -1), OBJECTS.expand(2, -1, -1),
        torch.tensor([[True, True], [True, False]]))
    alone = assign(scores[1:], valid=torch.tensor([[True, False]]))
    for name in alone._fields:
        assert torch.equal(getattr(both, name)[1:], getattr(alone, name)), name


def test_no_gradient_passes():
    assert not assign(torch.rand(1, 16, 2).requires_grad_()).scores.requires_grad


def test_an_object_needs_a_cell():
    with pytest.raises(ValueError, match='topk is 0'):
        TaskAlignedAssigner(topk=0)
