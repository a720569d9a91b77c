"""Problems made by rule, each with its checker: copy, needles, multi-hop, arithmetic, key-value recall.

For tests and long-context work: the answer is known, the length is chosen, and problem `number` of a task is
a pure function of (seed, number, length). The haystack tasks follow the idea of RULER (arXiv 2404.06654);
texts and rules are our own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from data_pipeline.permute import derive_key

FILLER = (
    "The river was calm that morning and the boats stayed in the harbour.",
    "Several people waited at the station, although no train was announced.",
    "A gardener explained how the old roses had been moved to the south wall.",
    "The library closed early because the heating had failed again.",
    "Nobody remembered who had painted the small house at the corner.",
    "After the rain the road to the village was covered with leaves.",
    "The committee met twice and agreed on nothing of importance.",
    "In the workshop a clock was ticking louder than usual.",
    "The recipe asks for two eggs, but one is enough in winter.",
    "Children were drawing a map of the valley with coloured chalk.",
)
CITIES = ("Aarhus", "Bergen", "Cadiz", "Dresden", "Evora", "Fukuoka", "Ghent", "Hobart", "Izmir", "Jaipur")
WORDS = (
    "amber",
    "birch",
    "copper",
    "dune",
    "ember",
    "fjord",
    "grove",
    "heron",
    "iris",
    "juniper",
    "kelp",
    "lark",
)
NUM_NEEDLES = 4
NUM_HOPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question with its answer."""

    task: str
    """A key of `TASKS`."""
    prompt: str
    """What the model reads; ends right before the answer."""
    answer: tuple[str, ...]
    """The items of the right answer, in the order that was asked for."""

    @property
    def text(self) -> str:
        """Prompt and right answer, as a document to train on."""
        return f"{self.prompt} {' '.join(self.answer)}\n"


