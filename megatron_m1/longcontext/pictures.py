"""Needles and losses as pictures, to look at.

Import it where a picture is drawn: matplotlib takes a seventh of the time in which a rank starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_m1.longcontext.evaluate import LossByPosition, NeedleGrid
from megatron_m1.longcontext.jump import Explosion

_FOUND = LinearSegmentedColormap.from_list("found", ["#f1ece4", "#9cc7bf", "#1f7a72", "#0b4f4a"])
_KINDS = ("lightning", "softmax", "router", "experts", "norms")
"""Kinds of a layer's parts, from top to bottom of a picture."""


def needle_picture(grid: NeedleGrid, title: str, path: Path) -> None:
    """A heat map of the share of needles found, length by depth, as PNG."""
    lengths, depths = len(grid.lengths_L), len(grid.depths_D)
    figure = Figure(figsize=(2.2 + 0.75 * max(4, lengths), 1.5 + 0.42 * depths), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = _heat_map(axes, grid)
    for i, j in np.ndindex(*grid.found_LD.shape):
        share = float(grid.found_LD[i, j])
        axes.text(i, j, f"{share:.0%}", ha="center", va="center", fontsize=8, color=_ink_on(share))
    axes.set_title(f"{title} ({grid.trials} texts per cell)", fontsize=9)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def progress_picture(grids: Sequence[tuple[str, int, NeedleGrid]], title: str, path: Path) -> None:
    """Needle heat maps side by side, one after each stage, as PNG; what is longer than was trained on is hatched.

    Args:
        grids: name of each stage, tokens of its rows, and what was found after it.
        title: over all of them.
        path: of the PNG.
    """
    figure = Figure(figsize=(1.2 + 2.3 * len(grids), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    for axes, (name, trained_tokens, grid) in zip(panels, grids, strict=True):
        image = _heat_map(axes, grid)
        longer = [i for i, length in enumerate(grid.lengths_L) if length > trained_tokens]
        if longer:
            left, depths = longer[0] - 0.5, len(grid.depths_D)
            axes.add_patch(
                Rectangle(
                    (left, -0.5), len(longer), depths, fill=False, hatch="///", edgecolor="0.6", linewidth=0
                )
            )
            axes.axvline(left, color="#b3261e", linewidth=1.6)
        for i, share in enumerate(grid.found_LD.mean(1)):
            axes.text(i, -0.75, f"{share:.0%}", ha="center", va="bottom", fontsize=6.5)
        axes.set_title(f"after stage {name}", fontsize=10, pad=22)
        if axes is not panels[0]:
            axes.set_ylabel("")
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1.0), pad=0.01)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def _heat_map(axes: Axes, grid: NeedleGrid) -> AxesImage:
    """The cells of a grid with their axes; lengths go to the right, depths down."""
    image = axes.imshow(grid.found_LD.T, vmin=0, vmax=1, cmap=_FOUND, aspect="auto")
    axes.set_xticks(range(len(grid.lengths_L)), [_short(length) for length in grid.lengths_L], fontsize=8)
    axes.set_yticks(range(len(grid.depths_D)), [f"{depth:.0%}" for depth in grid.depths_D], fontsize=8)
    # white lines between the cells
    axes.set_xticks(np.arange(len(grid.lengths_L) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(grid.depths_D) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("tokens of the text", fontsize=8)
    axes.set_ylabel("depth of the needle", fontsize=8)
    return image


def _short(tokens: int) -> str:
    """A length as people say it: 16K for 16384."""
    if not tokens:
        return "0"
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def _ink_on(share: float) -> str:
    return "white" if share > 0.6 else "black"


def position_picture(curves: dict[str, LossByPosition], path: Path) -> None:
    """Loss by position in the document, a curve per name, as PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.stairs(curve.loss_nats, curve.borders, label=name, linewidth=1.6, baseline=None)
    axes.set_xscale("symlog", base=2, linthresh=64)
    borders = sorted({border for curve in curves.values() for border in curve.borders})
    axes.set_xticks(borders, [_short(border) for border in borders], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    _save(figure, path)


def growth_picture(explosion: Explosion, title: str, path: Path) -> None:
    """How much the gradient of every part of the model grew, kind by depth, as PNG."""
    by_place = {
        (name.rpartition(" ")[0], int(name.rpartition(" ")[2])): growth
        for name, growth in explosion.growth.items()
        if name.rpartition(" ")[2].isdigit()
    }
    kinds = sorted({kind for kind, _ in by_place}, key=_KINDS.index)
    layers = 1 + max(layer for _, layer in by_place)
    decades = np.full((len(kinds), layers), np.nan)
    for (kind, layer), growth in by_place.items():
        decades[kinds.index(kind), layer] = np.clip(np.log10(max(growth, 1e-6)), -6, 6)
    reach = max(1, math.ceil(np.nanmax(np.abs(decades))))
    figure = Figure(figsize=(3.0 + 0.3 * max(12, layers), 1.2 + 0.42 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor("0.88")
    image = axes.imshow(decades, vmin=-reach, vmax=reach, cmap="RdBu_r", aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title(f"{title}: gradient norm over that of the stage before", fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=range(-reach, reach + 1))
    bar.ax.set_yticklabels([f"x {10.0**decade:g}" for decade in range(-reach, reach + 1)], fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
