"""Figures of the benchmarks, made without a display, and files of them that are never half-written."""
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from visionssm.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> 'Figure':
    """Return an empty figure, `width` x `height` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, facecolor='white', layout='constrained')


def share_legend(figure: 'Figure', order: Iterable[str]) -> None:
    """Name in one legend, in this order, what the panels of a figure have among them."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    shown = [label for label in order if label in handles]
    figure.legend([handles[label] for label in shown], shown, loc='outside right upper', frameon=False, fontsize=9)


def save_figure(figure: 'Figure', path: Path) -> None:
    """Write a figure as PNG."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format='png')
        atomic_write(buffer.getvalue(), path)
