"""Blends as a config writes them: prefixes of `.bin/.idx` pairs, each optionally preceded by a weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dash_megatron.data.chat import MARKED_PLAIN_TEMPLATE, PLAIN_TEMPLATE
from dash_megatron.data.sidecar import Sidecar, check_data
from dash_megatron.data.tokenizer import Tokenizer, load_tokenizer
from dash_megatron.files import error_text

if TYPE_CHECKING:  # the tools that tokenize read no config
    from dash_megatron.config import Config


class Part(NamedTuple):
    """One data set of a blend."""

    weight: float | None
    """None: in proportion to its size."""
    prefix: str


def parse_blend(entries: Sequence[str]) -> list[Part]:
    """Split entries such as `"0.7 data/web"` into weight and prefix; an entry without a leading number is a prefix."""
    blend: list[Part] = []
    for entry in entries:
        weight, _, prefix = entry.strip().partition(" ")
        try:
            blend.append(Part(float(weight), prefix.strip()) if prefix else Part(None, entry))
        except ValueError:
            blend.append(Part(None, entry))  # a path with a space in it
    return blend


def blend_prefixes(entries: Sequence[str]) -> list[str]:
    """The prefixes of a blend, without their weights."""
    return [part.prefix for part in parse_blend(entries)]


def check_blend(field: str, entries: Sequence[str], tokenizer: Tokenizer, seq_length: int) -> list[Sidecar]:
    """Check the weights and each data set of a blend, and read its sidecar; see `check_data`.

    Raises:
        FileNotFoundError, ValueError: as `check_data`, or weights break a rule; the message begins with the field.
    """
    _check_weights(field, parse_blend(entries))
    found = []
    for prefix in blend_prefixes(entries):
        try:
            found.append(check_data(prefix, tokenizer, seq_length))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{field}: {error_text(error)}") from error
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error
    return found


def _check_weights(field: str, parts: Sequence[Part]) -> None:
    for weight, prefix in parts:
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(
                f"{field} gives {prefix} weight {weight:g}; it must be above 0: drop what has none"
            )
    weighted = sum(part.weight is not None for part in parts)
    if weighted not in (0, len(parts)):
        raise ValueError(
            f"{field} gives weights to {weighted} of its {len(parts)} prefixes; give them to all or to none"
        )


def check_data_of(config: Config) -> None:
    """Check the tokenizer and all data of a run, as far as its start does without a model.

    Raises:
        FileNotFoundError, ValueError: as `load_tokenizer` and `check_blend`; or `model.vocab_size` is smaller than the vocabulary.
    """
    data, tokenizer = config.data, load_tokenizer(config.data)
    config.padded_vocabulary(tokenizer.vocab_size)
    check_blend("data.train", data.train, tokenizer, data.seq_length)
    check_blend("data.valid", data.valid, tokenizer, data.seq_length)


def chat_template(entries: Sequence[str]) -> str | None:
    """The template that rendered the conversations of a blend; None where it has none.

    Raises:
        FileNotFoundError: a data set has no sidecar.
        ValueError: a sidecar cannot be read, or two data sets were rendered by different templates.
    """
    found: dict[str, str] = {}
    for prefix in blend_prefixes(entries):
        template = Sidecar.read(prefix).chat_template
        if template is not None:
            # a marked one, which comes with a tokenizer that was exported, renders the same
            found.setdefault(PLAIN_TEMPLATE if template == MARKED_PLAIN_TEMPLATE else template, prefix)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise ValueError(
            f"data.train: {one} and {other} were rendered by different chat templates, and a model speaks one; tokenize both "
            "with the same --chat-template"
        )
    return next(iter(found), None)


def data_fingerprint(entries: Sequence[str]) -> str:
    """Digest of what the files of a blend hold, wherever they are; from the sizes and the edges of large ones.

    Raises:
        FileNotFoundError, ValueError: as `unigram_entropy`.
    """
    sidecars = map(Sidecar.read, blend_prefixes(entries))
    held = [[each.idx_digest, each.bin_digest, each.answers_digest] for each in sidecars]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def unigram_entropy(entries: Sequence[str]) -> float:
    """Entropy of the tokens' frequencies in nats: the loss per token of a model that knows nothing else.

    Args:
        entries: a blend as a config writes it; its data sets are averaged by their weights, without these by their numbers
            of tokens.

    Raises:
        FileNotFoundError, ValueError: a data set has no readable sidecar.
    """
    total = weights = 0.0
    for weight, prefix in parse_blend(entries):
        sidecar = Sidecar.read(prefix)
        weight = sidecar.tokens if weight is None else weight
        total += weight * sidecar.unigram_entropy_nats
        weights += weight
    return total / weights
