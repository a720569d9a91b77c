"""The command line: `m1 train`, `m1 data`, `m1 doctor`. Parses, calls one function per command, prints its
result.

Heavy imports stay inside the commands, so that `m1 --help` and `m1 doctor` work where torch or megatron-core
do not.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import TaskID

app = typer.Typer(
    name="m1",
    help="The open trainer for MiniMax-M1-type models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# What megatron-core says on every rank of every run: what `m1 doctor` says once, and a look at a gradient that it
# does not use.
KNOWN_WARNINGS = (
    ".*Apex (is|are) not installed",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
)
USER_MISTAKE = 2
SOMETHING_BROKEN = 1


@app.callback()
def _root() -> None:
    """Keeps `m1` a group of commands."""


@app.command()
def train(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A preset name or a YAML run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Values laid over the run file."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh", help="Continue from the run directory's newest complete checkpoint, if any."
        ),
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every value and its origin, and stop.")
    ] = False,
) -> None:
    """Train a run; starts its own local ranks where the layout needs several and no launcher has."""
    from megatron_m1 import doctor

    # Before anything imports megatron-core (the run file's sections do): a broken engine would take it down.
    doctor.refuse_broken_packages()
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    from megatron_m1 import config as run_file

    if explain:
        _print_values(run_file.explain(run, overrides or []))
        return
    config = run_file.load_run(run, overrides or [])
    from megatron_m1.run import train as train_run

    train_run(config, resume=resume)


@data_app.command("demo")
def data_demo(
    directory: Annotated[Path, typer.Option(help="Where corpus, tokenizer and shards go.")] = Path(
        "data/demo"
    ),
) -> None:
    """Prepare the demo corpus: Python's own documentation and standard library, tokenizer and shards."""
    from data_pipeline.prepare import prepare_demo

    with _reporter() as report:
        summary = prepare_demo(directory, progress=report)
    for name, split in (("train", summary.train), ("held out", summary.held_out)):
        counts = f"{split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} tokens"
        typer.echo(f"{name:<10} {counts} -> {split.prefix}.bin, .idx")
    typer.echo(f"tokenizer  {summary.vocab_size:,} entries -> {summary.tokenizer_path}")
    entropy = summary.unigram_entropy_nats_per_token
    typer.echo(f"unigram    {entropy:.4f} nats per held-out token; a model has to stay below it")


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(help="JSONL or text (also .gz, .zst), Parquet, or directories of text files."),
    ],
    prefix: Annotated[str, typer.Option(help="Shard to write: PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[str, typer.Option(help="Any tokenizer.json.")],
    end_of_text: Annotated[str, typer.Option(help="The token that ends a document.")] = "<|endoftext|>",
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    processes: Annotated[int, typer.Option(help="Processes that encode at once.")] = 1,
) -> None:
    """Encode raw documents into one token shard; run it again after a kill and it goes on."""
    from data_pipeline.corpus import CorpusConfig, prepare_corpus

    config = CorpusConfig(
        inputs=tuple(inputs),
        prefix=prefix,
        tokenizer_path=tokenizer,
        end_of_text=end_of_text,
        text_field=text_field,
        num_processes=processes,
    )
    with _reporter() as report:
        summary = prepare_corpus(config, report)
    typer.echo(
        f"{summary.num_files} files, {summary.num_documents:,} documents, {summary.num_bytes:,} bytes, "
        f"{summary.num_tokens:,} tokens -> {prefix}.bin, .idx"
    )
    for reason, count in summary.dropped.items():
        typer.echo(f"left out {count:,}: {reason}")


@app.command("doctor")
def run_doctor() -> None:
    """Print versions, devices and optional packages; exit 1 where something installed is broken."""
    from megatron_m1 import doctor

    console = Console(soft_wrap=True)
    for name, version in doctor.versions().items():
        console.print(f"{name:<20} {version}", highlight=False)
    for line in doctor.devices():
        console.print(f"{'device':<20} {line}", highlight=False)
    findings = doctor.findings()
    for finding in findings:
        console.print(
            f"{finding.name:<20} {finding.state:<6} {finding.detail}", highlight=False, markup=False
        )
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(SOMETHING_BROKEN)


@contextmanager
def _reporter() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per part of a preparation, on stderr and gone afterwards; yields what reports to it."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


def _print_values(values: list) -> None:
    """A table of dotted path, value and origin."""
    table = Table("value", "is", "from", box=None, pad_edge=False)
    for explained in values:
        table.add_row(explained.path, str(explained.value), explained.origin)
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)


def main() -> None:
    """Entry point. A user's mistake (a plain ValueError) prints its message; anything else keeps its
    traceback.
    """
    try:
        app()
    except ValueError as error:
        # Subclasses (a codec's or a parser's error) are not written for users: they keep the traceback.
        if type(error) is not ValueError:
            raise
        typer.echo(f"m1: {error}", err=True)
        raise SystemExit(USER_MISTAKE) from None


if __name__ == "__main__":
    main()
