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
    packs: int = 0
    """Which packs of documents the rows hold."""

    @property
    def name(self) -> str:
        """Sizes that differ from 1, then the switches."""
        axes = "tp pp vpp cp ep etp dp".split()
        sizes = "-".join(
            f"{axis}{getattr(self.layout, axis)}" for axis in axes if getattr(self.layout, axis) > 1
        )
        switches = [f"{name}={value}" for name, value in self.options.items()]
        rows = [f"micro{self.micro_batch}"] if self.micro_batch > 1 else []
        rows += [f"packs{self.packs}"] if self.packs else []
        no_sp = ["no-sp"] if self.layout.tp > 1 and not self.layout.sequence_parallel else []
        return "-".join([sizes or "one", *no_sp, *self._context_switches, *rows, *switches])

    @property
    def _context_switches(self) -> list[str]:
        usual = Layout()
        names = ("cp_split", "cp_exchange", "cp_attention")
        return [
            getattr(self.layout, name) for name in names if getattr(self.layout, name) != getattr(usual, name)
        ]


def case(micro_batch: int = 2, options: dict | None = None, **sizes: int | bool | str) -> Case:
    """Shorthand for a row of the matrix. Two rows to a microbatch, where one process takes them one by one: that makes
    half as many passes, and a pass of one row costs as much."""
    return Case(Layout(**sizes), micro_batch, options or {})  # type: ignore[arg-type]


RECOMPUTE = {"recompute": "full"}
OVERLAP = {"overlap": True}
CAPACITY = {"capacity_factor": 0.8}
HUGGINGFACE = {"auxiliary_form": "huggingface"}
MEGATRON = {"experts": "megatron"}

MATRIX = [
    case(micro_batch=4),
    case(options=RECOMPUTE),
    case(tp=2, micro_batch=1),
    case(tp=2, sequence_parallel=False),
    case(pp=2, micro_batch=1),
    case(pp=2, options=RECOMPUTE),
    case(pp=2, vpp=2),
    case(pp=2, vpp=4),
    case(dp=2, micro_batch=1),
    case(dp=2, ep=2),
    case(dp=2, ep=2, options=MEGATRON),
    case(dp=2, etp=2),
    case(dp=2, ep=2, micro_batch=4, options=CAPACITY),
    case(tp=2, ep=2, options=CAPACITY),
    case(tp=2, ep=2, options=HUGGINGFACE),
    case(tp=4),
    case(tp=4, ep=4, sequence_parallel=False, options=RECOMPUTE),
    case(pp=4),
    case(pp=4, vpp=2),
    case(dp=4, ep=4, micro_batch=1),
    case(dp=4, ep=2, micro_batch=1, options=OVERLAP),
    case(tp=2, pp=2, ep=2),
    case(tp=2, pp=2, etp=2, options=RECOMPUTE),
    case(tp=2, dp=2, ep=2, etp=2),
    case(tp=2, dp=2, ep=2, etp=2, options=MEGATRON),
    case(tp=2, pp=2, vpp=2, dp=2, ep=4, options=CAPACITY),
    case(cp=2, micro_batch=1),
    case(cp=2, cp_split="contiguous", options=RECOMPUTE),
    case(cp=4, cp_exchange="ring", micro_batch=4),
    case(cp=2, dp=2, ep=4, options=OVERLAP),
    case(tp=2, cp=2, ep=2, options=CAPACITY),
    case(cp=8, ep=2, cp_attention="all_gather"),
    case(tp=2, cp=4, ep=2, etp=2, sequence_parallel=False, cp_split="contiguous", cp_exchange="ring"),
    case(tp=2, pp=2, cp=2, ep=4, options=CAPACITY | RECOMPUTE),
]

# Eight ranks on two cores take half a minute a row; one row of each kind is above.
LARGE = [
    case(tp=4, ep=2, etp=2),
    case(tp=2, pp=2, dp=2),
    case(tp=2, pp=2, dp=2, ep=2),
    case(tp=2, pp=2, dp=2, ep=4, options=RECOMPUTE),
    case(tp=2, pp=2, dp=2, ep=2, etp=2, sequence_parallel=False),
    case(tp=4, pp=2, ep=2),
    case(tp=2, pp=4, ep=2),
    case(pp=4, vpp=2, dp=2, ep=2, micro_batch=1),
    case(tp=2, dp=4, ep=4, options=HUGGINGFACE),
    case(tp=4, dp=2, ep=4, etp=2, options=OVERLAP),
    case(cp=4, dp=2, ep=4, cp_exchange="hierarchical", cp_inner=2, options=HUGGINGFACE),
    case(pp=2, vpp=2, cp=2, dp=2, ep=2),
]
