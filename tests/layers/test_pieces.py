"""Inference on a CPU piece by piece: the same numbers, and only where nothing can see the difference."""
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from visionssm.layers import Mlp
from visionssm.layers.pieces import count_pieces, in_pieces
from visionssm.layers.ss2d import ChannelsFirst, ChannelsLast
from visionssm.models import _hierarchy
from visionssm.models._hierarchy import Stage


def make_mlp() -> Mlp:
    """Return an MLP in float64 that takes eleven rows at once."""
    torch.manual_seed(0)
    mlp = Mlp(6, 10, dtype=torch.float64).eval()
    mlp.rows = 11
    return mlp


@pytest.mark.parametrize('shape', [(35, 6), (2, 5, 7, 6), (1, 23, 6)])
def test_an_mlp_by_pieces_returns_the_numbers_and_the_shape_of_the_whole(shape: tuple[int, ...]) -> None:
    mlp, x = make_mlp(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        assert mlp._pieces(x) > 1
        torch.testing.assert_close(mlp(x), mlp._whole(x), rtol=1e-12, atol=1e-12)
        turned = x.transpose(0, -2)
        torch.testing.assert_close(mlp(turned), mlp._whole(turned), rtol=1e-12, atol=1e-12)


def test_an_mlp_has_parameters_and_numbers_of_that_of_timm() -> None:
    mlp, peer = make_mlp(), timm.layers.Mlp(6, 10, dtype=torch.float64).eval()
    peer.load_state_dict(mlp.state_dict())
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), peer(x), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), peer(x), rtol=1e-12, atol=1e-12)


def test_the_hidden_layer_is_never_made_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, rows = make_mlp(), []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, 'forward', lambda self, x: rows.append(len(x)) or forward(self, x))
    with torch.no_grad():
        mlp(torch.randn(1, 50, 6, dtype=torch.float64))
    assert rows[::2] == [13, 13, 12, 12]
    assert len(rows) == 8


def hooked(mlp: Mlp) -> None:
    """Let a hook look at the activation."""
    mlp.act.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize('prepare', [hooked, nn.Module.train])
def test_training_and_hooks_inside_see_the_whole_map(prepare: Callable[[Mlp], None]) -> None:
    mlp, x = make_mlp(), torch.randn(50, 6, dtype=torch.float64)
    prepare(mlp)
    with torch.no_grad():
        assert mlp._pieces(x) == 1


def test_gradients_are_those_of_the_whole_map() -> None:
    mlp, x = make_mlp(), torch.randn(50, 6, dtype=torch.float64)
    assert mlp._pieces(x) == 1
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None


def test_graphs_hold_no_pieces() -> None:
    mlp, x = make_mlp(), torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = mlp._whole(x)
        program = torch.export.export(mlp, (x,))
        assert sum(node.target == torch.ops.aten.linear.default for node in program.graph.nodes) == 2
        symbolic = torch.fx.symbolic_trace(mlp)
        assert sum(node.target == 'fc1' for node in symbolic.graph.nodes) == 1
        for graph in (program.module(), torch.jit.trace(mlp, x), torch.jit.script(mlp), symbolic):
            torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


def test_pieces_keep_the_type_that_autocast_gives() -> None:
    mlp, x = make_mlp().float(), torch.randn(50, 6)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
        torch.testing.assert_close(mlp(x), mlp._whole(x))


def make_stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Return a stage whose norm takes its statistics of a batch in training, and which takes one image at once."""
    monkeypatch.setattr(_hierarchy, '_MOST', _hierarchy._WIDEST * 4 * 5 * 7)  # channels, height, width
    torch.manual_seed(0)
    norm = nn.Sequential(ChannelsFirst(), nn.BatchNorm2d(4), ChannelsLast())
    return Stage(norm, [nn.Linear(4, 4)], nn.Dropout(0.5)).double().eval()


def test_a_stage_of_many_images_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, x = make_stage(monkeypatch), torch.randn(5, 5, 7, 4, dtype=torch.float64)
    with torch.no_grad():
        assert stage._pieces(x) == 5
        torch.testing.assert_close(stage(x), stage._whole(x), rtol=1e-12, atol=1e-12)
        assert stage(x).stride() == stage._whole(x).stride()
        assert stage(x[:0]).shape == (0, 5, 7, 4)
        assert stage._pieces(x[:1]) == stage._pieces(x[:1].expand(1, 5, 7, 4)) == 1
    assert stage._pieces(x) == 1


def test_statistics_of_a_batch_are_taken_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, x = make_stage(monkeypatch), torch.randn(5, 5, 7, 4, dtype=torch.float64)
    stage.downsample[1].train()
    with torch.no_grad():
        torch.testing.assert_close(stage(x), stage.blocks[0](F.batch_norm(
            x.permute(0, 3, 1, 2), None, None, training=True).permute(0, 2, 3, 1)))


def test_one_piece_where_there_is_nothing_to_gain() -> None:
    module, x = nn.Identity().eval(), torch.randn(8, 3)
    with torch.no_grad():
        assert [count_pieces(x, n, 10, module) for n in (0, 19, 20, 59)] == [1, 1, 2, 5]
        assert count_pieces(x.to('meta'), 59, 10, module) == 1
        torch.testing.assert_close(in_pieces(module, x, 3), x, rtol=0, atol=0)
