"""Tasks whose answer is known because it was put into the prompt: needles, the RULER families, recall, copy.

The families are those of RULER (Hsieh et al., arXiv 2404.06654), in words of our own and over local text. A sample depends
on its seed alone. Names are made of syllables, so that no text gives them away.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.samples import LengthError, Prompt, Sample, encode_prompt, fit_to_length
from dash_megatron.evaluation.text import LocalText

_SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]

CUE_TOKENS = 8
COPIED_TOKENS = 32
COMMON_WORDS = 10
FREQUENT_WORDS = 3
HOPS = 4

BuildPrompt = Callable[[random.Random, int, Sequence[str], float | None], Prompt]


@dataclass(frozen=True)
class Task:
    """A family of samples."""

    name: str
    build: BuildPrompt | None
    """Makes a prompt of a generator, a size, lines of filler and a depth; None: `copy`, which is made of tokens."""
    smallest: int = 1
    """Size that `build` begins with."""
    uses_text: bool = True
    """Whether a size counts lines of local text."""
    by_depth: bool = False
    """Whether samples are made for given depths."""

    def sample(
        self, seed: str, length: int, depth: float | None, text: LocalText, tokenizer: Tokenizer
    ) -> Sample:
        """Make the sample of a seed, of at most `length` tokens.

        Raises:
            LengthError: no sample has that length; see `fit_to_length`.
        """
        if self.build is None:
            return _copy(random.Random(seed), length, text)
        build, largest = self._prompts(seed, depth, text)
        try:
            return fit_to_length(build, (self.smallest, largest), length, tokenizer)
        except LengthError as error:
            raise LengthError(f"task {self.name}: {error}") from error

    def shortest(self, seed: str, depth: float | None, text: LocalText, tokenizer: Tokenizer) -> int:
        """Tokens of the shortest sample of a seed; 0 for `copy`, all of whose samples are of the length asked for."""
        if self.build is None:
            return 0
        return len(encode_prompt(self._prompts(seed, depth, text)[0](self.smallest), tokenizer))

    def _prompts(
        self, seed: str, depth: float | None, text: LocalText
    ) -> tuple[Callable[[int], Prompt], int]:
        """What makes the prompt of a size, and the largest size."""
        build = self.build
        assert build is not None
        generator = random.Random(seed)
        lines: Sequence[str] = text.lines
        if self.uses_text and lines:
            # another stretch of the text each time
            begin = generator.randrange(len(lines))
            lines = [*lines[begin:], *lines[:begin]]
        largest = len(lines) if self.uses_text else 1 << 24
        return lambda size: build(random.Random(f"{seed}:prompt"), size, lines[:size], depth), largest


def draw_words(generator: random.Random, count: int) -> list[str]:
    """Draw different made-up words of three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choices(_SYLLABLES, k=3))] = None
    return list(found)


def draw_numbers(generator: random.Random, count: int) -> list[str]:
    """Draw different numbers of seven digits."""
    return [str(number) for number in generator.sample(range(1_000_000, 10_000_000), count)]


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_HIDDEN = "Numbers are hidden in the text below. Remember them.\n\n"


def _scatter(
    generator: random.Random, needles: Sequence[str], lines: Sequence[str], depth: float | None
) -> str:
    """Put needles between lines, in their order: the first at `depth`, where given, the others anywhere."""
    places = sorted(generator.randint(0, len(lines)) for _ in needles)
    if depth is not None:
        places = [round(depth * len(lines)), *places[1:]]
    marked = [(place, 0, needle) for place, needle in zip(places, needles, strict=True)]
    marked += [(place, 1, line) for place, line in enumerate(lines)]
    return "\n".join(line for _, _, line in sorted(marked, key=lambda entry: entry[:2]))


