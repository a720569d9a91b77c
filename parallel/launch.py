"""How this process was started: torchrun, srun, or alone. The only reader of environment variables.

Gives rank, world size, device and backend, and starts local ranks when a layout needs more than one process and
no launcher has been used.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from parallel.arrival import START_PATIENCE_S, all_arrive, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Place of this process in the job."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    """"torchrun" (also our own local ranks), "srun", or "single"."""

    @property
    def device(self) -> torch.device:
        """The device of this rank: its GPU when CUDA is present, the CPU otherwise."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    @property
    def backend(self) -> str:
        """Process group backend that fits the device."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def read_environment(environment: Mapping[str, str] = os.environ) -> Launch:
    """Find out who started this process.

    torchrun's variables win over Slurm's, because a torchrun inside an allocation sees both; Slurm's count only
    inside a step that srun started (SLURM_STEP_ID), because a bare `m1` in a batch script sees SLURM_PROCID=0 too.

    Raises:
        ValueError: a launcher's variable is present but is not a number.
    """
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    }
    for launcher, variables in names.items():
        if variables[0] not in environment or (launcher == "srun" and "SLURM_STEP_ID" not in environment):
            continue
        values = [_whole_number(name, environment.get(name, "missing")) for name in variables]
        return Launch(rank=values[0], world_size=values[1], local_rank=values[2], launcher=launcher)
    return Launch(rank=0, world_size=1, local_rank=0, launcher="single")


def job_ends_at_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix time at which the batch system ends this job; None where no limit is known."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Name of the machine that this process runs on: Slurm's where it has one, else the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def meeting_place(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Address and port at which the ranks of this job meet.

    Raises:
        ValueError: the launcher has not set them.
    """
    address = environment.get("MASTER_ADDR")
    if address is None:
        raise ValueError(
            "MASTER_ADDR is not set: every rank needs the address of rank 0; export MASTER_ADDR and MASTER_PORT, or "
            "start through torchrun or the scripts in slurm/"
        )
    return address, _whole_number("MASTER_PORT", environment.get("MASTER_PORT", "missing"))


def _whole_number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(
            f"environment variable {name}={text!r} is not a whole number: torchrun and srun set it to 0 or more; "
            "start through one of them, or unset it to run alone"
        )
    return int(text)


def connect(
    launch: Launch, *, run: str = "", arrived: Callable[[], None] = lambda: None, timeout_s: float = 1800.0
) -> None:
    """Join the job's default process group and bind this process to its device, once all ranks are there.

    run: text that must be equal on all ranks, such as the resolved run file. arrived: called when all ranks are there,
    before they connect to each other. timeout_s: of every collective.

    Raises:
        ValueError: several ranks, but no rendezvous address in the environment.
        ArrivalError: some rank did not come in time, or was given another run.
    """
    # One hardware queue keeps a collective that was started first ahead of the product that hides it; read when CUDA
    # starts, and what megatron-core asks for under sequence parallelism. A user may set another.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
    # the journal of the last collectives that parallel/hang.py reads; a user may set a longer one
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # alone there is nobody to meet: no address, no port
    store = torch.distributed.HashStore() if launch.world_size == 1 else _meet(launch, run, timeout_s)
    arrived()
    torch.distributed.init_process_group(
        launch.backend,
        rank=launch.rank,
        world_size=launch.world_size,
        store=store,
        timeout=timedelta(seconds=timeout_s),
    )


def _meet(launch: Launch, run: str, timeout_s: float) -> torch.distributed.Store:
    """The store of a job whose ranks have all arrived."""
    address, port = meeting_place()
    launcher_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience_s = min(START_PATIENCE_S, timeout_s)
    meeting = open_store(
        address,
        port,
        rank=launch.rank,
        keeps=launch.rank == 0 and not launcher_keeps_it,
        patience_s=patience_s,
    )
    # torchrun keeps its store when it starts the ranks again: what dead ranks left there is not for their successors
    store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), meeting)
    all_arrive(
        store,
        rank=launch.rank,
        world_size=launch.world_size,
        node=node_name(),
        run=run,
        patience_s=patience_s,
    )
    store.set_timeout(timedelta(seconds=timeout_s))
    # as torch has it, so that no key of the groups is one of the launcher's
    return torch.distributed.PrefixStore("default_pg", store)


def host_local_ranks(world_size: int) -> tuple[torch.distributed.TCPStore, dict[str, str]]:
    """A meeting place for ranks on this machine, kept by this process, and the environment that points to it.

    The port is taken here and now: a free port handed to rank 0 may be gone when rank 0 has started. Keep the store
    until the ranks have ended.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        # torchrun's word for "the launcher keeps the store"
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def threads_per_rank(world_size: int, environment: Mapping[str, str]) -> str:
    """OMP_NUM_THREADS of ranks that share this machine's cores: what the user asked for, else an equal share."""
    return environment.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // world_size))


def run_local_ranks(world_size: int, arguments: Sequence[str], *, grace_s: float = 60.0) -> int:
    """Run `python -m megatron_m1 ARGUMENTS` once per rank on this machine; the exit code of the job.

    The first rank that fails ends the others (TERM, then KILL after `grace_s`), so no rank waits in a
    collective for a peer that is gone. SIGTERM and SIGUSR1 to this process are passed on to every rank.
    """
    store, shared = host_local_ranks(world_size)
    if not torch.cuda.is_available():
        shared |= {"OMP_NUM_THREADS": threads_per_rank(world_size, os.environ), "GLOO_SOCKET_IFNAME": "lo"}
        # what parallel/cpu.py needs anyway: set before megatron-core is imported, it saves the import of a compiler
        shared["TORCHDYNAMO_DISABLE"] = "1"
    command = [sys.executable, "-m", "megatron_m1", *arguments]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _wait_for_all(ranks, grace_s)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        _end(ranks, grace_s)
        for number, handler in previous.items():
            signal.signal(number, handler)
        del store


def _wait_for_all(ranks: list[subprocess.Popen], grace_s: float) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code not in (None, 0)]
        if failed:
            _end(ranks, grace_s)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen], grace_s: float) -> None:
    running = [process for process in ranks if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + grace_s
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
