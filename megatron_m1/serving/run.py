"""`m1 serve` and `m1 generate` from start to end, on every rank; they start their own local ranks like `m1 train`.

`opened_model` is what every command that generates begins with.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_m1.config import RunConfig, check_across_sections
from megatron_m1.rl.draw import sample_keys
from megatron_m1.rl.generate import Request
from megatron_m1.rl.sample import Prompt
from megatron_m1.serving.desk import Desk
from megatron_m1.serving.http import LOOPBACK, Server
from megatron_m1.serving.model import Drawing, Limits, ServedModel, config_of
from parallel import cpu
from parallel.groups import create_groups
from parallel.launch import connect, read_environment, run_local_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


def serve(run: str, overrides: Sequence[str], address: Address, window: int, slots: int) -> None:
    """Serve a run's newest weights until a signal ends it.

    Raises:
        ValueError: no checkpoint, a port that is taken, or a layout that does not fit.
        SystemExit: a local rank failed.
    """
    options = ["--host", address.host, "--port", str(address.port)]
    options += ["--window", str(window), "--slots", str(slots)]
    with opened_model(["serve", run, *overrides, *options], run, overrides, window, slots) as model:
        if model is None:
            return
        desk = Desk()
        is_first = dist.get_rank() == 0
        for number in (signal.SIGTERM, signal.SIGINT):
            # the other ranks end when rank 0 tells them: one that leaves first would leave the others in a collective
            signal.signal(number, (lambda *_: desk.close()) if is_first else signal.SIG_IGN)
        if not is_first:
            desk.serve(model)
            return
        with Server(model, desk, model.config.name, address.host, address.port) as server:
            reach = "this machine only" if address.host in LOOPBACK else "EVERYONE who reaches this address"
            print(
                f"step {model.step} of {model.config.run_dir}, loaded in {model.load_s:.2f} s, serves as "
                f"{model.config.name!r} on {server.url}, for {reach}, without authentication",
                flush=True,
            )
            desk.serve(model)


def generate(run: str, overrides: Sequence[str], prompt: str, drawing: dict[str, float], most: int) -> None:
    """Print one continuation of a prompt.

    Args:
        run: a run directory, a preset, or a run file.
        overrides: laid over it.
        prompt: a text.
        drawing: temperature, top_p, and seed.
        most: tokens at most.
    """
    options = [f"--prompt={prompt}", "--max-tokens", str(most)]
    for name, value in drawing.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    with opened_model(["generate", run, *overrides, *options], run, overrides, 0, 1) as model:
        if model is None:
            return
        tokens = np.array(model.coder.tokens(prompt), dtype=np.int64)
        asked = Prompt(prompt_id=0, tokens_S=tokens, text=prompt, task="generate")
        key = int(sample_keys(int(drawing["seed"]), np.zeros(1), np.zeros(1))[0])
        (sample,) = model.generate(
            [Request(prompt=asked, sample_id=0, key=key, max_tokens=most)],
            Drawing(
                temperature=drawing["temperature"],
                top_p=drawing["top_p"],
                end_token=model.coder.end_token,
            ),
        )
        if dist.get_rank() == 0:
            print(prompt + sample.text)


@contextmanager
def opened_model(
    command: Sequence[str], run: str, overrides: Sequence[str], window: int, slots: int
) -> Iterator[ServedModel | None]:
    """The model on this rank; None in the process that started the ranks, once they have ended.

    Args:
        command: what follows `m1` on the command line of a rank.
        run: a run directory, a preset, or a run file.
        overrides: laid over it.
        window: most tokens of prompt and answer; 0: training.sequence_length.
        slots: sequences generated at once; rounded up to a multiple of the pipeline stages.

    Raises:
        ValueError: no checkpoint, or a layout that does not fit.
        SystemExit: a local rank failed.
    """
    launch = read_environment()
    config = config_of(run, overrides)
    if launch.launcher == "single" and config.layout.world_size > 1:
        code = run_local_ranks(config.layout.world_size, command)
        if code:
            raise SystemExit(code)
        yield None
        return
    cpu.install()
    logging.basicConfig(
        level=logging.INFO if launch.rank == 0 else logging.WARNING, format=f"[r{launch.rank}] %(message)s"
    )
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    connect(launch)
    try:
        config = _fitted(config, launch.world_size)
        groups = create_groups(config.layout, launch.device)
        stages = config.layout.pp
        limits = Limits(window=window or config.training.sequence_length, slots=-(-slots // stages) * stages)
        yield ServedModel(config, groups, limits)
    finally:
        dist.destroy_process_group()


def _fitted(config: RunConfig, world_size: int) -> RunConfig:
    config = config.model_copy(update={"layout": config.layout.fit_to_world(world_size)})
    check_across_sections(config)
    return config