def _needles(
    generator: random.Random,
    size: int,
    lines: Sequence[str],
    depth: float | None,
    *,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Prompt:
    """Numbers of made-up things, hidden in text; some of the things are asked for."""
    names = draw_words(generator, keys)
    secrets = draw_numbers(generator, keys * values)
    pairs = [(names[index // values], secret) for index, secret in enumerate(secrets)]
    generator.shuffle(pairs)
    if depth is None and keys == asked == values == 1:
        depth = generator.random()
    body = _scatter(generator, [_needle(*pair) for pair in pairs], lines, depth)
    wanted = generator.sample(names, asked)
    # in the order of the question, then of the text
    answers = [secret for name in wanted for other, secret in pairs if other == name]
    return Prompt(f"{_HIDDEN}{body}\n\n{_question(wanted, len(answers))}", answers, depth=depth)


def needles_with_questions(generator: random.Random, lines: Sequence[str], count: int) -> str:
    """Training text of the needle tasks: `count` numbers hidden in lines of text, then each asked for, with its answer."""
    pairs = list(zip(draw_words(generator, count), draw_numbers(generator, count), strict=True))
    body = _scatter(generator, [_needle(*pair) for pair in pairs], lines, None)
    generator.shuffle(pairs)
    asked = "\n".join(f"{_question([name], 1)} {secret}" for name, secret in pairs)
    return f"{_HIDDEN}{body}\n\n{asked}\n"


def _needle(name: str, secret: str) -> str:
    return f"The number of {name} is {secret}."


def _question(wanted: Sequence[str], num_answers: int) -> str:
    noun, verb = ("number", "is") if num_answers == 1 else ("numbers", "are")
    return f"In the text above, the {noun} of {_enumerate(wanted)} {verb}"


def _variables(generator: random.Random, size: int, lines: Sequence[str], depth: float | None) -> Prompt:
    """Two chains of assignments, hidden in text; the variables of one are asked for."""
    names = draw_words(generator, 2 * (HOPS + 1))
    values = draw_numbers(generator, 2)
    chains = [names[: HOPS + 1], names[HOPS + 1 :]]
    steps: list[list[str]] = []
    for chain, value in zip(chains, values, strict=True):
        sources = [value, *chain[:-1]]
        steps.append([f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=True)])
    turns = [0] * (HOPS + 1) + [1] * (HOPS + 1)
    generator.shuffle(turns)
    rest = [iter(chain) for chain in steps]
    body = _scatter(generator, [next(rest[turn]) for turn in turns], lines, depth)
    text = (
        f"Variables are assigned in the text below. Follow them.\n\n{body}\n\n"
        f"In the text above, the variables with the value {values[0]} are"
    )
    return Prompt(text, chains[0])


def _common(generator: random.Random, size: int, lines: Sequence[str], depth: float | None) -> Prompt:
    """A list in which ten words stand often and `size` words once."""
    often = max(4, size // 20)
    names = draw_words(generator, COMMON_WORDS + size)
    listed = names[:COMMON_WORDS] * often + names[COMMON_WORDS:]
    generator.shuffle(listed)
    text = (
        f"Count the words of the list below.\n\n{' '.join(listed)}\n\n"
        f"The {COMMON_WORDS} most common words, in the order in which they first appear, are"
    )
    return Prompt(text, sorted(names[:COMMON_WORDS], key=listed.index))


def _frequent(generator: random.Random, size: int, lines: Sequence[str], depth: float | None) -> Prompt:
    """`size` words whose frequencies fall with the square of their rank."""
    counts: list[int] = []
    while sum(counts) < size:
        rank = len(counts) + 1
        counts.append(min(max(1, round(0.6 * size / rank**2)), size - sum(counts)))
    names = draw_words(generator, len(counts))
    listed = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    generator.shuffle(listed)
    text = (
        f"Count the words of the list below.\n\n{' '.join(listed)}\n\n"
        f"The {FREQUENT_WORDS} most frequent words, the most frequent first, are"
    )
    return Prompt(text, names[:FREQUENT_WORDS])


def _recall(generator: random.Random, size: int, lines: Sequence[str], depth: float | None) -> Prompt:
    """`size` pairs and nothing else; one is asked for by its first half."""
    names, values, body = _pairs(generator, size)
    asked = generator.randrange(size)
    return Prompt(f"{body}\n{names[asked]}", [values[asked]], depth=asked / max(1, size - 1))


def _pairs(generator: random.Random, size: int) -> tuple[list[str], list[str], str]:
    """Words, a word for each, and a list of both."""
    drawn = draw_words(generator, 2 * size)
    names, values = drawn[:size], drawn[size:]
    return names, values, "\n".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def pairs_with_questions(generator: random.Random, size: int, questions: int) -> str:
    """Training text of `associative_recall`: `size` pairs, then some of them again."""
    names, values, body = _pairs(generator, size)
    asked = generator.sample(range(size), min(size, questions))
    return "\n".join([body, *(f"{names[index]} {values[index]}" for index in asked)]) + "\n"


def _copy(generator: random.Random, length: int, text: LocalText) -> Sample:
    """Shuffled tokens of the text, then eight of them again: what follows those is to be repeated."""
    room = length - CUE_TOKENS - COPIED_TOKENS
    if room < CUE_TOKENS + COPIED_TOKENS:
        least = 2 * (CUE_TOKENS + COPIED_TOKENS)
        raise LengthError(f"task copy: --lengths {length} must be at least {least}")
    ids = generator.choices(text.vocabulary, k=room)
    begin = generator.randint(0, room - CUE_TOKENS - COPIED_TOKENS)
    ids += ids[begin : begin + CUE_TOKENS + COPIED_TOKENS]
    first = length - COPIED_TOKENS
    spans = [(place, place + 1) for place in range(first, length)]
    return Sample(ids, first, spans, [], begin / max(1, room - CUE_TOKENS - COPIED_TOKENS))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("needle", _needles, by_depth=True),
        Task("niah_single", _needles),
        Task("niah_multikey", functools.partial(_needles, keys=4)),
        Task("niah_multivalue", functools.partial(_needles, values=4)),
        Task("niah_multiquery", functools.partial(_needles, keys=8, asked=4)),
        Task("variable_tracking", _variables),
        Task("common_words", _common, smallest=4, uses_text=False),
        Task("frequent_words", _frequent, smallest=40, uses_text=False),
        Task("associative_recall", _recall, smallest=2, uses_text=False),
        Task("copy", None, uses_text=False),
    )
}
"""By name; `perplexity` and `documents`, the other tasks of the command, have no samples."""
