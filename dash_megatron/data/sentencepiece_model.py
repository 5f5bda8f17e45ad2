"""Sentencepiece models as tokenizers that lose no byte."""

import hashlib
import re
from functools import cached_property
from pathlib import Path

import sentencepiece

SPACE_SYMBOL = "\u2581"

# Texts that a tokenizer with normalization or trimmed spaces would change.
_PROBES = ("a", "  two  spaces ", "\t\n\n x\r\n", "e\u0301 \u00e9", "\uff21\ufb01\u00b2", "\x00")

# sentencepiece writes a space as U+2581 and reads U+2581 as a space, and it cannot see bytes that are not
# UTF-8 (which surrogateescape shows as U+DC80 to U+DCFF). Both are therefore encoded as byte pieces.
_NEEDS_BYTE_PIECES = re.compile(f"([\udc80-\udcff{SPACE_SYMBOL}]+)")

# Encoding slows down and takes more memory with the length of a text; the cut depends on the text alone, so
# that equal texts always give equal tokens.
_MAX_SEGMENT_CHARACTERS = 1 << 18


class SentencePieceModel:
    """A sentencepiece model that encodes and decodes every byte string without loss.

    Args:
        path: a BPE model with byte fallback that keeps text as it is, but for a space that it may put before it (Llama 2).

    Raises:
        ValueError: the file is no sentencepiece model, or one that cannot round-trip every byte string.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"data.tokenizer={self.path} must be a sentencepiece model file ({error}) or a tokenizer.json; "
                "train one with `python -m data_tools.train_tokenizer`"
            ) from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos: int = self._processor.bos_id()
        self.eod: int = self._processor.eos_id()
        self.special: dict[str, int] = {
            self._processor.id_to_piece(token_id): token_id
            for token_id in range(self.vocab_size)
            if self._processor.is_control(token_id) or self._processor.is_unknown(token_id)
        }
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.has_prefix = self._processor.encode("a", out_type=str)[0].startswith(SPACE_SYMBOL)
        # what encodes a text's later parts
        self._later = _without_prefix(model) if self.has_prefix else self._processor
        self._check_model()
        names = {token_id: name for name, token_id in self.special.items()}
        end = names[self.eod]
        # as the exported tokenizer names them
        self.special_tokens_map: dict[str, str] = {
            "bos_token": names.get(self.bos, end),
            "eos_token": end,
            "pad_token": end,
            "unk_token": names[self._processor.unk_id()],
        }

    def encode(self, text: str | bytes, continues: bool = False) -> list[int]:
        """As `Tokenizer.encode`; `decode_bytes` gives back the bytes, whatever they are.

        Args:
            continues: the text follows another one, so that no space is put before it.
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
                    ids.extend((self._later if ids or continues else self._processor).encode(segment))
        return ids

    def encode_rendered(self, text: str, continues: bool) -> list[int]:
        """As `Tokenizer.encode_rendered`."""
        names = sorted(self.special, key=len, reverse=True)
        ids: list[int] = []
        for position, part in enumerate(re.split(f"({'|'.join(map(re.escape, names))})", text)):
            if position % 2:
                ids.append(self.special[part])
            elif part:
                ids.extend(self.encode(part, continues and not position))
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that token ids stand for, without the space that encoding put before the text."""
        table = self._piece_bytes
        data = b"".join([table[token_id] for token_id in ids])
        return data.removeprefix(b" ") if self.has_prefix else data

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
                    f"{restored!r}; train it without normalization and whitespace removal, as "
                    "`python -m data_tools.train_tokenizer` does"
                )


def _without_prefix(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The same model, putting no space before a text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


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
