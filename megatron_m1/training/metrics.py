"""What one optimizer step reports, with units in the names; one set of numbers for the record, MLflow and the
screen.

Where the numbers go is not decided here: spool.py writes them, tracking.py sends them, progress.py shows
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Numbers of one optimizer step, already reduced over the ranks; None where a quantity does not exist."""

    step: int
    """Optimizer steps taken, this one included: the first step of a run is 1."""
    loss_nats: float
    """Mean cross-entropy per loss token of the global batch."""
    learning_rate: float
    """Rate this step was taken with."""
    consumed_samples: int
    """Sequences consumed since the run began, this step included."""
    consumed_tokens: int
    """Tokens consumed since the run began, this step included."""
    step_time_s: float
    """Wall time of the step."""
    tokens_per_s: float
    """Tokens of the global batch over the step's wall time, all devices together."""
    auxiliary_loss: float | None = None
    """Load-balancing loss of the MoE layers, before its coefficient is applied."""
    grad_norm: float | None = None
    """Global L2 norm of the gradient before clipping."""
    model_tflops_per_s: float | None = None
    """Floating-point operations the model itself needs, recomputation not counted, all devices together."""
    mfu: float | None = None
    """model_tflops_per_s over the peak of all devices; only where the peak is known."""
    sample_ids_hash: str | None = None
    """Hash of the global sample numbers of this step, for proving the data order."""
    extra: Mapping[str, float | int | str] = field(default_factory=dict)
    """Further numbers, per source or per expert: keys carry units, a slash groups (`loss_nats/python`)."""

    def __post_init__(self) -> None:
        taken = _FIELD_NAMES & self.extra.keys()
        assert not taken, f"extra metrics {sorted(taken)} would overwrite fields of StepMetrics"

    def values(self) -> dict[str, Any]:
        """Flat mapping of everything but the step, without the quantities that do not exist."""
        named = {name: getattr(self, name) for name in _VALUE_NAMES}
        return {name: value for name, value in named.items() if value is not None} | dict(self.extra)


_RESERVED_NAMES = frozenset({"kind", "life", "time_ms"})
_FIELD_NAMES = frozenset(field.name for field in fields(StepMetrics)) | _RESERVED_NAMES
_VALUE_NAMES = tuple(field.name for field in fields(StepMetrics) if field.name not in ("step", "extra"))


def throughput(
    *,
    num_tokens: int,
    step_time_s: float,
    flops_per_token: float,
    num_devices: int,
    peak_tflops_per_s_per_device: float | None,
) -> dict[str, float]:
    """Rates of one step, by their names in `StepMetrics`; `mfu` is left out where the device's peak is not "
    "known."""
    tokens_per_s = num_tokens / step_time_s
    rates = {"tokens_per_s": tokens_per_s, "model_tflops_per_s": tokens_per_s * flops_per_token / 1e12}
    if peak_tflops_per_s_per_device is not None:
        rates["mfu"] = rates["model_tflops_per_s"] / (num_devices * peak_tflops_per_s_per_device)
    return rates
