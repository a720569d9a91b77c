"""The command line: `m1 train`, `serve`, `generate`, `data`, `ckpt`, `launch`, `doctor`. Parses, calls one function per
command, prints its result.

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

from megatron_m1 import ckpt

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
launch_app = typer.Typer(help="Start a run on a cluster.", no_args_is_help=True)
app.add_typer(launch_app, name="launch")
app.add_typer(ckpt.app, name="ckpt")

# What megatron-core says on every rank of every run: what `m1 doctor` says once, and a look at a gradient that it
# does not use.
KNOWN_WARNINGS = (
    ".*Apex (is|are) not installed",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help="Values laid over the run: layout.tp=2 and the like."
    ),
]
RunFile = Annotated[str, typer.Argument(metavar="RUN", help="A preset name or a YAML run file.")]
TrainedRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, a preset name or a YAML run file.")
]
USER_MISTAKE = 2
SOMETHING_BROKEN = 1


@app.callback()
def _root() -> None:
    """Keeps `m1` a group of commands."""


@app.command()
def train(
    run: RunFile,
    overrides: Overrides = None,
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
    from megatron_m1.training import early_end

    # before the imports that take seconds: a batch system's signal must not kill a rank that is still starting
    early_end.listen()

    # Before anything imports megatron-core (the run file's sections do): a broken engine would take it down.
    doctor.refuse_broken_packages()
    _hide_known_warnings()
    from megatron_m1 import config as run_file

    if explain:
        _print_values(run_file.explain(run, overrides or []))
        return
    config = run_file.load_run(run, overrides or [])
    from megatron_m1 import start

    start.train(config, resume=resume)
    early_end.ignore()


@app.command()
def serve(
    run: TrainedRun,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; there is no authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 8000,
    window: Annotated[
        int, typer.Option(help="Most tokens of prompt and answer; 0: training.sequence_length.")
    ] = 0,
    slots: Annotated[int, typer.Option(help="Sequences generated at once, per replica.")] = 32,
) -> None:
    """Serve a run's newest weights by OpenAI's interface, on this machine only unless --host says otherwise."""
    from megatron_m1 import doctor

    doctor.refuse_broken_packages()
    _hide_known_warnings()
    from megatron_m1.serving import run as serving

    serving.serve(run, overrides or [], serving.Address(host=host, port=port), window, slots)


@app.command()
def generate(
    run: TrainedRun,
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="What is continued.")] = "def main(",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the most probable tokens that reach this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Print a continuation of a prompt by a run's newest weights."""
    from megatron_m1 import doctor

    doctor.refuse_broken_packages()
    _hide_known_warnings()
    from megatron_m1.serving import run as serving

    drawing = {"temperature": temperature, "top_p": top_p, "seed": seed}
    serving.generate(run, overrides or [], prompt, drawing, max_tokens)


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
        list[str] | None,
        typer.Argument(
            help="JSONL or text (also .gz, .zst), Parquet, or directories of text files; with --file, "
            "section.field=value laid over it."
        ),
    ] = None,
    file: Annotated[
        str, typer.Option(help="A YAML file with everything; the other options are not used.")
    ] = "",
    prefix: Annotated[str, typer.Option(help="Shard to write: PREFIX.bin and PREFIX.idx.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Any tokenizer.json.")] = "",
    end_of_text: Annotated[str, typer.Option(help="The token that ends a document.")] = "<|endoftext|>",
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    recipe: Annotated[
        str, typer.Option(help="`web` or `code`: filter and drop duplicates; `none` keeps everything.")
    ] = "none",
    processes: Annotated[int, typer.Option(help="Processes that work at once.")] = 1,
) -> None:
    """Clean and encode raw documents into token shards; run it again after a kill and it goes on."""
    from data_pipeline.clean.duplicates import DuplicateConfig
    from data_pipeline.corpus import prepare_corpus
    from data_pipeline.corpus_config import CorpusConfig, CorpusSource
    from data_pipeline.parts import ReadError
    from megatron_m1.preparation import filters_of, load_preparation, summary_table

    if file:
        config = load_preparation(file, inputs or [])
    elif inputs and prefix and tokenizer:
        filters = filters_of(recipe)
        source = CorpusSource(
            name=Path(prefix).name, inputs=tuple(inputs), text_field=text_field, filters=filters
        )
        config = CorpusConfig(
            sources=(source,),
            directory=str(Path(prefix).parent),
            tokenizer_path=tokenizer,
            end_of_text=end_of_text,
            duplicates=None if recipe == "none" else DuplicateConfig(),
            num_processes=processes,
        )
    else:
        raise ValueError(
            f"inputs={inputs or []}, --prefix '{prefix}' and --tokenizer '{tokenizer}' say too little: a preparation "
            "needs all three; give them, or name a --file"
        )
    try:
        with _reporter() as report:
            summaries = prepare_corpus(config, report)
    except ReadError as error:
        # Written for users, as every plain ValueError is.
        raise ValueError(str(error)) from error
    for summary in summaries:
        typer.echo(
            f"{summary.name}: {summary.num_files} files, {summary.num_documents:,} documents, "
            f"{summary.num_bytes:,} bytes, {summary.num_tokens:,} tokens -> {config.directory}"
        )
    Console(width=None if sys.stdout.isatty() else 200).print(summary_table(summaries))


