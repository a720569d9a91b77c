"""Pictures of the data of a run as PNG: lengths of documents by source, and the mix of sources over time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from data_pipeline.inspect import MixOverTime

SIZE_INCHES = (9.0, 4.5)
DOTS_PER_INCH = 130
MIX_WINDOWS = 128


def lengths_picture(
    lengths_by_source: Mapping[str, np.ndarray], borders: Mapping[str, int], path: Path
) -> None:
    """Write histograms of document lengths.

    Args:
        lengths_by_source: tokens per document, integer [n], by source name.
        borders: lengths to mark, by what they are.
        path: the PNG to write.
    """
    figure, axes = _figure("documents by length", "tokens per document", "share of the source's tokens")
    longest = max((int(lengths.max()) for lengths in lengths_by_source.values() if len(lengths)), default=1)
    shortest = min((int(lengths.min()) for lengths in lengths_by_source.values() if len(lengths)), default=1)
    edges = 2.0 ** np.arange(np.floor(np.log2(max(1, shortest))), np.ceil(np.log2(longest + 1)) + 1)
    for name, lengths in lengths_by_source.items():
        tokens, _ = np.histogram(lengths, edges, weights=lengths.astype(np.float64))
        axes.stairs(tokens / max(1.0, tokens.sum()), edges, label=name, linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: binary_count(tokens)))
    for border in sorted({border for border in borders.values() if edges[0] < border < edges[-1]}):
        what = ", ".join(name for name, other in borders.items() if other == border)
        axes.axvline(border, color="grey", linestyle=":", linewidth=1)
        axes.annotate(
            f"{what} ",
            (border, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
            fontsize=7,
        )
    _save(figure, axes, path)


def mix_picture(mix: MixOverTime, path: Path) -> None:
    """Write the shares of the sources over the tokens of the run, stacked, with the stages marked."""
    figure, axes = _figure("what is read when", "tokens of the run", "share of the tokens")
    tokens_M, shares_MK = averaged(mix, MIX_WINDOWS)
    borders = np.repeat(tokens_M, 2)[1:-1]
    axes.stackplot(borders, np.repeat(shares_MK, 2, axis=0).T, labels=mix.names, linewidth=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for number, tokens in enumerate(mix.stage_tokens):
        axes.axvline(tokens, color="black", linestyle="--", linewidth=0.8)
        axes.annotate(f" stage {number}", (tokens, 1.0), va="bottom", fontsize=8)
    axes.set_xlim(0, mix.tokens_N[-1])
    axes.set_ylim(0, 1)
    _save(figure, axes, path)


def binary_count(tokens: float) -> str:
    """A power of two as people say it: 512, 32K, 1M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:g}{name}"
    return f"{tokens:g}"


def averaged(mix: MixOverTime, num_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Borders of windows in tokens, float64 [M + 1], and the mean shares in each, float64 [M, K].

    A transition is planned in pieces of whole samples, down to 16: drawn one by one they are stripes that hide the
    line they follow. Windows end where stages do, so that no stage is averaged with the next.
    """
    even = np.linspace(0, mix.tokens_N[-1], num_windows + 1)
    tokens_M = np.unique(np.concatenate([even, mix.stage_tokens]))
    read_NK = np.cumsum(mix.shares_NK * np.diff(mix.tokens_N)[:, None], axis=0)
    read_MK = np.stack([np.interp(tokens_M, mix.tokens_N, [0.0, *read_N]) for read_N in read_NK.T], axis=1)
    return tokens_M, np.diff(read_MK, axis=0) / np.diff(tokens_M)[:, None]


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    # Without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", pad=16)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
