"""`m1 ckpt`: list, verify, prune and compare the checkpoints of a run, as tables.

A place is a run directory, its `checkpoints` directory, or one `step_...` directory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

if TYPE_CHECKING:
    from parallel.manifest import Entry

app = typer.Typer(help="List, verify, prune and compare the checkpoints of a run.", no_args_is_help=True)

Place = Annotated[Path, typer.Argument(metavar="PLACE", help="A run directory, or one of its checkpoints.")]
_GIB = 2**30


@app.command("ls")
def ls(place: Place) -> None:
    """Show every checkpoint of a run, complete or not."""
    from parallel.manifest import read_manifest

    table = _table("step", "size GiB", "saved", "samples", "layout", "state")
    for entry in _entries(place):
        saved = samples = layout = ""
        if entry.complete:
            about = read_manifest(entry.path)
            saved = time.strftime(
                "%Y-%m-%d %H:%M", time.localtime((entry.path / "manifest.json").stat().st_mtime)
            )
            samples = f"{about.extra.get('position', {}).get('consumed_samples', 0):,}"
            sizes = {axis: size for axis, size in about.layout.items() if isinstance(size, int) and size > 1}
            layout = " ".join(f"{axis}{size}" for axis, size in sizes.items()) or "1 rank"
        problem = entry.problem.partition(": ")[0].replace(f"{entry.path}/", "").replace(f"{entry.path} ", "")
        state = "complete" if entry.complete else escape(problem)
        table.add_row(f"{entry.step:,}", f"{entry.bytes / _GIB:.3f}", saved, samples, layout, state)
    _console().print(table)
    _show_copies((place.parent if place.name.startswith("step_") else _root(place)).resolve().parent)


def _show_copies(run_dir: Path) -> None:
    """The copies on nodes' disks that this machine sees, one line per node and step."""
    from parallel.local_shard import shards_seen

    run_file = run_dir / "run.yaml"
    section = (yaml.safe_load(run_file.read_text()) if run_file.is_file() else {}).get("checkpoint", {})
    directory = (section.get("local") or {}).get("directory")
    found: dict[tuple[str, int], list[tuple[str, Entry]]] = {}
    for node, rank, entry in shards_seen(Path(directory), run_dir) if directory else ():
        found.setdefault((node, entry.step), []).append(
            (rank.removeprefix("rank_").lstrip("0") or "0", entry)
        )
    if not found:
        return
    table = _table("step", "size GiB", "node", "ranks", "state")
    for (node, step), shards in sorted(found.items()):
        torn = [rank for rank, entry in shards if not entry.complete]
        table.add_row(
            f"{step:,}",
            f"{sum(entry.bytes for _, entry in shards) / _GIB:.3f}",
            escape(node),
            " ".join(rank for rank, _ in shards),
            f"torn: {' '.join(torn)}" if torn else "complete",
        )
    console = _console()
    console.print(
        f"\nnode-local copies below {directory}, as this machine sees them", markup=False, soft_wrap=True
    )
    console.print(table)


@app.command("verify")
def verify(place: Place) -> None:
    """Read every file and compare it with its hash; exit 1 where one is damaged."""
    from parallel.survey import problems_of

    entries = _entries(place)
    table, damaged = _table("step", "size GiB", "result"), False
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for entry in entries:
            task = progress.add_task(f"step {entry.step}", total=entry.bytes)
            problems = problems_of(entry.path, told=lambda count, task=task: progress.advance(task, count))  # type: ignore[misc]
            damaged = damaged or bool(problems)
            result = "whole" if not problems else escape("\n".join(problems))
            table.add_row(f"{entry.step:,}", f"{entry.bytes / _GIB:.3f}", result)
    _console().print(table)
    if damaged:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    place: Place,
    keep: Annotated[int, typer.Option(help="Newest complete checkpoints that stay, at least 1.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
) -> None:
    """Delete all but the newest complete checkpoints; one that is whole down to its hashes always stays."""
    from parallel import survey
    from parallel.manifest import CheckpointError

    root = _root(place)
    try:
        doomed, kept = survey.prunable(root, keep)
    except CheckpointError as error:
        # Written for users, as every plain ValueError is.
        raise ValueError(str(error)) from error
    if not dry_run:
        survey.prune(root, doomed)
    verb = "would go" if dry_run else "gone"
    table = _table("step", "size GiB", "")
    for entries, word in ((doomed, verb), (kept, "stays")):
        for entry in entries:
            table.add_row(f"{entry.step:,}", f"{entry.bytes / _GIB:.3f}", word)
    _console().print(table)


@app.command("diff")
def diff(
    left: Annotated[Path, typer.Argument(help="A checkpoint, or a run: its newest complete one.")],
    right: Annotated[Path, typer.Argument(help="The other one.")],
) -> None:
    """Name the tensors that differ between two checkpoints and by how much; exit 1 where any does."""
    from parallel.manifest import CheckpointError
    from parallel.survey import differences

    paths = [_one(place) for place in (left, right)]
    try:
        found = list(differences(*paths))
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    table = _table("tensor", "relative RMS", "largest difference", "")
    for one in found:
        numbers = ("", "") if one.what else (f"{one.relative_rms:.3e}", f"{one.largest:.3e}")
        table.add_row(escape(one.name), *numbers, escape(one.what))
    console = _console()
    if found:
        console.print(table)
    console.print(
        f"{len(found)} tensors differ between {paths[0]} and {paths[1]}", markup=False, soft_wrap=True
    )
    if found:
        raise typer.Exit(1)


def _root(place: Path) -> Path:
    """The directory that holds the checkpoints of a run."""
    root = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    if not root.is_dir():
        raise ValueError(
            f"{place} is no directory: a run directory, or its `checkpoints`, holds checkpoints; name one of them"
        )
    return root


def _entries(place: Path) -> list[Entry]:
    """The checkpoints that a place means."""
    from parallel.manifest import list_checkpoints

    is_one = place.name.startswith("step_") and place.is_dir()
    found = list_checkpoints(place.parent if is_one else _root(place))
    found = [entry for entry in found if not is_one or entry.path.name == place.name]
    if not found:
        raise ValueError(f"{place} holds no checkpoint: none was saved there yet; name another run directory")
    return found


def _one(place: Path) -> Path:
    """The newest complete checkpoint that a place means."""
    complete = [entry.path for entry in _entries(place) if entry.complete]
    if not complete:
        raise ValueError(
            f"{place} holds no complete checkpoint: only complete ones can be compared; see `m1 ckpt ls`"
        )
    return complete[-1]


def _console() -> Console:
    # a pipe has no width of its own, and cells must not be cut there
    return Console(width=None if sys.stdout.isatty() else 200)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        is_text = heading in ("tensor", "saved", "layout", "state", "result", "node", "ranks", "")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    return table