def make_problem(task: str, seed: int, number: int, length_words: int) -> Problem:
    """Problem `number` of a task, with about `length_words` words before the question.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task='{task}' is unknown: there are {', '.join(TASKS)}; choose one of them")
    random = Random(derive_key(seed, task, number, length_words))
    prompt, answer = TASKS[task](random, length_words)
    return Problem(task=task, prompt=prompt, answer=tuple(answer))


def score(problem: Problem, completion: str) -> float:
    """The share of the answer's items that a completion gives at their place, 0 to 1.

    Only the completion's first line counts, or what follows the last "Answer:" in it. A completion with
    more items than the answer scores 0: naming everything is not recall.
    """
    given_text = completion.rpartition("Answer:")[2].strip()
    given = re.findall(r"-?\w+", given_text.partition("\n")[0])
    if len(given) > len(problem.answer):
        return 0.0
    right = sum(one == other for one, other in zip(given, problem.answer, strict=False))
    return right / len(problem.answer)


def copy(random: Random, length_words: int) -> tuple[str, list[str]]:
    """Repeat a sequence of words."""
    words = [choose(random, WORDS) for _ in range(max(1, length_words))]
    return f"Copy these words: {' '.join(words)}\nAnswer:", words


def needle(random: Random, length_words: int, depth: float | None = None) -> tuple[str, list[str]]:
    """Find one number of two digits among other sentences, at a depth of 0 to 1 or anywhere."""
    number = str(10 + below(random, 90))
    fact = f"The secret number is {number}."
    sentences = filler(random, length_words - len(fact.split()))
    place = below(random, len(sentences) + 1) if depth is None else round(depth * len(sentences))
    sentences.insert(place, fact)
    return f"{' '.join(sentences)}\nWhat is the secret number?\nAnswer:", [number]


def needles(random: Random, length_words: int) -> tuple[str, list[str]]:
    """Find the numbers of several cities among other sentences, in the order of the question."""
    cities = shuffled(random, CITIES)[:NUM_NEEDLES]
    numbers = distinct_numbers(random, NUM_NEEDLES)
    facts = [f"The code of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    order = shuffled(random, range(NUM_NEEDLES))
    text = hidden(random, facts, length_words)
    return _asked([text], [cities[place] for place in order]), [numbers[place] for place in order]


def spread_needles(random: Random, length_words: int, count: int) -> tuple[str, list[str], list[int]]:
    """The task `needles` with its facts at even depths, the first at the beginning and the last at the end.

    Returns:
        The prompt, the numbers in the order of the question, and of each the place of its fact in the text, from 0.
    """
    cities = shuffled(random, CITIES)[:count]
    numbers = distinct_numbers(random, count)
    facts = [f"The code of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    sentences = filler(random, length_words - sum(len(fact.split()) for fact in facts))
    num_sentences = len(sentences)
    for place in reversed(range(count)):
        sentences.insert(round(place / max(1, count - 1) * num_sentences), facts[place])
    order = shuffled(random, range(count))
    return _asked(sentences, [cities[place] for place in order]), [numbers[place] for place in order], order


def _asked(sentences: Sequence[str], cities: Sequence[str]) -> str:
    return f"{' '.join(sentences)}\nWhat are the codes of {', '.join(cities)}, in this order?\nAnswer:"


def multi_hop(random: Random, length_words: int) -> tuple[str, list[str]]:
    """Follow a chain of boxes to the number in the last one; the links are in any order, with a false chain."""
    names = [f"{word}{number}" for number, word in enumerate(shuffled(random, WORDS))][: 2 * NUM_HOPS]
    numbers = distinct_numbers(random, 2)
    facts = []
    for start, number in ((0, numbers[0]), (NUM_HOPS, numbers[1])):
        chain = names[start : start + NUM_HOPS]
        facts += [
            f"Box {one} holds what box {two} holds." for one, two in zip(chain, chain[1:], strict=False)
        ]
        facts.append(f"Box {chain[-1]} holds {number}.")
    text = hidden(random, shuffled(random, facts), length_words)
    return f"{text}\nWhat does box {names[0]} hold?\nAnswer:", [numbers[0]]


def arithmetic(random: Random, length_words: int) -> tuple[str, list[str]]:
    """Add, subtract and multiply from left to right; about one operation per three words of length."""
    value = below(random, 100)
    steps = [f"Start with {value}."]
    for _ in range(max(1, length_words // 3)):
        operand, operation = 1 + below(random, 20), below(random, 3)
        if operation == 0:
            value, step = value + operand, f"Add {operand}."
        elif operation == 1:
            value, step = value - operand, f"Subtract {operand}."
        else:
            value, step = value * operand % 1000, f"Multiply by {operand} and keep the remainder of 1000."
        steps.append(step)
    return f"{' '.join(steps)}\nWhat is the result?\nAnswer:", [str(value)]


def key_value(random: Random, length_words: int) -> tuple[str, list[str]]:
    """Recall the value of one key from a list of pairs of random numbers."""
    num_pairs = max(2, length_words // 2)
    numbers = distinct_numbers(random, 2 * num_pairs)
    pairs = list(zip(numbers[:num_pairs], numbers[num_pairs:], strict=True))
    key, value = choose(random, pairs)
    lines = "\n".join(f"{one}: {two}" for one, two in pairs)
    return f"{lines}\nWhat is the value of {key}?\nAnswer:", [value]


TASKS: dict[str, Callable[[Random, int], tuple[str, list[str]]]] = {
    "copy": copy,
    "needle": needle,
    "needles": needles,
    "multi_hop": multi_hop,
    "arithmetic": arithmetic,
    "key_value": key_value,
}


def hidden(random: Random, facts: Sequence[str], length_words: int) -> str:
    """The facts in their order, spread at random over filler sentences of about `length_words` words."""
    sentences = filler(random, length_words - sum(len(fact.split()) for fact in facts))
    places = sorted(below(random, len(sentences) + 1) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        sentences.insert(place, fact)
    return " ".join(sentences)


def filler(random: Random, length_words: int) -> list[str]:
    """Sentences of about `length_words` words together."""
    sentences: list[str] = []
    num_words = 0
    while num_words < length_words:
        sentences.append(choose(random, FILLER))
        num_words += len(sentences[-1].split())
    return sentences


def below(random: Random, bound: int) -> int:
    """An integer in [0, bound); from `random()` alone, the only draw whose values Python promises to keep."""
    return int(random.random() * bound)


def choose(random: Random, items: Sequence):
    """One of the items."""
    return items[below(random, len(items))]


def shuffled(random: Random, items: Sequence) -> list:
    """The items in random order."""
    return sorted(items, key=lambda _: random.random())


def distinct_numbers(random: Random, count: int) -> list[str]:
    """Different numbers of at least six digits, as text."""
    span = max(900_000, 10 * count)
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers[str(100_000 + below(random, span))] = None
    return list(numbers)
