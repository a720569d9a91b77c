"""Raw files to one token shard: parts in parallel processes, then one merge in file order.

A part's files are named by a hash of all it depends on (its input files by path, size and modification
time, the tokenizer by content), so a part that is there is the right one. It is finished when its record is
there, which is written last; a killed run is continued by running it again, and keeps what was finished.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.atomic import file_hash, only_process, write_whole
from data_pipeline.documents import documents_of
from data_pipeline.index import ShardWriter, TokenShard
from data_pipeline.parts import Part, files_below, plan_parts
from data_pipeline.tokenize import END_OF_TEXT, DocumentEncoder

RECIPE_VERSION = 1
"""Raised when the same inputs would give other tokens."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes are done and how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """How raw files become one shard."""

    inputs: tuple[str, ...]
    """Files and directories, in the order in which their documents are written."""
    prefix: str
    """Path of the shard to write, without `.bin` and `.idx`."""
    tokenizer_path: str
    """Any tokenizer.json."""
    end_of_text: str = END_OF_TEXT
    """Name of the token that ends a document."""
    text_field: str = "text"
    """The field or column that holds the text in JSON lines and Parquet."""
    num_processes: int = 1
    """Processes that encode at once."""
    part_bytes: int = 256 * 2**20
    """Input bytes per part: what a killed process loses at most."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "part_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is no count: it is at least 1; set it to 1 or more"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSummary:
    """What was read, written and left out; PREFIX.json holds the same."""

    key: str
    """Hash of the inputs and the settings."""
    num_files: int
    """Input files."""
    num_documents: int
    """Documents in the shard."""
    num_bytes: int
    """UTF-8 bytes of their text."""
    num_tokens: int
    """Tokens, one end-of-text token per document included."""
    dropped: dict[str, int]
    """Documents left out, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartJob:
    """One part, with all that its process needs to know."""

    part: Part
    prefix: Path
    """Where the part's shard goes; its name is the hash of this job."""
    tokenizer_path: str
    end_of_text: str
    text_field: str

    @property
    def record_path(self) -> Path:
        """The record that is written when the part is finished."""
        return self.prefix.with_suffix(".json")


def prepare_corpus(config: CorpusConfig, progress: Progress | None = None) -> CorpusSummary:
    """Encode files into one shard, or keep what an earlier run with the same inputs finished.

    Raises:
        ReadError: an input file is missing or damaged.
        ValueError: the tokenizer cannot be used, or no document is left.
        RuntimeError: an encoding process died; the finished parts are kept.
    """
    report: Progress = progress or (lambda what, done, total: None)
    files = files_below([Path(path) for path in config.inputs])
    jobs = plan_jobs(config, files)
    key = hash_of([job.prefix.name for job in jobs])
    summary_path = Path(config.prefix + ".json")
    summary_path.parent.mkdir(parents=True, exist_ok=True)
    with only_process(Path(config.prefix + ".lock")):
        finished = read_json(summary_path)
        if finished is not None and finished.get("key") == key:
            TokenShard(config.prefix)
            return CorpusSummary(**finished)
        records = run_jobs(jobs, config.num_processes, report)
        merge_parts([job.prefix for job in jobs], config, report)
        summary = summarize(key, len(files), records)
        write_whole(summary_path, json.dumps(asdict(summary), indent=1).encode())
        shutil.rmtree(parts_directory(config))
    return summary


def summarize(key: str, num_files: int, records: Sequence[dict]) -> CorpusSummary:
    """The records of all parts added up."""
    dropped = sum((Counter(record["dropped"]) for record in records), Counter())
    counts = ("num_documents", "num_bytes", "num_tokens")
    totals = {name: sum(record[name] for record in records) for name in counts}
    return CorpusSummary(key=key, num_files=num_files, dropped=dict(dropped), **totals)


def parts_directory(config: CorpusConfig) -> Path:
    """Where the finished parts wait for the merge."""
    return Path(config.prefix + ".parts")


def plan_jobs(config: CorpusConfig, files: Sequence[Path]) -> list[PartJob]:
    """The jobs of a corpus in file order."""
    tokenizer = Path(config.tokenizer_path)
    vocab = DocumentEncoder(tokenizer, config.end_of_text).vocab_size
    settings = [RECIPE_VERSION, file_hash(tokenizer), vocab, config.end_of_text, config.text_field]
    jobs = []
    for part in plan_parts(files, config.part_bytes):
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in part.files]
        name = hash_of([*settings, part.format, states, part.start, part.end])
        jobs.append(
            PartJob(
                part=part,
                prefix=parts_directory(config) / name,
                tokenizer_path=config.tokenizer_path,
                end_of_text=config.end_of_text,
                text_field=config.text_field,
            )
        )
    return jobs


def run_jobs(jobs: Sequence[PartJob], num_processes: int, report: Progress) -> list[dict]:
    """Encode all parts, several at a time; the records of the parts in order."""
    num_bytes = sum(job.part.num_bytes for job in jobs)
    done_bytes = 0
    report("encode", 0, num_bytes)
    # Spawned, because a fork of a process with threads may inherit a lock that nobody will open.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=exit_with_parent) as pool:
        futures = {pool.submit(encode_part, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                future.result()
                done_bytes += jobs[futures[future]].part.num_bytes
                report("encode", done_bytes, num_bytes)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"an encoding process died after {done_bytes} of {num_bytes} bytes (killed, or out of memory): "
                "finished parts are kept; run the same command again, with fewer processes if memory was short"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [json.loads(job.record_path.read_bytes()) for job in jobs]


def exit_with_parent() -> None:
    """In an encoding process: end when the process that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not in a started process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()


def encode_part(job: PartJob) -> None:
    """Write the shard and the record of one part, unless they are there."""
    job.prefix.parent.mkdir(parents=True, exist_ok=True)
    with only_process(job.prefix.with_suffix(".lock")):
        if job.record_path.exists():
            return
        encoder = DocumentEncoder(job.tokenizer_path, job.end_of_text)
        dropped: Counter[str] = Counter()
        num_documents = num_bytes = num_tokens = 0
        with ShardWriter(job.prefix, encoder.vocab_size) as writer:
            for text in documents_of(job.part, job.text_field, dropped):
                tokens = encoder.encode_one(text)
                writer.add_document(tokens)
                num_documents += 1
                num_bytes += len(text.encode())
                num_tokens += len(tokens)
        record = {
            "num_documents": num_documents,
            "num_bytes": num_bytes,
            "num_tokens": num_tokens,
            "dropped": dict(dropped),
        }
        write_whole(job.record_path, json.dumps(record).encode())


def merge_parts(prefixes: Sequence[Path], config: CorpusConfig, report: Progress) -> None:
    """Join the parts' shards into one, in order."""
    encoder = DocumentEncoder(config.tokenizer_path, config.end_of_text)
    with ShardWriter(Path(config.prefix), encoder.vocab_size) as writer:
        for number, prefix in enumerate(prefixes):
            report("merge", number, len(prefixes))
            writer.add_shard(TokenShard(prefix))
        if not writer.num_documents:
            raise ValueError(
                f"inputs {list(config.inputs)} hold no documents: a shard needs at least one; check the paths "
                "and the formats of the files"
            )
    report("merge", len(prefixes), len(prefixes))


def read_json(path: Path) -> dict | None:
    """A JSON object from a file, or None when there is none or it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def hash_of(values: Sequence) -> str:
    """A hash of JSON-like values, 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]
