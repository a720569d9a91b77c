"""A loader that reads the samples of coming steps in one background thread."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from data_pipeline.loader import CLOSED, Dataset, Loader
from data_pipeline.pack import PackedSample

CLOSE_TIMEOUT_S = 5.0
LIFE_CHECK_S = 1.0


class _Failure:
    """What went wrong, kept until the consumer reaches that step."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _PlanEnd:
    """The plan has no further steps."""


class ThreadLoader(Loader):
    """Reads up to `depth` steps ahead in a thread."""

    def __init__(self, dataset: Dataset, plan: Iterator[Sequence[int]], depth: int) -> None:
        """`plan` gives the global sample numbers of each step; `depth` >= 1 bounds the steps held ready."""
        if depth < 1:
            raise ValueError(
                f"depth={depth} holds no step: it is at least 1; set data.prefetch_steps to 1 or more"
            )
        self._dataset = dataset
        self._plan = plan
        self._depth = depth
        self._ready: deque[list[PackedSample] | _Failure | _PlanEnd] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._fill, name="data-loader", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        """Read steps until the plan ends, a step fails or the loader is closed (runs in the thread)."""
        step = 0
        while True:
            item = self._read_step(step)
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if not isinstance(item, list):
                return
            step += 1

    def _read_step(self, step: int) -> list[PackedSample] | _Failure | _PlanEnd:
        sample: int | None = None
        try:
            sample_ids = next(self._plan, None)
            if sample_ids is None:
                return _PlanEnd()
            samples = []
            for sample in sample_ids:
                samples.append(self._dataset[int(sample)])
            return samples
        # Whatever it is, SystemExit too, it must reach the consumer: a thread that dies silently would be a hang.
        except BaseException as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            failure = kind(f"data loader, step {step} of this loader, sample {sample}: {error}")
            failure.__cause__ = error
            return _Failure(failure)

    def __next__(self) -> list[PackedSample]:
        """The samples of the next step; see `Loader`."""
        with self._changed:
            while not self._closed and not self._ready:
                # A thread that could not even keep its failure (out of memory) is seen here.
                if not self._thread.is_alive():
                    raise RuntimeError("the reading thread of the data loader died without a word")
                self._changed.wait(LIFE_CHECK_S)
            if self._closed:
                raise RuntimeError(CLOSED)
            item = self._ready[0]
            # An end stays in the queue: asking again gives the same answer.
            if isinstance(item, list):
                self._ready.popleft()
                self._changed.notify_all()
                return item
        if isinstance(item, _PlanEnd):
            raise StopIteration
        raise item.error

    def close(self) -> None:
        """Stop the thread. A read that is stuck in the file system is left behind after 5 s."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)
