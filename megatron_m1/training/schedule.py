"""Learning rate and global batch as pure functions of progress; nothing here holds state.

A schedule is warm-up, a constant phase, any number of later plateaus, one decay, and then the floor. Lengths
are in tokens or in steps, one unit for all of them; only the warm-up may be in steps before phases in tokens,
which is how MiniMax-01 (arXiv 2501.08313, section 4.2) states its recipe. The batch grows at token counts and
jumps at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Decay = Literal["none", "linear", "cosine", "exponential"]
_DECAYS = ("none", "linear", "cosine", "exponential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plateau:
    """A constant learning rate that follows the first constant phase, entered with a jump."""

    learning_rate: float
    """Rate held during the plateau."""
    tokens: int = 0
    """Length in tokens (0: the length is given in steps)."""
    steps: int = 0
    """Length in steps (0: the length is given in tokens)."""

    def __post_init__(self) -> None:
        _check_rate("plateau learning_rate", self.learning_rate)
        _check_lengths("plateau", {"tokens": self.tokens, "steps": self.steps})
        if (self.tokens > 0) == (self.steps > 0):
            raise ValueError(
                f"plateau has tokens={self.tokens} and steps={self.steps}: exactly one of them must be "
                "positive; set the one you count the schedule in and leave the other out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStage:
    """One stage of the batch ramp."""

    from_tokens: int
    """Consumed tokens at which the stage begins."""
    global_batch_tokens: int
    """Tokens per optimizer step over all data-parallel ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Learning rate by phase and global batch by consumed tokens."""

    peak_learning_rate: float = 2e-4
    """Rate at the end of the warm-up and during the constant phase."""
    min_learning_rate: float = 0.0
    """Rate at the end of the decay and ever after; must be positive for an exponential decay."""
    warmup_steps: int = 0
    """Linear warm-up in optimizer steps; the first step already has a rate above zero."""
    warmup_tokens: int = 0
    """Linear warm-up in tokens (give this or warmup_steps)."""
    constant_tokens: int = 0
    """Constant phase after the warm-up, in tokens."""
    constant_steps: int = 0
    """Constant phase after the warm-up, in steps."""
    plateaus: tuple[Plateau, ...] = ()
    """Further constant phases, in order, between the constant phase and the decay."""
    decay: Decay = "none"
    """Shape of the last phase; `none` holds the last rate for ever."""
    decay_tokens: int = 0
    """Length of the decay in tokens."""
    decay_steps: int = 0
    """Length of the decay in steps."""
    batch_ramp: tuple[BatchStage, ...] = field(
        default_factory=lambda: (BatchStage(from_tokens=0, global_batch_tokens=65536),)
    )
    """Stages of the global batch, ascending; the first begins at 0 tokens."""

    def __post_init__(self) -> None:
        _check_rate("schedule.peak_learning_rate", self.peak_learning_rate)
        lengths = (
            "warmup_steps",
            "warmup_tokens",
            "constant_tokens",
            "constant_steps",
            "decay_tokens",
            "decay_steps",
        )
        _check_lengths("schedule", {name: getattr(self, name) for name in lengths})
        self._check_units()
        self._check_decay()
        self._check_ramp()

    @property
    def counts_steps(self) -> bool:
        """Whether the phases after the warm-up are measured in steps (else in tokens)."""
        return bool(
            self.constant_steps or self.decay_steps or any(plateau.steps for plateau in self.plateaus)
        )

    def _check_units(self) -> None:
        in_tokens = (
            self.constant_tokens or self.decay_tokens or any(plateau.tokens for plateau in self.plateaus)
        )
        if self.counts_steps and (in_tokens or self.warmup_tokens):
            raise ValueError(
                f"schedule mixes units: constant_steps={self.constant_steps}, "
                f"decay_steps={self.decay_steps}, constant_tokens={self.constant_tokens}, "
                f"decay_tokens={self.decay_tokens}, warmup_tokens={self.warmup_tokens}, "
                f"plateaus={len(self.plateaus)}: all phases count either tokens or steps, and only the "
                "warm-up may be in steps before phases in tokens; convert one to the other"
            )
        if self.warmup_steps and self.warmup_tokens:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and warmup_tokens={self.warmup_tokens}: one "
                "warm-up is allowed; set one of them to 0"
            )

    def _check_decay(self) -> None:
        if self.decay not in _DECAYS:
            raise ValueError(
                f"schedule.decay={self.decay!r} is not a known shape: choose from {', '.join(_DECAYS)}; "
                "use 'none' to hold the last rate"
            )
        if (self.decay != "none") != bool(self.decay_tokens or self.decay_steps):
            raise ValueError(
                f"schedule.decay={self.decay!r} with decay_tokens={self.decay_tokens} and decay_steps="
                f"{self.decay_steps}: a decay needs a positive length and 'none' takes no length; set both "
                "or neither"
            )
        last_plateau_rate = _plateau_rates(self)[-1]
        allowed_floor = self.min_learning_rate >= 0 and self.min_learning_rate <= last_plateau_rate
        if self.decay != "none" and not allowed_floor:
            raise ValueError(
                f"schedule.min_learning_rate={self.min_learning_rate} is outside 0 to {last_plateau_rate}, "
                "the rate the decay starts from: a decay goes down; lower min_learning_rate or raise the "
                "rate before it"
            )
        if self.decay == "exponential" and not self.min_learning_rate > 0:
            raise ValueError(
                f"schedule.min_learning_rate={self.min_learning_rate} with an exponential decay: it never "
                "reaches zero, so the floor must be positive; set min_learning_rate, for example "
                "peak_learning_rate / 10"
            )

    def _check_ramp(self) -> None:
        starts = [stage.from_tokens for stage in self.batch_ramp]
        if not starts or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(
                f"schedule.batch_ramp starts at tokens {starts}: the first stage starts at 0 and each later "
                "one after the one before; order the stages and give the first from_tokens=0"
            )
        for stage in self.batch_ramp:
            if stage.global_batch_tokens <= 0:
                raise ValueError(
                    f"schedule.batch_ramp has global_batch_tokens={stage.global_batch_tokens} from token "
                    f"{stage.from_tokens}: a batch holds at least one sequence; set it to a multiple of "
                    "training.sequence_length"
                )


def learning_rate(config: ScheduleConfig, step: int, consumed_tokens: int) -> float:
    """Rate of the optimizer step about to be taken.

    `step` is the number of steps already taken and `consumed_tokens` the tokens consumed by them. The phases
    are consecutive: the constant phase begins where the warm-up ends. A warm-up in steps before phases in
    tokens ends, for the phases, at the tokens that many steps of the batch ramp hold.

    Source: MiniMax-01 (arXiv 2501.08313), section 4.2, for warm-up, constant, plateau and exponential decay.
    """
    warmup_fraction = _warmup_fraction(config, step, consumed_tokens)
    if warmup_fraction < 1:
        return config.peak_learning_rate * warmup_fraction
    if config.counts_steps:
        position = step - config.warmup_steps
    else:
        position = consumed_tokens - (config.warmup_tokens or tokens_after_steps(config, config.warmup_steps))
    rates = _plateau_rates(config)
    for rate, length in zip(rates, _plateau_lengths(config), strict=True):
        if position < length:
            return rate
        position -= length
    decay_length = config.decay_steps or config.decay_tokens
    if config.decay == "none":
        return rates[-1]
    return _decayed(config.decay, rates[-1], config.min_learning_rate, min(1.0, position / decay_length))


def global_batch_tokens(config: ScheduleConfig, consumed_tokens: int) -> int:
    """Tokens of the step taken after `consumed_tokens` tokens."""
    current = config.batch_ramp[0]
    for stage in config.batch_ramp:
        if stage.from_tokens <= consumed_tokens:
            current = stage
    return current.global_batch_tokens


def global_batch_samples(
    config: ScheduleConfig, consumed_tokens: int, sequence_length: int, multiple: int
) -> int:
    """Sequences of the step taken after `consumed_tokens` tokens.

    `multiple` is micro_batch_size * data-parallel size. The batch is never rounded: it belongs to the recipe,
    and a layout that would change it silently would also change the model.

    Raises: ValueError when the batch is not a whole number of `multiple` sequences.
    """
    tokens = global_batch_tokens(config, consumed_tokens)
    granule_tokens = sequence_length * multiple
    if tokens % granule_tokens:
        below = tokens // granule_tokens * granule_tokens
        neighbours = f"{below} or {below + granule_tokens}" if below else f"{granule_tokens}"
        raise ValueError(
            f"schedule.batch_ramp asks for {tokens} tokens per step from token {consumed_tokens} on, which "
            f"is not a multiple of {granule_tokens} = sequence_length {sequence_length} * {multiple} "
            f"(micro_batch_size * dp): choose {neighbours}, or another micro_batch_size or dp"
        )
    return tokens // sequence_length


def check_batch_ramp(config: ScheduleConfig, sequence_length: int, multiple: int) -> None:
    """Check every stage of the ramp before the run starts, so that none fails a week into it.

    Raises: ValueError as `global_batch_samples`.
    """
    for stage in config.batch_ramp:
        global_batch_samples(config, stage.from_tokens, sequence_length, multiple)


def tokens_after_steps(config: ScheduleConfig, num_steps: int) -> int:
    """Tokens consumed by the first `num_steps` steps of the batch ramp, in closed form per stage."""
    tokens = 0
    ends = [stage.from_tokens for stage in config.batch_ramp[1:]] + [None]
    for stage, end in zip(config.batch_ramp, ends, strict=True):
        stage_steps = num_steps
        if end is not None:
            stage_steps = min(num_steps, max(0, math.ceil((end - tokens) / stage.global_batch_tokens)))
        tokens += stage_steps * stage.global_batch_tokens
        num_steps -= stage_steps
    return tokens


def _warmup_fraction(config: ScheduleConfig, step: int, consumed_tokens: int) -> float:
    if config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.warmup_tokens:
        return (consumed_tokens + global_batch_tokens(config, consumed_tokens)) / config.warmup_tokens
    return 1.0


def _plateau_rates(config: ScheduleConfig) -> list[float]:
    return [config.peak_learning_rate] + [plateau.learning_rate for plateau in config.plateaus]


def _plateau_lengths(config: ScheduleConfig) -> list[int]:
    first = config.constant_steps or config.constant_tokens
    return [first] + [plateau.steps or plateau.tokens for plateau in config.plateaus]


def _decayed(decay: Decay, start: float, end: float, fraction: float) -> float:
    if decay == "linear":
        return start + (end - start) * fraction
    if decay == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))
    if decay == "exponential":
        return start * (end / start) ** fraction
    raise AssertionError(f"decay {decay!r} passed the checks of ScheduleConfig")


def _check_rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{name}={value}: a learning rate is a positive finite number; set it, for example, to 2e-4"
        )


def _check_lengths(owner: str, lengths: Mapping[str, Any]) -> None:
    for name, value in lengths.items():
        if value < 0:
            raise ValueError(
                f"{owner}.{name}={value}: a length is 0 or more; set it to 0 to leave the phase out"
            )
