"""Before ranks build anything together each says that it is there and what it was given.

torch's own start waits half an hour and then names a key of its store; here whoever does not come, or was given another
run than rank 0, is named on every rank. How long is a start of the whole job: containers, imports, a file system that
all of them read at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from datetime import timedelta

import torch.distributed as dist

START_PATIENCE_S = 600.0
_VERDICT = "arrival/verdict"
_FAREWELL_S = 10.0
_SHOWN = 8


class ArrivalError(RuntimeError):
    """The ranks of a job do not come together; the message says who is missing and what to do."""


def open_store(
    address: str, port: int, *, rank: int, keeps: bool, patience_s: float = START_PATIENCE_S
) -> dist.TCPStore:
    """The store at which all ranks meet, once somebody keeps it.

    keeps: this process is to keep it for all.

    Raises:
        ArrivalError: the port is taken, or nobody keeps the store within `patience_s`.
    """
    try:
        return dist.TCPStore(
            address,
            port,
            is_master=keeps,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=patience_s),
        )
    except dist.DistError as error:
        why = str(error).splitlines()[0]
        if keeps:
            raise ArrivalError(
                f"rank {rank} cannot keep the meeting place at {address}:{port} ({why}): the port must be free on "
                "its node; end what is left there of an earlier start, or set another MASTER_PORT"
            ) from error
        raise ArrivalError(
            f"rank {rank} finds nobody at {address}:{port} ({why}): rank 0 must be there within {patience_s:g} s of "
            "the others; its log says why it is not, or the network keeps the nodes apart"
        ) from error


def all_arrive(
    store: dist.Store,
    *,
    rank: int,
    world_size: int,
    node: str,
    run: str = "",
    patience_s: float = START_PATIENCE_S,
) -> None:
    """Wait until all ranks are there with the same `run`; collective, on nothing but the store.

    node: where this rank is. run: text that must be equal on all ranks, such as the resolved run file.

    Raises:
        ArrivalError: some rank has not come within `patience_s` of this one, or was given another run.
    """
    digest = hashlib.sha256(run.encode()).hexdigest()[:12]
    store.set(f"arrival/{rank}", json.dumps([node, digest]))
    if rank:
        verdict = _verdict_of_first_rank(store, patience_s)
    else:
        verdict = _judge(store, world_size, patience_s)
        store.set(_VERDICT, verdict)
    store.set(f"arrival/{rank}/heard", "")
    if verdict and not rank:
        # this process may keep the store: it must not go before the others have read why
        _is_there(store, [f"arrival/{other}/heard" for other in _arrived(store, world_size)], _FAREWELL_S)
    if verdict:
        raise ArrivalError(verdict)


def _verdict_of_first_rank(store: dist.Store, patience_s: float) -> str:
    began = time.monotonic()
    if not _is_there(store, ["arrival/0"], patience_s):
        return _not_come([0], {}, time.monotonic() - began)
    # as long as rank 0 waits for the last one, and what it takes to look at all
    if not _is_there(store, [_VERDICT], patience_s + _FAREWELL_S):
        return (
            f"rank 0 has not said whether all ranks are there within {time.monotonic() - began:.0f} s: it must stay "
            "until all have come; its log says why it left"
        )
    return store.get(_VERDICT).decode()


def _judge(store: dist.Store, world_size: int, patience_s: float) -> str:
    """What is wrong with those that have come, and with those that have not; empty when nothing is."""
    began = time.monotonic()
    _is_there(store, [f"arrival/{rank}" for rank in range(world_size)], patience_s)
    arrived = _arrived(store, world_size)
    missing = [rank for rank in range(world_size) if rank not in arrived]
    if missing:
        return _not_come(missing, arrived, time.monotonic() - began)
    own = arrived[0][1]
    other = [rank for rank, (_, digest) in arrived.items() if digest != own]
    if other:
        return (
            f"{_ranks(other)} (first on {arrived[other[0]][0]}) read another run than rank 0 on {arrived[0][0]} "
            f"({arrived[other[0]][1]}, not {own}): all ranks of a start must read the same run file; it was changed "
            "while they started, or a node sees an old copy; start again"
        )
    return ""


def _not_come(missing: list[int], arrived: dict[int, tuple[str, str]], waited_s: float) -> str:
    nodes = sorted({node for node, _ in arrived.values()})
    there = f"; there are {_ranks(list(arrived))} on {', '.join(nodes[:_SHOWN])}" if arrived else ""
    return (
        f"{_ranks(missing)} did not come within {waited_s:.0f} s{there}: a job starts with all its ranks; the log of "
        "the missing one says why, and without a log its node did not start it: exclude the node"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _arrived(store: dist.Store, world_size: int) -> dict[int, tuple[str, str]]:
    """rank -> its node and the digest of its run, of those that are there."""
    there = [rank for rank in range(world_size) if store.check([f"arrival/{rank}"])]
    return {rank: tuple(json.loads(store.get(f"arrival/{rank}"))) for rank in there}


def _is_there(store: dist.Store, keys: list[str], patience_s: float) -> bool:
    """Whether all keys are set within a time."""
    try:
        store.wait(keys, timedelta(seconds=max(patience_s, 0.01)))
    except dist.DistError:
        return False
    return True
