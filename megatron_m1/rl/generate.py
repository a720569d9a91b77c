"""Generation by the trainer's own model under the training layout: continuous batching over slots.

Every pass moves all sequences on: most by one token, newly placed ones by a part of their prompt. A sequence that ends
leaves its slot to the next request at once. Pipeline stages work on different slots at the same time: the slots are cut
into as many microbatches as there are stages. Data-parallel and context-parallel ranks are replicas, each with its
share of the requests; where experts are spread over them, all replicas pass in step until the last one is done.
A sample depends on weights, prompt, ids and seed alone, to rounding: not on the order of requests, slots or layout.
Legend: T tokens of a microbatch, n sequences that get a token, P vocabulary entries, S tokens of a sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_m1.model.cache import SequenceCache, extending
from megatron_m1.model.packed import Packed
from megatron_m1.model.routing import RoutingRecord
from megatron_m1.rl.draw import draw, sample_keys, uniforms
from megatron_m1.rl.experts_record import ExpertsRecord, Stretch
from megatron_m1.rl.sample import FinishReason, Prompt, Sample
from megatron_m1.rl.stop import RepetitionConfig, RepetitionStop
from parallel.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How samples are drawn and when they end."""

    window: int
    """Most tokens of prompt and answer together."""
    end_token: int
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    seed: int = 0
    slots: int = 32
    """Sequences that one replica generates at once."""
    prefill_tokens: int = 4096
    """Most prompt tokens of one pass and pipeline stage: bounds the memory of a pass."""
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    record_experts: bool = False
    """Note in every sample which experts its tokens took, so that training can take the same."""

    def __post_init__(self) -> None:
        for name in ("window", "slots", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.generation.{name}={getattr(self, name)}: it must be 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"rl.generation has temperature={self.temperature}, top_p={self.top_p}: allowed are temperature >= 0 "
                "and top_p in (0, 1]; temperature 1 and top_p 1 draw from the model itself"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One sample to generate, or to carry on with."""

    prompt: Prompt
    sample_id: int
    earlier: Sample | None = None
    """A cut sample of the same ids: its tokens are read like the prompt, and generation goes on behind them."""
    key: int | None = None
    """What its random numbers are made of, 64 bits; None: of the run's seed and both ids (`sample_keys`)."""
    max_tokens: int | None = None
    """Most tokens generated in this call, besides the window's own limit; the sample then ends with "length"."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """One pipeline stage's part of a pass."""

    tokens_T: torch.Tensor
    packed: Packed
    ends: list[int]
    """Where sequences end that get a token."""
    ready: list[_Sequence]
    """These sequences."""
    stretches: list[Stretch]
    """What the tokens are, padding left out."""


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A request in a slot."""

    request: Request
    slot: int
    feed: list[int]
    """Tokens that the cache has not seen yet; after them the next token is drawn."""
    followers: list[_Sequence] = field(default_factory=list)
    """Other samples of the same prompt: they take over this slot's cache once the prompt has been read."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None

    @property
    def ids(self) -> tuple[int, int]:
        """Prompt and sample."""
        return self.request.prompt.prompt_id, self.request.sample_id

    @property
    def num_earlier(self) -> int:
        """Generated tokens that an earlier call left."""
        return len(self.request.earlier.tokens_S) if self.request.earlier else 0

    @property
    def position(self) -> int:
        """Number of the next generated token."""
        return self.num_earlier + len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt.tokens_S) + self.position


