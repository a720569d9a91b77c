"""megatron-core 0.16.1 on a machine without CUDA. Active only there; on a GPU nothing here runs.

megatron-core takes CUDA for granted in places. Everything replaced here would raise on a machine without CUDA, so
no working path changes. The rest of the tree does not know about it. What is replaced, and why:

- the name `torch` inside megatron-core's own modules becomes a view of torch whose `cuda` namespace answers for
  the CPU (current_device, streams, events, random state) and whose factories read device="cuda" as the CPU.
  `torch` itself is left alone: no other library sees a difference.
- `tensor_parallel.random._get_cuda_rng_state / _set_cuda_rng_state`: the CPU generator's state, which is what
  dropout and activation recompute draw from here.
- `Tensor.type()` inside three optimizer functions: they compare with 'torch.cuda.FloatTensor' and the like.
- `moe_utils.maybe_move_tensor_to_cpu`: converts only CUDA tensors, so the dispatcher got a tensor for an array.
- `param_and_grad_buffer` needs nothing: gloo has the collectives it uses.

Measured facts behind the list: every call site was found by running it on gloo and reading the traceback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MODULES_THAT_TOUCH_CUDA = (
    "megatron.core.utils",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)

_CPU = torch.device("cpu")


class _Event:
    """CPU work is done when the call returns, so an event has always happened."""

    def __init__(self, **_options: object) -> None: ...
    def record(self, _stream: object = None) -> None: ...
    def wait(self, _stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream(_Event):
    """One queue, in order: waiting for it is a no-op, and every stream is the current one."""

    def wait_stream(self, _other: object) -> None: ...
    def wait_event(self, _event: object) -> None: ...
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _CpuCuda(ModuleType):
    """torch.cuda as seen from megatron-core on a machine without it."""

    Stream = _Stream
    Event = _Event

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: _CPU
        self.current_stream = self.default_stream = lambda *_: _Stream()
        self.stream = lambda _stream: contextlib.nullcontext()
        self.synchronize = self.set_device = self.empty_cache = lambda *_: None
        self.manual_seed = torch.manual_seed
        self.get_rng_state = lambda *_, **__: torch.get_rng_state()
        self.set_rng_state = lambda state, *_: torch.set_rng_state(state)
        self.device_count = lambda: 1

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _CpuTorch(ModuleType):
    """torch as seen from megatron-core: device="cuda" means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*arguments: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = _CPU
            options.pop("pin_memory", None)
        return factory(*arguments, **options)

    return create


class _CpuTypesReadAsCuda(TorchFunctionMode):
    """Inside it, Tensor.type() of a CPU tensor gives the name of the CUDA type of the same dtype."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _reading_types_as_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with _CpuTypesReadAsCuda():
            return function(*arguments, **options)

    return call


def _move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@functools.cache
def install() -> bool:
    """Make megatron-core run on this machine when it has no CUDA; True when something was replaced.

    Call it before the first use of megatron-core in a process. Idempotent.
    """
    if torch.cuda.is_available():
        return False
    # its fused functions are torch.compile'd when they are imported: without a GPU they must stay eager
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    view = _CpuTorch()
    for name in _MODULES_THAT_TOUCH_CUDA:
        module = importlib.import_module(name)
        if getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    _replace_random_state()
    _replace_type_checks()
    for name in ("moe_utils", "token_dispatcher"):
        sys.modules[f"megatron.core.transformer.moe.{name}"].maybe_move_tensor_to_cpu = _move_to_host  # type: ignore[attr-defined]
    return True


def _replace_random_state() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]


def _replace_type_checks() -> None:
    clip = importlib.import_module("megatron.core.optimizer.clip_grads")
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    sharded = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    checked = _reading_types_as_cuda(clip.clip_grad_by_total_norm_fp32)
    clip.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = checked  # type: ignore[attr-defined]
    mixed = optimizer.Float16OptimizerWithFloat16Params
    mixed.__init__ = _reading_types_as_cuda(mixed.__init__)
    zero = sharded.DistributedOptimizer
    zero.__init__ = _reading_types_as_cuda(zero.__init__)
