"""Draws grid.svg: the rank grid of the demo (TP2 x PP2, experts EP2 over the same ranks) and the layer
pattern.

Run `python .github/picture.py` from the repository root; the numbers come from the preset, not from this
file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_m1.model.config import ModelConfig  # noqa: E402
from megatron_m1.runfile import parse  # noqa: E402
from parallel.layout import Layout  # noqa: E402

WIDTH, MARGIN = 860, 24
INK, PAPER, LIGHTNING, SOFTMAX, STAGE = "#24292f", "#ffffff", "#2f6fb0", "#c2571a", "#eef2f6"


def draw(model: ModelConfig, layout: Layout) -> str:
    """The SVG text for a model under a layout."""
    parts = [*_layers(model, layout, top=58), *_ranks(layout, top=190)]
    height = 190 + 24 + 112 * layout.pp - 20 + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>', *parts, "</svg>\n"])


def _layers(model: ModelConfig, layout: Layout, *, top: int) -> list[str]:
    """One box per layer, coloured by kind, bracketed by pipeline stage."""
    pitch = (WIDTH - 2 * MARGIN) / model.num_layers
    per_stage = model.num_layers // layout.pp
    title = "Layers: lightning (blue) and softmax (orange) attention, each with a mixture of experts"
    parts = [_text(MARGIN, top - 26, title, bold=True)]
    for layer, kind in enumerate(model.layer_kinds):
        left = MARGIN + layer * pitch
        colour = LIGHTNING if kind == "lightning" else SOFTMAX
        parts.append(_box(left + 3, top - 8, pitch - 6, 44, colour))
        parts.append(_text(left + pitch / 2, top + 10, str(layer), fill=PAPER, middle=True))
        parts.append(_text(left + pitch / 2, top + 27, kind, fill=PAPER, middle=True))
    for stage in range(layout.pp):
        left = MARGIN + stage * per_stage * pitch + 3
        right = left + per_stage * pitch - 6
        parts.append(f'<path d="M{left} {top + 44}v8H{right}v-8" fill="none" stroke="{INK}"/>')
        parts.append(_text((left + right) / 2, top + 68, f"pipeline stage {stage}", middle=True))
    return parts


def _ranks(layout: Layout, *, top: int) -> list[str]:
    """One box per rank: a row per pipeline stage, with the dense and the expert coordinates of each rank."""
    in_stage = layout.world_size // layout.pp
    pitch = (WIDTH - 2 * MARGIN - 130) / in_stage
    title = (
        f"Ranks: world {layout.world_size} = TP{layout.tp} x CP{layout.cp} x DP{layout.dp} x PP{layout.pp}"
    )
    title += f" = ETP{layout.etp} x EP{layout.ep} x EDP{layout.edp} x PP{layout.pp}"
    parts = [_text(MARGIN, top, title, bold=True)]
    for stage in range(layout.pp):
        row = top + 24 + 112 * stage
        parts.append(_text(MARGIN, row + 46, f"pipeline stage {stage}"))
        parts.append(_box(MARGIN + 120, row, WIDTH - 2 * MARGIN - 120, 92, STAGE))
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        left = MARGIN + 130 + (rank % in_stage) * pitch
        row = top + 24 + 112 * at["pp"]
        parts.append(_box(left, row + 10, pitch - 10, 72, PAPER, stroke=INK))
        centre = left + (pitch - 10) / 2
        parts.append(_text(centre, row + 30, f"rank {rank}", bold=True, middle=True))
        parts.append(_text(centre, row + 50, f"dense part: tp {at['tp']}  dp {at['dp']}", middle=True))
        parts.append(
            _text(centre, row + 69, f"experts: ep {at['ep']}  etp {at['etp']}  edp {at['edp']}", middle=True)
        )
    return parts


def _box(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none") -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="5"'
    return f'<rect {place} fill="{fill}" stroke="{stroke}"/>'


def _text(x: float, y: float, text: str, *, fill: str = INK, bold: bool = False, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{fill}"{anchor}{weight}>{escape(text)}</text>'


def draw_preset(name: str) -> str:
    """The SVG text for one preset."""
    preset = parse(
        (ROOT / f"megatron_m1/presets/{name}.yaml").read_text(encoding="utf-8"), source=f"preset {name}"
    )
    return draw(ModelConfig(**preset["model"]), Layout(**preset["layout"]))


if __name__ == "__main__":
    (ROOT / ".github" / "grid.svg").write_text(draw_preset("tiny"), encoding="utf-8")
