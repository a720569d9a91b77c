"""The layout matrix: every row must equal one process. Adding a layout is one line here."""

from __future__ import annotations

from dataclasses import dataclass, field

from parallel.layout import Layout


@dataclass(frozen=True)
class Case:
    """One layout with the switches that go with it."""

    layout: Layout
    micro_batch: int = 1
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Sizes that differ from 1, then the switches."""
        axes = "tp pp vpp cp ep etp dp".split()
        sizes = "-".join(
            f"{axis}{getattr(self.layout, axis)}" for axis in axes if getattr(self.layout, axis) > 1
        )
        switches = [f"{name}={value}" for name, value in self.options.items()]
        rows = [f"micro{self.micro_batch}"] if self.micro_batch > 1 else []
        no_sp = ["no-sp"] if self.layout.tp > 1 and not self.layout.sequence_parallel else []
        return "-".join([sizes or "one", *no_sp, *rows, *switches])


def case(micro_batch: int = 1, options: dict | None = None, **sizes: int | bool) -> Case:
    """Shorthand for a row of the matrix."""
    return Case(Layout(**sizes), micro_batch, options or {})  # type: ignore[arg-type]


RECOMPUTE = {"recompute": "full"}
OVERLAP = {"overlap": True}
CAPACITY = {"capacity_factor": 0.8}
HUGGINGFACE = {"auxiliary_form": "huggingface"}

MATRIX = [
    case(micro_batch=4),
    case(options=RECOMPUTE),
    case(tp=2),
    case(tp=2, sequence_parallel=False),
    case(pp=2),
    case(pp=2, micro_batch=2, options=RECOMPUTE),
    case(pp=2, vpp=2),
    case(pp=2, vpp=4),
    case(dp=2),
    case(dp=2, ep=2),
    case(dp=2, etp=2),
    case(dp=2, ep=2, micro_batch=4, options=CAPACITY),
    case(tp=2, ep=2, options=CAPACITY),
    case(tp=2, ep=2, micro_batch=2, options=HUGGINGFACE),
    case(tp=4),
    case(tp=4, ep=2, etp=2),
    case(tp=4, ep=4, sequence_parallel=False, options=RECOMPUTE),
    case(pp=4),
    case(pp=4, vpp=2),
    case(dp=4, ep=4),
    case(dp=4, ep=2, options=OVERLAP),
    case(tp=2, pp=2, ep=2),
    case(tp=2, pp=2, etp=2, options=RECOMPUTE),
    case(tp=2, dp=2, ep=2, etp=2),
    case(tp=2, pp=2, dp=2),
    case(tp=2, pp=2, dp=2, ep=2),
    case(tp=2, pp=2, dp=2, ep=4, options=RECOMPUTE),
    case(tp=2, pp=2, vpp=2, dp=2, ep=4, options=CAPACITY),
    case(tp=2, pp=2, dp=2, ep=2, etp=2, sequence_parallel=False),
    case(tp=4, pp=2, ep=2, micro_batch=2),
    case(tp=2, pp=4, ep=2),
    case(pp=4, vpp=2, dp=2, ep=2),
    case(tp=2, dp=4, ep=4, micro_batch=2, options=HUGGINGFACE),
    case(tp=4, dp=2, ep=4, etp=2, options=OVERLAP),
]
