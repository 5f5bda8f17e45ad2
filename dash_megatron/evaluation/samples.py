"""Samples: token rows that end in an answer, of a length that any tokenizer reaches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from dash_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A question as text; the model goes on with `opening`, then the answers with `separator` between them."""

    text: str
    answers: list[str]
    opening: str = " "
    separator: str = ", "
    depth: float | None = None
    """Where the first answer stands in the text: 0 first, 1 last; None where it has no one place."""


@dataclass(frozen=True)
class Sample:
    """A row of tokens of which the last ones answer what those before them ask."""

    ids: list[int]
    """Prompt, then answer."""
    prompt_tokens: int
    spans: list[tuple[int, int]]
    """First and one past the last token of each answer in `ids`."""
    texts: list[str]
    """The answers as text; empty where they are tokens without text."""
    depth: float | None = None


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> Sample:
    """Encode prompt and answers as one text, so that tokens are those a model has read.

    A token that joins the end of the prompt and the start of the answer counts as answer.
    """
    pieces = _pieces(prompt)
    ids = tokenizer.encode("".join(pieces))
    # all but a short tail is equal in every encoding below
    ends = [_common(ids, tokenizer.encode(text)) for text in itertools.accumulate(pieces)]
    ends[-1] = len(ids)
    spans = []
    for number in range(len(prompt.answers)):
        # an opening space is mostly a part of the answer's first token
        begin, end = ends[2 * number + 1], ends[2 * number + 2]
        spans.append((min(begin, end - 1), end))
    return Sample(ids, min(ends[0], spans[0][0]), spans, prompt.answers, prompt.depth)


def _pieces(prompt: Prompt) -> list[str]:
    """The question, then what stands before each answer, and the answer."""
    pieces = [prompt.text]
    for number, answer in enumerate(prompt.answers):
        pieces += [prompt.separator if number else prompt.opening, answer]
    return pieces


def _common(ids: list[int], prefix: list[int]) -> int:
    """How many first tokens are equal."""
    if ids[: len(prefix)] == prefix:
        return len(prefix)
    return next(
        (place for place, pair in enumerate(zip(ids, prefix, strict=False)) if pair[0] != pair[1]), len(ids)
    )


def fit(build: Callable[[int], Prompt], sizes: tuple[int, int], length: int, tokenizer: Tokenizer) -> Sample:
    """Find the largest size, within a sixty-fourth, whose sample has at most `length` tokens.

    Args:
        build: makes the prompt with so many units of filler, the longer the more.
        sizes: smallest and largest size that `build` takes.
        length: tokens of prompt and answer.

    Raises:
        ValueError: the smallest is too long, or the largest fills less than nine tenths of `length`.
    """
    low, largest = sizes

    def count(size: int) -> int:
        return len(tokenizer.encode("".join(_pieces(build(size)))))

    found = count(low)
    if found > length:
        raise ValueError(
            f"--lengths {length} must be at least {found}, the shortest sample with this tokenizer"
        )
    high = None
    while low < largest and (high is None or high - low > max(1, low // 64)):
        middle = min(2 * low + 1, largest) if high is None else (low + high) // 2
        tokens = count(middle)
        if tokens <= length:
            low, found = middle, tokens
        else:
            high = middle
    if high is None and found < 0.9 * length:
        raise ValueError(
            f"--lengths {length} needs more text: all of it makes a sample of {found} tokens; give a longer "
            "--text, more validation data, or a smaller length"
        )
    return encode_prompt(build(low), tokenizer)
