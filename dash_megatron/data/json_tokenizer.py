"""Hugging Face's tokenizer.json as the tokenizer of a run."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

# in tokenizer_config.json: by its own fingerprint that of the tokenizer which makes the same data
SAME_DATA = "same_data_as"
# there too: the begin of sequence of chat templates, where bos_token is named for tools that begin every text with it
TEMPLATE_BOS = "bos_of_templates"

# Texts that a tokenizer with unknown characters, lower case or trimmed spaces would change.
_PROBES = (
    "a",
    "Two  spaces x ",
    "x\t\n\n y\r\n",
    "\u00e9",
    "\uff21\ufb01\u00b2",
    "\u4f60 \U0001f600",
    "x\x00",
)


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON file of, or beside, a tokenizer holds; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}, beside the tokenizer, is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}, beside the tokenizer, must hold a mapping, not {type(settings).__name__}; copy that file from where the "
            "tokenizer came from"
        )
    return settings


class JsonTokenizer:
    """A tokenizer.json, used as transformers uses it, without special tokens: their names inside a text are plain text.

    Args:
        path: the file. `tokenizer_config.json` or `special_tokens_map.json` beside it name the end of sequence.

    Raises:
        ValueError: a file is damaged, names no end of sequence, or the tokenizer changes more of a text than the
            composition of its characters (Unicode's NFC).
    """

    has_prefix = False

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"data.tokenizer={path} must be a tokenizer.json of Hugging Face, but cannot be read: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        files = (self.path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        self._settings = {file: read_settings(file) for file in files}
        end = self._setting("eos_token")
        if end is None:
            raise ValueError(
                f"data.tokenizer={path} needs the name of its end of sequence, which ends each document: eos_token in "
                "tokenizer_config.json beside it; copy that file from where the tokenizer came from"
            )
        # the same file with another end of sequence makes other data
        own = hashlib.sha256(content + b"\0" + end.encode()).hexdigest()
        self.fingerprint: str = (self._setting(SAME_DATA, dict) or {}).get(own, own)
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = self._id_of(end)
        begin = self._setting(TEMPLATE_BOS) or self._setting("bos_token")
        self.bos = -1 if begin is None else self._id_of(begin)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {
            token.content: index for index, token in added.items() if token.special
        }
        named = {"bos_token": begin, "eos_token": end}
        named |= {role: self._setting(role) for role in ("pad_token", "unk_token")}
        self.special_tokens_map = {role: name for role, name in named.items() if name is not None}
        self._check_texts()

    def encode(self, text: str | bytes, continues: bool = False) -> list[int]:
        """As `Tokenizer.encode`."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        else:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(self._tokenizer, text, continues)

    def encode_rendered(self, text: str, continues: bool) -> list[int]:
        """As `Tokenizer.encode_rendered`."""
        return self._encode(self._with_special, text, continues)

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str, continues: bool) -> list[int]:
        if not (continues and self._puts_before):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        newline = tokenizer.encode("\n", add_special_tokens=False).ids
        return self._encode(tokenizer, f"\n{text}", False)[len(newline) :]

    @cached_property
    def _puts_before(self) -> bool:
        """Whether something, such as a space, is put before a text."""
        newline, word, both = map(self.encode, ("\n", "a", "\na"))
        return newline + word != both

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 of the text that token ids stand for, with U+FFFD for parts of characters."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).encode()

    def _setting(self, key: str, kind: type = str) -> Any:
        for file, settings in self._settings.items():
            value = settings.get(key)
            if kind is str and isinstance(value, dict):
                value = value.get("content", value)  # a token with its properties
            if value is None:
                continue
            if not isinstance(value, kind):
                raise ValueError(
                    f"{file}, beside the tokenizer, has {key}={value!r}, which must be {'text' if kind is str else 'a mapping'}; "
                    "copy that file from where the tokenizer came from"
                )
            return value
        return None

    def _id_of(self, name: str) -> int:
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ValueError(
                f"data.tokenizer={self.path} has no token {name}, which the file beside it names; take both from one place"
            )
        return token_id

    def _check_texts(self) -> None:
        for probe in _PROBES:
            restored = self.decode_bytes(self.encode(probe)).decode()
            if restored != unicodedata.normalize("NFC", probe):
                raise ValueError(
                    f"data.tokenizer={self.path} must keep text as it is, but turns {probe!r} into {restored!r}; use one "
                    "that falls back to bytes, such as byte-level BPE"
                )
        name = self._tokenizer.id_to_token(self.eod)
        if self.eod in self.encode(f"a{name}a"):
            raise ValueError(
                f"data.tokenizer={self.path} must mark {name} as special, so that its name in a text does not end the "
                'document; set "special": true in its added_tokens'
            )