class Generator:
    """Samples from a model on its training layout; every method is collective over all ranks.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        groups: process groups.
        config: how to draw and when to end.
        version: optimizer step of the weights, noted beside every token.
        text_of: decodes generated tokens.

    Raises:
        ValueError: the slots cannot be cut over the pipeline stages.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        groups: Groups,
        config: GenerationConfig,
        *,
        version: int,
        text_of: Callable[[np.ndarray], str],
    ) -> None:
        stages = groups.layout.pp
        if config.slots % stages:
            raise ValueError(
                f"rl.generation.slots={config.slots} is not a multiple of layout.pp={stages}: the stages work on equal "
                f"parts of the slots; choose a multiple of {stages}"
            )
        self._chunks, self._groups, self._config = list(chunks), groups, config
        self._version, self._text_of = version, text_of
        self._slots_per_stage = config.slots // stages
        self._unwrapped = [getattr(chunk, "module", chunk) for chunk in chunks]

    @torch.no_grad()
    def run(self, requests: Sequence[Request], *, max_passes: int | None = None) -> list[Sample]:
        """Generate all requests, or cut what is unfinished after `max_passes` passes; the same list on every rank.

        Args:
            requests: the same on every rank, at most one per (prompt, sample).
            max_passes: of the model, in which a sequence grows by at most one token each.

        Returns:
            Samples in the order of their requests; a cut one has finish None, and one that was never begun is missing.

        Raises:
            ValueError: a prompt leaves no room in the window.
        """
        self._check(requests)
        collection = self._groups.collection
        replica, replicas = collection.dp_cp.rank(), collection.dp_cp.size()
        for chunk in self._chunks:
            chunk.eval()
        record = ExpertsRecord(self._unwrapped, self._groups) if self._config.record_experts else None
        mine = _Replica(requests[replica::replicas], self._config, self._groups.device, record)
        passes = 0
        while self._any_busy(mine) and (max_passes is None or passes < max_passes):
            self._pass(mine)
            passes += 1
        experts = mine.recorded_experts()
        done = [self._sample_of(sequence, experts.get(sequence.ids)) for sequence in mine.touched()]
        by_replica: list[Any] = [done]
        if replicas > 1:
            by_replica = [None] * replicas
            dist.all_gather_object(by_replica, done, group=collection.dp_cp)
        found = {(sample.prompt_id, sample.sample_id): sample for samples in by_replica for sample in samples}
        keys = ((request.prompt.prompt_id, request.sample_id) for request in requests)
        return [found[key] for key in keys if key in found]

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            earlier = len(request.earlier.tokens_S) if request.earlier else 0
            room = self._config.window - len(request.prompt.tokens_S) - earlier
            if room < 1:
                raise ValueError(
                    f"prompt {request.prompt.prompt_id} has {len(request.prompt.tokens_S)} tokens and {earlier} "
                    f"generated ones: a window of {self._config.window} tokens leaves no room for an answer; drop the "
                    f"prompt, or raise the window to {self._config.window + 1 - room} or more"
                )

    def _any_busy(self, mine: _Replica) -> bool:
        """Whether this replica has work; with experts spread over replicas, whether any has."""
        if self._groups.layout.ep == 1:
            return mine.busy
        busy = torch.tensor(float(mine.busy), device=self._groups.device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return bool(busy)

    def _pass(self, mine: _Replica) -> None:
        """One forward pass over all slots and one drawn token for every sequence that has nothing left to read."""
        mine.fill_slots()
        plans = [mine.plan(stage, self._slots_per_stage) for stage in range(self._groups.layout.pp)]
        multiple = self._groups.layout.tp
        longest = max(1, *(sum(length for _, length in plan) for plan in plans))
        length = -(-longest // multiple) * multiple
        mine.cache.start(mine.cache.scratch)
        batches = [self._microbatch(mine, plan, length) for plan in plans]
        logits_nP = self._logits(batches)
        for batch in batches:
            mine.note_pass(batch)
        mine.deal(self._draw, [sequence for batch in batches for sequence in batch.ready], logits_nP)

    def _microbatch(self, mine: _Replica, plan: list[tuple[_Sequence, int]], length: int) -> _Batch:
        """The tokens of one stage's slots, padded to `length`."""
        # decode steps go first; a sequence that has read nothing yet is no decode step, even if it is one token long
        plan = sorted(plan, key=lambda item: (not _is_decode(item, mine.cache), item[0].slot))
        num_single = sum(_is_decode(item, mine.cache) for item in plan)
        tokens: list[int] = []
        ends, ready = [], []
        for sequence, count in plan:
            tokens += sequence.feed[:count]
            del sequence.feed[:count]
            if not sequence.feed:
                ends.append(len(tokens) - 1)
                ready.append(sequence)
        slots, lengths = [s.slot for s, _ in plan], [count for _, count in plan]
        if len(tokens) < length:
            slots.append(mine.cache.scratch)
            lengths.append(length - len(tokens))
            tokens += [0] * lengths[-1]
        packed = extending(mine.cache, slots, lengths, num_single)
        if self._config.record_experts:
            packed = replace(packed, record=RoutingRecord())
        stretches = [Stretch(s.ids, mine.cache.lengths[s.slot], count) for s, count in plan]
        return _Batch(torch.tensor(tokens, device=self._groups.device), packed, ends, ready, stretches)

    def _logits(self, batches: list[_Batch]) -> torch.Tensor | None:
        """fp32 [n, P] behind the ends of all microbatches, on the last stage; None on the others."""
        waiting = [iter(batches) for _ in self._chunks]

        def forward(data: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
            batch = next(data)

            def keep(logits_Tp: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
                return logits_Tp[batch.ends].float()

            return chunk(batch.tokens_T, batch.packed), keep

        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=waiting if len(waiting) > 1 else waiting[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(batches),
            # megatron-core divides it by cp, whose ranks generate on their own here
            seq_length=len(batches[0].tokens_T) * self._groups.layout.cp,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self._groups.is_last_stage:
            return None
        shares_np = torch.cat(outputs)
        tp = self._groups.collection.tp
        by_rank = [torch.empty_like(shares_np) for _ in range(tp.size())]
        dist.all_gather(by_rank, shares_np.contiguous(), group=tp)
        return torch.cat(by_rank, dim=1)

    def _draw(
        self, sequences: list[_Sequence], logits_nP: torch.Tensor | None, rows: list[int]
    ) -> tuple[list[int], list[float]]:
        """A token and its log-probability per sequence, from its row of the logits; the same on every stage."""
        drawn = torch.empty(2, len(sequences), dtype=torch.float64, device=self._groups.device)
        if logits_nP is not None:
            u = uniforms(self._keys(sequences), np.array([s.position for s in sequences]))
            tokens_n, log_probs_n = draw(
                logits_nP[rows],
                torch.from_numpy(u).to(logits_nP.device),
                temperature=self._config.temperature,
                top_p=self._config.top_p,
            )
            drawn = torch.stack([tokens_n.double(), log_probs_n.double()])
        pp = self._groups.collection.pp
        if pp.size() > 1:
            dist.broadcast(drawn, dist.get_global_rank(pp, pp.size() - 1), group=pp)
        tokens, log_probs = drawn.tolist()
        return [int(token) for token in tokens], log_probs

    def _keys(self, sequences: list[_Sequence]) -> np.ndarray:
        prompts_n, samples_n = np.array([s.ids for s in sequences]).T
        keys_n = sample_keys(self._config.seed, prompts_n, samples_n)
        for row, sequence in enumerate(sequences):
            if sequence.request.key is not None:
                keys_n[row] = sequence.request.key
        return keys_n

    def _sample_of(self, sequence: _Sequence, experts_WLk: np.ndarray | None) -> Sample:
        earlier = sequence.request.earlier
        tokens_S = np.array(sequence.tokens, dtype=np.int64)
        log_probs_S = np.array(sequence.log_probs, dtype=np.float32)
        versions_S = np.full(len(sequence.tokens), self._version, dtype=np.int32)
        if earlier is not None:
            tokens_S = np.concatenate([earlier.tokens_S, tokens_S])
            log_probs_S = np.concatenate([earlier.log_probs_S, log_probs_S])
            versions_S = np.concatenate([earlier.versions_S, versions_S])
            if experts_WLk is not None and earlier.experts_WLk is not None:
                # what was read again took the experts of newer weights; its log-probabilities are of the older ones
                experts_WLk[: len(earlier.experts_WLk)] = earlier.experts_WLk
        return Sample(
            prompt_id=sequence.request.prompt.prompt_id,
            sample_id=sequence.request.sample_id,
            tokens_S=tokens_S,
            log_probs_S=log_probs_S,
            versions_S=versions_S,
            finish=sequence.finish,
            text=self._text_of(tokens_S),
            experts_WLk=experts_WLk,
        )


def _is_decode(item: tuple[_Sequence, int], cache: SequenceCache) -> bool:
    return item[1] == 1 and cache.lengths[item[0].slot] > 0


class _Replica:
    """One replica's queue, slots, caches, and record of experts if one is kept."""

    def __init__(
        self,
        requests: Sequence[Request],
        config: GenerationConfig,
        device: torch.device,
        record: ExpertsRecord | None,
    ) -> None:
        self._config, self._record = config, record
        self._queue = deque(requests)
        self._busy: dict[int, _Sequence] = {}
        self._ended: list[_Sequence] = []
        self.cache = SequenceCache(config.slots, config.window, device)
        self._repetition = RepetitionStop(
            config.repetition, window_tokens=config.window, slots=config.slots, device=torch.device("cpu")
        )

    @property
    def busy(self) -> bool:
        """Whether a request waits or a slot is at work."""
        return bool(self._queue or self._busy)

    def touched(self) -> list[_Sequence]:
        """Every sequence that has ended or has at least one token."""
        return [*self._ended, *(s for s in self._busy.values() if s.position)]

    def recorded_experts(self) -> dict[tuple[int, int], np.ndarray]:
        """Experts of all tokens that were read of every touched sequence; collective over tp and pp."""
        if self._record is None:
            return {}
        # the last token drawn was not read
        return self._record.gather({sequence.ids: sequence.length - 1 for sequence in self.touched()})

    def note_pass(self, batch: _Batch) -> None:
        """Count what a pass has read, and keep which experts it took."""
        self.cache.advance(batch.packed)
        if self._record is not None and batch.packed.record is not None:
            self._record.note(batch.packed.record, batch.stretches, len(batch.tokens_T))

    def fill_slots(self) -> None:
        """Give free slots to waiting requests; samples of one prompt that start together read it once."""
        leaders: dict[int, _Sequence] = {}
        for slot in range(self._config.slots):
            if slot in self._busy or not self._queue:
                continue
            request = self._queue.popleft()
            sequence = _Sequence(request=request, slot=slot, feed=[])
            self._busy[slot] = sequence
            self.cache.start(slot)
            earlier = request.earlier
            leader = leaders.get(request.prompt.prompt_id) if earlier is None else None
            if leader is not None:
                leader.followers.append(sequence)
                continue
            sequence.feed = request.prompt.tokens_S.tolist() + (earlier.tokens_S.tolist() if earlier else [])
            if earlier is None:
                leaders[request.prompt.prompt_id] = sequence

    def plan(self, stage: int, slots_per_stage: int) -> list[tuple[_Sequence, int]]:
        """(sequence, tokens to read now) of the slots of one pipeline stage's microbatch."""
        budget = self._config.prefill_tokens
        chosen = []
        for slot in range(stage * slots_per_stage, (stage + 1) * slots_per_stage):
            sequence = self._busy.get(slot)
            if sequence is None or not sequence.feed:
                continue
            # decode steps always go; prompts share the budget, the rest of them waits for the next pass
            count = 1 if len(sequence.feed) == 1 else min(len(sequence.feed), budget)
            if count:
                chosen.append((sequence, count))
                budget -= count if count > 1 else 0
        return chosen

    def deal(
        self,
        draw_tokens: Callable[..., tuple[list[int], list[float]]],
        ready: list[_Sequence],
        logits_nP: torch.Tensor | None,
    ) -> None:
        """Draw a token for every sequence that has read all it has, and for those that waited for its prompt."""
        receivers, rows = [], []
        for row, sequence in enumerate(ready):
            for follower in sequence.followers:
                self.cache.copy(sequence.slot, follower.slot)
                if self._record is not None:
                    self._record.copy(sequence.ids, follower.ids)
            receivers += [sequence, *sequence.followers]
            rows += [row] * (1 + len(sequence.followers))
            sequence.followers = []
        if not receivers:
            return
        tokens, log_probs = draw_tokens(receivers, logits_nP, rows)
        for sequence in receivers:
            if not sequence.tokens:
                earlier = sequence.request.earlier
                self._repetition.start(sequence.slot, earlier.log_probs_S if earlier else None)
        log_probs_B = torch.zeros(self._config.slots)
        log_probs_B[[s.slot for s in receivers]] = torch.tensor(log_probs)
        repeats_B = self._repetition.update(log_probs_B)
        for sequence, token, log_prob in zip(receivers, tokens, log_probs, strict=True):
            sequence.tokens.append(token)
            sequence.log_probs.append(log_prob)
            sequence.feed = [token]
            sequence.finish = self._finish(sequence, token, bool(repeats_B[sequence.slot]))
            if sequence.finish:
                self._ended.append(self._busy.pop(sequence.slot))

    def _finish(self, sequence: _Sequence, token: int, repeats: bool) -> FinishReason | None:
        if token == self._config.end_token:
            return "stop"
        if repeats:
            return "repetition"
        most = sequence.request.max_tokens
        is_full = sequence.length >= self._config.window or (
            most is not None and len(sequence.tokens) >= most
        )
        return "length" if is_full else None
