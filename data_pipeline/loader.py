"""The one interface of both fronts, `thread.py` and `dali.py`, and the choice between them.

Which samples a step needs is the caller's plan; a loader has no state of its own to save. Also the hash by
which two runs compare what they read.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np

from data_pipeline.pack import PackedSample

_LOG = logging.getLogger(__name__)

CLOSED = "the data loader is closed: no step can be read from it"
"""What reading from a closed loader of either front says."""

Front = Literal["auto", "dali", "thread"]


class Dataset(Protocol):
    """What a loader reads: random access by global sample number."""

    def __getitem__(self, sample: int) -> PackedSample: ...


class Loader(ABC):
    """Yields, step by step, the samples a plan asks for, read ahead.

    An error while reading is raised by `next` for the step it belongs to, after every earlier step was
    delivered. Close it when done, or use it as a context manager.
    """

    @abstractmethod
    def __next__(self) -> list[PackedSample]:
        """The samples of the next step, in the order of the plan.

        Raises:
            StopIteration: the plan has ended.
            ValueError: a shard is missing or damaged; the message names step, sample, file and offset.
            RuntimeError: anything else that went wrong while reading, or the loader is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop reading; `next` is an error from now on. May be called twice."""

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_loader(front: Front, dataset: Dataset, plan: Iterator[Sequence[int]], depth: int) -> Loader:
    """A loader of the chosen front.

    Args:
        front: `auto` is DALI where it is installed and loads.
        plan: the global sample numbers of each step.
        depth: steps held ready, at least 1.

    Raises:
        ValueError: DALI is asked for and cannot be used, or the depth is below 1.
    """
    from data_pipeline.thread import ThreadLoader

    if front == "thread":
        return ThreadLoader(dataset, plan, depth)
    try:
        from data_pipeline.dali import DaliLoader
    # A DALI of another CUDA or a damaged one raises OSError and RuntimeError as well as ImportError.
    except Exception as error:
        if front == "dali":
            raise ValueError(
                f"data.front=dali, but DALI does not load ({error}): it is the extra 'dali'; install it, or set "
                "data.front=auto"
            ) from error
        level = logging.INFO if isinstance(error, ModuleNotFoundError) else logging.WARNING
        _LOG.log(level, "the thread loader feeds the run: DALI does not load (%s)", error)
        return ThreadLoader(dataset, plan, depth)
    return DaliLoader(dataset, plan, depth)


def sample_ids_hash(sample_ids: Sequence[int]) -> str:
    """16 hexadecimal digits that name the samples of one step, whichever rank read which.

    The numbers are sorted first: a step is a sum over its samples, and another data-parallel size asks for
    the same samples in another order. A sample that is missing or there twice changes the hash.
    """
    ids = np.sort(np.asarray(sample_ids, dtype="<i8"))
    return hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()
