"""Raw files to token shards in four phases, each in parallel processes: judge, find duplicates, encode, merge.

Each piece of work leaves files named by a hash of all it depends on (input files by path, size and modification
time, tokenizer by content), so a piece that is there is the right one. It is finished when its last file is there,
which appears whole or not at all; a killed run is continued by running it again, keeps what was finished, and leaves
the same bytes. What can be asked for is `corpus_config.py`.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.atomic import file_hash, only_process, write_whole, writing_to
from data_pipeline.clean.decontaminate import (
    EvaluationConfig,
    collect_ngrams,
    counts_path,
    texts_of_record,
    write_index,
)
from data_pipeline.clean.duplicates import (
    EXACT,
    NEAR,
    DuplicateConfig,
    KeyRange,
    Signed,
    later_duplicates,
    plan_ranges,
)
from data_pipeline.clean.judge import JudgeJob, judge_part
from data_pipeline.clean.quality import scorer_version
from data_pipeline.corpus_config import CorpusConfig, CorpusSource
from data_pipeline.corpus_summary import (
    SourceRecords,
    SourceSummary,
    read_summary,
    summarize,
    write_summary,
)
from data_pipeline.documents import Fields, records_of
from data_pipeline.encode import EncodeJob, MergeJob, encode_part, merge_shards
from data_pipeline.parts import Part, files_below, plan_parts
from data_pipeline.processes import Processes, Progress
from data_pipeline.tokenize import DocumentEncoder

RECIPE_VERSION = 2
"""Raised when the same inputs would give other tokens."""
EVALUATION_PART_BYTES = 256 * 2**20
DOCUMENTS_PER_RANGE = 2**22
"""Keys that one search for duplicates sorts at once: about 200 MB."""


def prepare_corpus(config: CorpusConfig, progress: Progress | None = None) -> tuple[SourceSummary, ...]:
    """Judge, deduplicate and encode files into shards, or keep what an earlier run with the same inputs finished.

    Raises:
        ReadError: an input file is missing or damaged.
        ValueError: the tokenizer or the scorer cannot be used, no document of a source is left, or the directory
            cannot be written.
        RuntimeError: a process died; the finished parts are kept.
    """
    preparation = Preparation(config, progress or (lambda what, done, total: None))
    with writing_to(preparation.directory), ExitStack() as locks:
        preparation.directory.mkdir(parents=True, exist_ok=True)
        for name in sorted(source.name for source in config.sources):
            locks.enter_context(only_process(preparation.directory / f"{name}.lock"))
        summaries = preparation.finished()
        if summaries is None:
            summaries = preparation.run()
        shutil.rmtree(preparation.parts_directory, ignore_errors=True)
    return summaries


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchJob:
    """One piece of the search for duplicates."""

    signed_path: Path
    """JSON list of the prefix and the number of documents of every judged part."""
    config: DuplicateConfig
    keys: KeyRange
    path: Path
    """Where the numbers of the duplicates go."""


def search_range(job: SearchJob) -> None:
    """Write the numbers of the later duplicates in one range of keys, unless they are there."""
    if not job.path.exists():
        parts = [Signed(Path(prefix), count) for prefix, count in json.loads(job.signed_path.read_bytes())]
        write_whole(job.path, later_duplicates(parts, job.config, job.keys).tobytes())


class Preparation:
    """One preparation: the jobs of every source, and the phases over them."""

    def __init__(self, config: CorpusConfig, report: Progress) -> None:
        self.config = config
        self.report = report
        self.directory = Path(config.directory)
        self.parts_directory = self.directory / f"{config.sources[0].name}.parts"
        encoder = DocumentEncoder(config.tokenizer_path, config.end_of_text)
        self.vocab_size = encoder.vocab_size
        self.token_settings = (file_hash(encoder.path), self.vocab_size, config.end_of_text)
        self.evaluation_path: Path | None = None
        if config.evaluation:
            states = [
                file_state(file) for file in files_below([Path(path) for path in config.evaluation.inputs])
            ]
            self.evaluation_path = self.parts_directory / f"evaluation-{hash_of(config.evaluation, states)}"
        self.num_files: list[int] = []
        self.jobs: list[list[JudgeJob]] = []
        for source in config.sources:
            files = files_below([Path(path) for path in source.inputs])
            self.num_files.append(len(files))
            self.jobs.append([self._judge_job(source, part) for part in plan_parts(files, config.part_bytes)])
        names = [[job.prefix.name for job in jobs] for jobs in self.jobs]
        kinds = [(source.name, source.labels) for source in config.sources]
        self.key = hash_of(names, kinds, self.token_settings)

    def _judge_job(self, source: CorpusSource, part: Part) -> JudgeJob:
        quality = source.quality
        job = JudgeJob(
            part=part,
            prefix=self.parts_directory,
            fields=Fields(text=source.text_field, quality=quality.field if quality else None),
            filters=source.filters,
            quality=quality,
            evaluation_path=self.evaluation_path,
            duplicates=self.config.duplicates,
        )
        states = [file_state(file) for file in part.files]
        scorer = scorer_version(quality.scorer) if quality and quality.scorer else None
        return replace(job, prefix=self.parts_directory / hash_of(job, states, scorer))

    def finished(self) -> tuple[SourceSummary, ...] | None:
        """The summaries of an earlier run with the same inputs and settings, when all are there.

        Raises:
            ShardError: it finished, but a shard is damaged.
        """
        summaries = [read_summary(self.directory, source.name, self.key) for source in self.config.sources]
        found = tuple(summary for summary in summaries if summary)
        return found if len(found) == len(summaries) else None

    def run(self) -> tuple[SourceSummary, ...]:
        """All phases, and the summaries."""
        self.parts_directory.mkdir(exist_ok=True)
        if self.evaluation_path and self.config.evaluation:
            index_evaluation(self.config.evaluation, self.evaluation_path)
        with Processes(self.config.num_processes, self.report) as processes:
            judge_jobs = [job for jobs in self.jobs for job in jobs if job.has_work]
            if judge_jobs:
                processes.run("judge", judge_part, judge_jobs, [job.part.num_bytes for job in judge_jobs])
            marks_path = self._find_duplicates(processes)
            encode_jobs = self._encode_jobs(marks_path)
            flat = [job for jobs in encode_jobs for job in jobs]
            processes.run("encode", encode_part, flat, [job.part.num_bytes for job in flat])
            summaries = self._summaries(encode_jobs)
            merge_jobs = self._merge_jobs(encode_jobs, summaries)
            processes.run("merge", merge_shards, merge_jobs, [1] * len(merge_jobs))
        for summary in summaries:
            write_summary(self.directory, summary)
        return summaries

    def _find_duplicates(self, processes: Processes) -> Path | None:
        """The file that says of every document that passed whether it is a duplicate: uint8, 0, EXACT or NEAR."""
        config = self.config.duplicates
        if config is None:
            return None
        signed = [job.signed() for jobs in self.jobs for job in jobs]
        num_documents = sum(part.num_documents for part in signed)
        key = hash_of(config, [part.prefix.name for part in signed], DOCUMENTS_PER_RANGE)
        marks_path = self.parts_directory / f"duplicates-{key}"
        if marks_path.exists():
            return marks_path
        signed_path = self.parts_directory / f"signed-{key}.json"
        if not signed_path.exists():
            rows = [(str(part.prefix), part.num_documents) for part in signed]
            write_whole(signed_path, json.dumps(rows).encode())
        jobs = [
            SearchJob(
                signed_path=signed_path,
                config=config,
                keys=keys,
                path=marks_path.with_name(f"{marks_path.name}.{keys.band}.{keys.number}"),
            )
            for keys in plan_ranges(config, num_documents, DOCUMENTS_PER_RANGE)
        ]
        processes.run("find duplicates", search_range, jobs, [1] * len(jobs))
        marks = np.zeros(num_documents, np.uint8)
        # The exact ones last: what is both is counted as exact.
        for job in sorted(jobs, key=lambda job: job.keys.band is None):
            marks[np.fromfile(job.path, np.int64)] = EXACT if job.keys.band is None else NEAR
        write_whole(marks_path, marks.tobytes())
        return marks_path

    def _encode_jobs(self, marks_path: Path | None) -> list[list[EncodeJob]]:
        """The jobs of each source."""
        encode_jobs: list[list[EncodeJob]] = []
        first_kept = 0
        for source, judged in zip(self.config.sources, self.jobs, strict=True):
            encode_jobs.append([])
            for job in judged:
                encode_job = EncodeJob(
                    part=job.part,
                    prefix=self.parts_directory,
                    fields=job.fields,
                    filters=source.filters,
                    labels=job.labels,
                    outcomes_path=job.outcomes_path if job.has_work else None,
                    num_kept=job.record()["num_kept"] if job.has_work else 0,
                    marks_path=marks_path,
                    first_kept=first_kept,
                    tokenizer_path=self.config.tokenizer_path,
                    end_of_text=self.config.end_of_text,
                )
                marks_hash = hashlib.sha256(encode_job.marks().tobytes()).hexdigest()
                name = hash_of(job.prefix.name, self.token_settings, marks_hash)
                encode_jobs[-1].append(replace(encode_job, prefix=self.parts_directory / f"{name}-tokens"))
                first_kept += encode_job.num_kept
        return encode_jobs

    def _summaries(self, encode_jobs: Sequence[Sequence[EncodeJob]]) -> tuple[SourceSummary, ...]:
        """What was counted, by source.

        Raises:
            ValueError: no document of a source is left.
        """
        evaluation = (
            json.loads(counts_path(self.evaluation_path).read_bytes()) if self.evaluation_path else {}
        )
        summaries = []
        for number, source in enumerate(self.config.sources):
            records = SourceRecords(
                num_files=self.num_files[number],
                judged=[job.record() for job in self.jobs[number] if job.has_work],
                marks=np.concatenate([np.empty(0, np.uint8), *(job.marks() for job in encode_jobs[number])]),
                encoded=[job.record() for job in encode_jobs[number]],
                evaluation=evaluation,
            )
            summaries.append(summarize(self.key, source, records))
            if not summaries[-1].num_documents:
                raise ValueError(
                    f"inputs {list(source.inputs)} of source '{source.name}' hold no documents to train on, and left "
                    f"out were {summaries[-1].dropped}: a shard needs at least one; check the paths, the formats of "
                    "the files and the filters"
                )
        return tuple(summaries)

    def _merge_jobs(
        self, encode_jobs: Sequence[Sequence[EncodeJob]], summaries: Sequence[SourceSummary]
    ) -> list[MergeJob]:
        """A job for every shard that has documents."""
        return [
            MergeJob(
                prefixes=tuple(job.shard_prefix(label.name) for job in jobs),
                target=self.directory / shard.prefix,
                vocab_size=self.vocab_size,
                marker_path=self.parts_directory / f"merged-{self.key}-{shard.prefix}",
            )
            for source, jobs, summary in zip(self.config.sources, encode_jobs, summaries, strict=True)
            for label, shard in zip(source.labels, summary.shards, strict=True)
            if shard.num_documents
        ]


def index_evaluation(config: EvaluationConfig, path: Path) -> None:
    """Write the index of the evaluation texts, unless it is there."""
    if counts_path(path).exists():
        return
    parts = plan_parts(files_below([Path(name) for name in config.inputs]), EVALUATION_PART_BYTES)
    texts = (
        text
        for part in parts
        for record in records_of(part)
        for text in texts_of_record(record, config.fields)
    )
    write_index(path, collect_ngrams(texts, config.ngram_words, config.min_words))


def file_state(file: Path) -> tuple[str, int, int]:
    """Path, size and modification time: what tells an input from another one."""
    state = file.stat()
    return str(file), state.st_size, state.st_mtime_ns


def hash_of(*values: object) -> str:
    """A hash of values whose `repr` says all about them, such as dataclasses, and of this recipe's version."""
    return hashlib.sha256(repr((RECIPE_VERSION, *values)).encode()).hexdigest()[:24]
