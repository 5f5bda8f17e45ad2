"""Samples: token rows that end in an answer, of a length that any tokenizer reaches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from dash_megatron.data.tokenizer import Tokenizer


class LengthError(ValueError):
    """A task cannot have a length, with this text and tokenizer."""


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


def _sample(prompt: Prompt, ids: list[int], tokenizer: Tokenizer) -> Sample:
    """Find prompt and answers in the tokens of both, encoded as one text: as a model has read such.

    A token that joins the end of the prompt and the start of the answer counts as answer.
    """
    pieces = _pieces(prompt)
    # all but a short tail is equal in every encoding below
    ends = [_common_prefix_length(ids, tokenizer.encode(text)) for text in itertools.accumulate(pieces[:-1])]
    ends.append(len(ids))
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


def _common_prefix_length(ids: list[int], prefix: list[int]) -> int:
    """How many first tokens are equal."""
    if ids[: len(prefix)] == prefix:
        return len(prefix)
    return next(
        (place for place, pair in enumerate(zip(ids, prefix, strict=False)) if pair[0] != pair[1]), len(ids)
    )


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt and its answers, as one text."""
    return tokenizer.encode("".join(_pieces(prompt)))


def fit_to_length(
    build: Callable[[int], Prompt], sizes: tuple[int, int], length: int, tokenizer: Tokenizer
) -> Sample:
    """Find a size whose sample has at most `length` tokens: the largest, unless one falls short by a sixty-fourth at most.

    Args:
        build: makes the prompt with so many units of filler, the longer the more.
        sizes: smallest and largest size that `build` takes.
        length: tokens of prompt and answer.
        tokenizer: counts them.

    Raises:
        LengthError: the smallest is too long, or the largest fills less than nine tenths of `length`.
    """
    low, largest = sizes

    def encode(size: int) -> tuple[Prompt, list[int]]:
        prompt = build(size)
        return prompt, encode_prompt(prompt, tokenizer)

    best, ids = encode(low)
    if len(ids) > length:
        raise LengthError(
            f"--lengths {length} must be at least {len(ids)}, the shortest sample with this tokenizer"
        )
    wanted = length - length // 128
    high, too_many = largest + 1, 0
    tokens_a_unit = 1.0
    for attempt in itertools.count():
        if high - low <= 1 or len(ids) >= length - length // 64:
            break
        if too_many and attempt % 4 == 3:
            guess = (low + high) // 2  # units may differ much in their tokens
        elif too_many:
            guess = low + (high - low) * (wanted - len(ids)) // (too_many - len(ids))
        else:
            # a few units say little about all the others
            guess = min(low + int((wanted - len(ids)) / tokens_a_unit), 4 * low)
        guess = min(max(guess, low + 1), high - 1)
        prompt, found = encode(guess)
        if len(found) > length:
            high, too_many = guess, len(found)
            continue
        tokens_a_unit = max(1, len(found) - len(ids)) / (guess - low)
        low, best, ids = guess, prompt, found
    if not too_many and len(ids) < 0.9 * length:
        raise LengthError(
            f"--lengths {length} needs more text: all of it makes a sample of {len(ids)} tokens; give a longer "
            "--text, more validation data, or a smaller length"
        )
    return _sample(best, ids, tokenizer)
