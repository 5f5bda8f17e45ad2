"""Documents as tokens: all of a text, or a conversation with its answers marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from dash_megatron.data.chat import ChatTemplate, encode_pair
from dash_megatron.data.tokenizer import Tokenizer


class Tokens(NamedTuple):
    """A document of the output."""

    ids: list[int]
    """Token ids, the end of document included."""
    answers: list[bool] | None
    """Which of them are learnt; None: all."""
    rendered: bool
    """Whether a chat template rendered it."""


Encoder = Callable[[str], Tokens]
"""Encodes what `text_of` took of a record; raises ValueError, with what is wrong with it."""


def make_encoder(tokenizer: Tokenizer, chat_template: str | None) -> Encoder:
    """An encoder of texts, or with a chat template of conversations.

    Raises:
        ValueError: see `ChatTemplate`.
    """
    if chat_template is None:
        return lambda text: Tokens([*tokenizer.encode(text), tokenizer.eod], None, rendered=False)
    template = ChatTemplate(chat_template, tokenizer)

    def encode(text: str) -> Tokens:
        record = json.loads(text)
        if "messages" in record:
            return Tokens(*template.encode(record["messages"]), rendered=True)
        return Tokens(*encode_pair(record["prompt"], record["completion"], tokenizer), rendered=False)

    return encode
