"""A sentencepiece tokenizer through which every byte string passes unharmed."""

import hashlib
import re
from functools import cached_property
from os import PathLike
from pathlib import Path

import sentencepiece

SPACE_SYMBOL = "\u2581"

# Texts that a tokenizer with normalization, a dummy prefix or trimmed spaces would change.
_PROBES = ("a", "  two  spaces ", "\t\n\n x\r\n", "e\u0301 \u00e9", "\uff21\ufb01\u00b2", "\x00")

# sentencepiece writes a space as U+2581 and reads U+2581 as a space, and it cannot see bytes that are not
# UTF-8 (which surrogateescape shows as U+DC80 to U+DCFF). Both are therefore spelt out in byte pieces.
_NEEDS_BYTE_PIECES = re.compile(f"([\udc80-\udcff{SPACE_SYMBOL}]+)")

# Encoding slows down and takes more memory with the length of a text; the cut depends on the text alone, so
# that equal texts always give equal tokens.
_MAX_SEGMENT_CHARACTERS = 1 << 18


class Tokenizer:
    """Encode text or bytes to token ids and back, without losing a byte.

    Args:
        path: a sentencepiece model with byte fallback, as `python -m data_tools.train_tokenizer` writes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no sentencepiece model, or one that cannot round-trip every byte string.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"data.tokenizer={self.path} does not exist; train one with "
                f"`python -m data_tools.train_tokenizer --input CORPUS --output {self.path}`"
            )
        model = self.path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(
                f"data.tokenizer={self.path} must be a sentencepiece model file ({error}); "
                "train one with `python -m data_tools.train_tokenizer`"
            ) from error
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos: int = self._processor.bos_id()
        self.eod: int = self._processor.eos_id()
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._check_model()

    def encode(self, text: str | bytes) -> list[int]:
        """Turn text, or any bytes at all, into token ids; no bos, eod or unk is ever among them.

        Args:
            text: bytes are read as UTF-8 where they are UTF-8. Lone surrogates in a str are kept as the three
                bytes that would encode them.

        Returns:
            Ids for which `decode_bytes(ids)` gives back the bytes.
        """
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        else:
            text = text.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for position, run in enumerate(_NEEDS_BYTE_PIECES.split(text)):
            if position % 2:
                ids.extend(self._byte_ids[byte] for byte in run.encode("utf-8", "surrogateescape"))
            else:
                for segment in _segments(run):
                    ids.extend(self._processor.encode(segment))
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Give the bytes that the ids stand for; control tokens such as bos and eod stand for none.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        table = self._piece_bytes
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token id {token_id} must lie in [0, {self.vocab_size}), the vocabulary of {self.path}; "
                    "decode with the tokenizer that encoded the ids"
                )
        return b"".join([table[token_id] for token_id in ids])

    def decode(self, ids: list[int]) -> str:
        """Give the text of the ids, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def _piece_bytes(self) -> list[bytes]:
        """The bytes of each of the `vocab_size` pieces."""
        byte_values = {token_id: bytes([value]) for value, token_id in enumerate(self._byte_ids)}
        table = []
        for token_id in range(self.vocab_size):
            if token_id in byte_values:
                table.append(byte_values[token_id])
            elif self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
                table.append(b"")
            else:
                table.append(self._processor.id_to_piece(token_id).replace(SPACE_SYMBOL, " ").encode())
        return table

    def _check_model(self) -> None:
        if self.eod < 0:
            raise ValueError(
                f"data.tokenizer={self.path} must have an end-of-sequence piece (eos), which ends each "
                "document; train one with `python -m data_tools.train_tokenizer`"
            )
        if not all(self._processor.is_byte(token_id) for token_id in self._byte_ids):
            raise ValueError(
                f"data.tokenizer={self.path} must have all 256 byte pieces <0x00> to <0xFF>; "
                "train it with byte_fallback, as `python -m data_tools.train_tokenizer` does"
            )
        for probe in _PROBES:
            restored = self.decode_bytes(self.encode(probe))
            if restored != probe.encode():
                raise ValueError(
                    f"data.tokenizer={self.path} must keep text as it is, but turns {probe.encode()!r} into "
                    f"{restored!r}; train it without normalization, dummy prefix and whitespace removal, as "
                    "`python -m data_tools.train_tokenizer` does"
                )


def _segments(text: str) -> list[str]:
    """Cut a long text after newlines (or anywhere, where there is none) into parts of bounded length."""
    if len(text) <= _MAX_SEGMENT_CHARACTERS:
        return [text]
    parts = []
    start = 0
    while start < len(text):
        stop = min(start + _MAX_SEGMENT_CHARACTERS, len(text))
        if stop < len(text):
            newline = text.rfind("\n", start, stop)
            stop = newline + 1 if newline > start else stop
        parts.append(text[start:stop])
        start = stop
    return parts
