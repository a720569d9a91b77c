"""Rows with needles at chosen depths, for evaluation: the loss counts on one answer alone."""

from collections.abc import Callable
from random import Random

import numpy as np

from data_pipeline.pack import PackedSample, RowBuilder
from data_pipeline.permute import derive_key
from data_pipeline.problems import SHRINK, TRIAL_WORDS
from data_pipeline.synthetic import needle, spread_needles
from data_pipeline.tokenize import DocumentEncoder


class NeedleRows:
    """Needle texts of any length; text number `trial` of a length and depth is a pure function of the seed."""

    def __init__(self, encoder: DocumentEncoder, seed: int, num_spread: int = 0) -> None:
        """num_spread: needles that `make_spread` hides in a text, at most one per city; 0 where it is not called."""
        self._encoder, self._seed, self._num_spread = encoder, seed, num_spread
        trial, _ = needle(Random(0), TRIAL_WORDS)
        self._words_per_token = TRIAL_WORDS / len(encoder.encode_one(trial))

    def make(self, tokens: int, depth: float, trial: int) -> PackedSample:
        """One row of `tokens` positions: a text that nearly fills it, and padding.

        Raises:
            ValueError: a needle and its question do not fit.
        """

        def write(words: int) -> tuple[str, list[str], int]:
            random = Random(derive_key(self._seed, "needle row", tokens, round(1000 * depth), trial))
            return *needle(random, words, depth), 0

        return self._row(tokens, trial, write)

    def make_spread(self, tokens: int, depth: float, trial: int) -> PackedSample:
        """Like `make`, with several needles at even depths, all of them asked for and answered in the row; the loss
        counts on the answer about the one at `depth`, given the right answers before it.

        Raises:
            ValueError: the needles and their question do not fit.
        """

        def write(words: int) -> tuple[str, list[str], int]:
            # one text for all depths: it holds a needle at each of them
            random = Random(derive_key(self._seed, "spread needles", tokens, trial))
            text, answers, places = spread_needles(random, words, self._num_spread)
            return text, answers, places.index(round(depth * (self._num_spread - 1)))

        return self._row(tokens, trial, write)

    def _row(
        self, tokens: int, trial: int, write: Callable[[int], tuple[str, list[str], int]]
    ) -> PackedSample:
        """The longest text that fits; `write` makes one of about so many words, its answers, and which one counts."""
        words = int(tokens * self._words_per_token)
        while True:
            text, answers, counted = write(words)
            prompt = self._encoder.encode_one(text)[:-1]
            pieces = [self._encoder.encode_one(f" {answer}")[:-1] for answer in answers]
            # a line end may be one token with what is before it: it ends the text, and never counts
            pieces[-1] = self._encoder.encode_one(f" {answers[-1]}\n")[:-1]
            both = np.concatenate([prompt, *pieces])
            if len(both) <= tokens:
                break
            if words < 1:
                raise ValueError(
                    f"a needle with its question has {len(both)} tokens and the row {tokens}: raise "
                    "long_context.needle_lengths"
                )
            words = int(words * min(SHRINK, tokens / len(both)))
        start = len(prompt) + sum(len(piece) for piece in pieces[:counted])
        places = np.arange(1, len(both))
        weights = (places >= start) & (places < start + len(pieces[counted]))
        # what follows the digits is not the needle
        weights[-1] = False
        row = RowBuilder(tokens)
        row.add(both, weights, len(both), len(both))
        return row.finish(trial)
