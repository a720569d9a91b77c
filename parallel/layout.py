"""The rank grid: sizes of every parallel axis, the rules between them, rank <-> coordinates. Pure arithmetic.

No process and no tensor lives here; `parallel/groups.py` turns a `Layout` into process groups. The dense part of
the model and its experts share the pipeline axis and are otherwise laid out independently (parallel folding):
world = tp * cp * dp * pp = etp * ep * edp * pp.
Source: MiniMax-01 (arXiv 2501.08313), section 3.1; rank order as in megatron-core (tp fastest, pp slowest).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

SplitKind = Literal["zigzag", "contiguous"]
StateExchange = Literal["all_gather", "ring", "hierarchical"]
KeyExchange = Literal["ring", "all_gather", "transformer_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes. `dp` is what is left of the world unless it is given."""

    tp: int = 1
    """Tensor parallel size: heads, channels and vocabulary are split over it."""
    pp: int = 1
    """Pipeline parallel size: layers are split over it."""
    vpp: int = 1
    """Model chunks per pipeline rank (interleaved 1F1B); 1 is plain 1F1B."""
    cp: int = 1
    """Context parallel size: tokens of a sequence are split over it."""
    ep: int = 1
    """Expert parallel size: experts are split over it."""
    etp: int = 1
    """Expert tensor parallel size: the channels of one expert are split over it."""
    dp: int = 1
    """Data parallel size of the dense part: whole samples are split over it."""
    sequence_parallel: bool = True
    """Keep activations outside the linear layers split over tp (no effect at tp=1)."""
    cp_split: SplitKind = "zigzag"
    """Which tokens a cp rank holds: two chunks that make causal work even, or one contiguous run."""
    cp_exchange: StateExchange = "all_gather"
    """How lightning layers exchange their states over cp: one collective, a chain, or within and then across nodes."""
    cp_attention: KeyExchange = "ring"
    """How softmax layers bring keys to the queries of other cp ranks: round a ring, overlapped with the work; all at
    once, which holds every crossing key in memory; or as transformer-engine does, for rows of one document."""
    cp_inner: int = 1
    """Neighbouring cp ranks within one node; read by the hierarchical exchange only."""
    cp_decay_floor: float = 0.0
    """Lightning layers leave out of an exchanged state whatever has decayed below this factor; 0 keeps all."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(
                    f"layout.{field.name}={value} is not a size: it must be 1 or more; "
                    "set it to 1 to switch that axis off"
                )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(
                f"layout.vpp={self.vpp} with layout.pp=1: model chunks interleave pipeline ranks, "
                "so vpp > 1 needs pp >= 2; set layout.vpp=1 or raise layout.pp"
            )
        if self.cp_exchange == "hierarchical" and (
            self.cp % self.cp_inner or not 1 < self.cp_inner < self.cp
        ):
            inner_sizes = [inner for inner in divisors(self.cp) if 1 < inner < self.cp]
            legal = f"one of {inner_sizes}" if inner_sizes else "no size for this cp"
            raise ValueError(
                f"layout.cp_inner={self.cp_inner} with layout.cp={self.cp}: the hierarchical exchange needs groups of "
                f"more than one cp rank and more than one group, so cp_inner can be {legal}; set it to the cp "
                "ranks of a node, or choose layout.cp_exchange=all_gather"
            )
        if self.cp_attention == "transformer_engine" and (self.cp == 1 or self.cp_split != "zigzag"):
            raise ValueError(
                f"layout.cp_attention=transformer_engine with layout.cp={self.cp}, layout.cp_split={self.cp_split}: it "
                "needs cp of 2 or more and cp_split=zigzag; set them, or choose layout.cp_attention=ring"
            )
        if not 0 <= self.cp_decay_floor < 1:
            raise ValueError(
                f"layout.cp_decay_floor={self.cp_decay_floor} is not a decay: it must be 0 (nothing is left out) or "
                "more and below 1; 1e-8 is beyond what fp32 sums can tell apart"
            )
        dense = self.tp * self.cp * self.dp
        if dense % (self.ep * self.etp):
            raise ValueError(
                f"layout.ep={self.ep} x layout.etp={self.etp} does not divide tp*cp*dp={dense}: the experts of a "
                f"pipeline stage live on its {dense} ranks, so ep*etp must be one of {divisors(dense)}; "
                "change layout.ep, layout.etp or layout.dp"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def edp(self) -> int:
        """Data parallel size of the experts: ranks that hold the same expert shard."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def splits_tokens(self) -> bool:
        """Whether activations between the linear layers are split over tp."""
        return self.sequence_parallel and self.tp > 1

    @property
    def token_shares(self) -> int:
        """What the tokens of a microbatch must be a multiple of, so that every rank holds equally many."""
        chunks = 2 * self.cp if self.cp > 1 and self.cp_split == "zigzag" else self.cp
        return chunks * self.tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of one rank on every axis, dense (tp cp dp pp) and expert (etp ep edp).

        Raises:
            ValueError: rank outside 0..world_size-1.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(
                f"rank={rank} is outside this layout of {self.world_size} ranks: allowed are "
                f"0..{self.world_size - 1}; start exactly {self.world_size} processes"
            )
        stage_ranks = self.world_size // self.pp
        within = rank % stage_ranks
        return {
            "tp": within % self.tp,
            "cp": within // self.tp % self.cp,
            "dp": within // (self.tp * self.cp),
            "pp": rank // stage_ranks,
            "etp": within % self.etp,
            "ep": within // self.etp % self.ep,
            "edp": within // (self.etp * self.ep),
        }

    def fit_to_world(self, world_size: int) -> Layout:
        """The same layout with dp grown to fill `world_size` ranks.

        Raises:
            ValueError: the other axes do not divide world_size.
        """
        fixed = self.tp * self.cp * self.pp
        if world_size % fixed:
            raise ValueError(
                f"world size {world_size} is not a multiple of tp*cp*pp={fixed}: start a multiple of {fixed} "
                "processes, or choose layout.tp, layout.cp, layout.pp whose product divides it"
            )
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return Layout(**(sizes | {"dp": world_size // fixed}))

    def check_model(self, *, num_layers: int, num_heads: int, num_kv_heads: int, num_experts: int) -> None:
        """Refuse a model that this layout cannot split, naming the sizes that would work.

        Raises:
            ValueError: with the offending pair, the legal sizes and what to change.
        """
        rules = (
            ("pp*vpp" if self.vpp > 1 else "pp", self.pp * self.vpp, "layers", num_layers),
            ("tp", self.tp, "attention heads", num_heads),
            ("tp", self.tp, "key/value heads", num_kv_heads),
            ("ep", self.ep, "experts", num_experts),
        )
        for name, size, what, count in rules:
            if count % size:
                raise ValueError(
                    f"layout.{name}={size} does not divide the model's {count} {what}: "
                    f"choose {name} from {divisors(count)}"
                )

    def check_batch(self, *, global_batch: int, micro_batch: int, sequence_length: int) -> int:
        """Number of microbatches each rank runs per step for a global batch in samples.

        Raises:
            ValueError: the batch does not divide over dp, or the sequence over tp and cp.
        """
        per_pass = micro_batch * self.dp
        if global_batch % per_pass:
            raise ValueError(
                f"global batch of {global_batch} samples is not a multiple of micro_batch_size*dp={per_pass}: "
                f"choose a multiple of {per_pass}, or change training.micro_batch_size or layout.dp"
            )
        shares = self.token_shares
        if micro_batch * sequence_length % shares:
            chunks = "2*cp*tp" if self.cp > 1 and self.cp_split == "zigzag" else "cp*tp"
            below = sequence_length // shares * shares
            raise ValueError(
                f"sequence_length={sequence_length} x micro_batch_size={micro_batch} does not split over "
                f"{chunks}={shares}: the nearest sequence lengths are {f'{below} and ' if below else ''}"
                f"{below + shares}; choose one of them, or another layout.cp or layout.tp"
            )
        microbatches = global_batch // per_pass
        if self.vpp > 1 and microbatches % self.pp:
            raise ValueError(
                f"{microbatches} microbatches per step with layout.vpp={self.vpp}: interleaving needs a multiple of "
                f"pp={self.pp}; choose a global batch that is a multiple of {per_pass * self.pp} samples"
            )
        return microbatches


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