@data_app.command("chat")
def data_chat(
    inputs: Annotated[list[Path], typer.Argument(help="JSONL files (also .gz, .zst) of conversations.")],
    prefix: Annotated[Path, typer.Option(help="Shard to write: PREFIX.bin, PREFIX.idx and PREFIX.loss.")],
    tokenizer: Annotated[
        Path, typer.Option(help="Directory with tokenizer.json and tokenizer_config.json (chat template).")
    ],
    messages_field: Annotated[str, typer.Option(help="Field that holds the messages.")] = "messages",
) -> None:
    """Encode conversations for fine-tuning; the loss is on what the assistant says."""
    from data_pipeline.chat import prepare_chat

    with _reporter() as report:
        summary = prepare_chat(inputs, prefix, tokenizer, messages_field, report)
    typer.echo(
        f"{summary.num_conversations:,} conversations, {summary.num_documents:,} documents, {summary.num_tokens:,} "
        f"tokens, {summary.num_targets:,} of them learnt, the longest {summary.longest_tokens:,} -> {prefix}.bin, "
        ".idx, .loss"
    )
    for reason, count in summary.dropped.items():
        typer.echo(f"left out {count:,}: {reason}")


@data_app.command("pass-rate")
def data_pass_rate(
    prompts: Annotated[Path, typer.Argument(help='JSONL file: "prompt", and "answer" for its reward.')],
    by: Annotated[
        str, typer.Option(help="Who answers: a run directory, preset or run file, or an http:// endpoint.")
    ],
    reward: Annotated[str, typer.Option(help="exact, math, logic, code or software.")],
    out: Annotated[Path, typer.Option(help="File for the prompts that are kept.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.FIELD=VALUE]...",
            help="rate.samples=16 and the like (see PassRateConfig); others are laid over the run.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="With an endpoint: name of the model there.")] = "",
    key_file: Annotated[str, typer.Option(help="With an endpoint: file that holds its key.")] = "",
) -> None:
    """Keep the prompts that a model solves sometimes; run it again after a kill and it goes on."""
    from megatron_m1 import doctor

    doctor.refuse_broken_packages()
    _hide_known_warnings()
    from megatron_m1.serving import rating

    config, for_run = rating.settings_of(overrides or [])
    asked = rating.Rating(prompts=prompts, reward=reward, out=out, config=config)
    with _reporter() as report:
        if by.startswith(("http://", "https://")):
            endpoint = rating.endpoint(by, model, key_file, config.at_once, for_run)
            rating.rate_by_server(asked, endpoint, report)
        else:
            rating.rate_by_run(asked, by, overrides or [], report)


@data_app.command("inspect")
def data_inspect(
    run: RunFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(help="First sample to show, as consumed_samples counts.")] = 0,
    rows: Annotated[int, typer.Option(help="Rows to show.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens to show of a longer document.")] = 120,
    out: Annotated[Path | None, typer.Option(help="Where the pictures go [default: RUN_DIR/data].")] = None,
) -> None:
    """Show rows of a run in colour, its sources, and pictures of document lengths and of the mix over time."""
    from megatron_m1 import config as run_file
    from megatron_m1.inspection import inspect_data

    config = run_file.load_run(run, overrides or [])
    inspect_data(
        config,
        Console(),
        sample=sample,
        num_rows=rows,
        tokens_shown=tokens,
        out=out or config.run_dir / "data",
    )


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


@launch_app.command("slurm")
def launch_slurm(
    run: RunFile,
    overrides: Overrides = None,
    site: Annotated[Path | None, typer.Option(help="YAML file with what your cluster is like.")] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Nodes; dp grows to fill them. Default: the layout's.")
    ] = None,
    chain: Annotated[int, typer.Option(min=1, help="Jobs in a chain, each after the one before.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and stop.")] = False,
) -> None:
    """Print the batch script of a run and hand it to sbatch."""
    _hide_known_warnings()
    from megatron_m1.config import RUN_FILE, dump_run, load_run
    from megatron_m1.launch.script import Job, render
    from megatron_m1.launch.site import Site, load_site
    from megatron_m1.launch.submit import nodes_for, submit

    place = load_site(site) if site else Site()
    config = load_run(run, overrides or [])
    run_dir = config.run_dir.absolute()
    config = config.model_copy(update={"run_dir": run_dir})
    num_nodes = nodes_for(config.layout.world_size, place, nodes)
    config.layout.fit_to_world(num_nodes * place.tasks_per_node)
    command = ("train", str(run_dir / RUN_FILE))
    job = Job(
        name=config.name,
        run_dir=run_dir,
        work_dir=Path.cwd(),
        command=command,
        num_nodes=num_nodes,
        chained=chain > 1,
    )
    typer.echo(render(job, place))
    if not dry_run:
        numbers = submit(job, place, dump_run(config), chain)
        typer.echo(f"submitted {' '.join(numbers)}; logs in {run_dir / 'logs'}", err=True)


@launch_app.command("preflight")
def launch_preflight(
    run_dir: Annotated[Path, typer.Option(help="The run's directory.")],
    bad_nodes: Annotated[Path, typer.Option(help="File that gets the names of bad nodes.")],
    nodes: Annotated[str, typer.Option(help="Names of the job's nodes, comma between them.")],
    scratch_dir: Annotated[str | None, typer.Option(help="Node-local directory that must have room.")] = None,
    limits: Annotated[list[str] | None, typer.Option("--limit", help="NAME=NUMBER of a limit.")] = None,
) -> None:
    """Check the nodes of this job; every rank of it runs this. Exits 1 where a node is bad."""
    from megatron_m1.launch.preflight import check_nodes
    from megatron_m1.launch.site import parse_limits
    from parallel.launch import read_environment

    launch = read_environment()
    names = nodes.split(",")
    of_rank = [names[rank * len(names) // launch.world_size] for rank in range(launch.world_size)]
    if not check_nodes(launch, parse_limits(limits or [], scratch_dir), run_dir, bad_nodes, of_rank):
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


def _hide_known_warnings() -> None:
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


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
