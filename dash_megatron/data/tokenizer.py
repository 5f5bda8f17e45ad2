"""The tokenizer of a run: a sentencepiece model, or a Hugging Face tokenizer.json."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from dash_megatron.data.json_tokenizer import JsonTokenizer
from dash_megatron.data.sentencepiece_model import SentencePieceModel
from dash_megatron.files import path_for_message

if TYPE_CHECKING:  # the tools that tokenize read no config
    from dash_megatron.config.data import DataConfig


class Tokenizer:
    """Encode text or bytes to token ids and back.

    A sentencepiece model loses no byte. A tokenizer.json encodes and decodes as transformers' `AutoTokenizer` does without
    special tokens, and loses what that loses.

    Args:
        path: a sentencepiece BPE model with byte fallback, as `python -m data_tools.train_tokenizer` writes it or Llama 2
            has it; or a `tokenizer.json` beside its `tokenizer_config.json`, as Llama 3 and Qwen have it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, the file is neither, or it would change text.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            found = [name for name in ("tokenizer.json", "tokenizer.model") if (self.path / name).is_file()]
            raise ValueError(
                f"data.tokenizer={self.path} is a folder; name the file, such as {self.path / (found or ['tokenizer.model'])[0]}"
            )
        if not self.path.is_file():
            raise FileNotFoundError(
                f"data.tokenizer={path_for_message(self.path)} does not exist; train one with "
                f"`python -m data_tools.train_tokenizer --input CORPUS --output {self.path}`"
            )
        json = self.path.suffix == ".json"
        self._model: JsonTokenizer | SentencePieceModel = (
            JsonTokenizer(self.path) if json else SentencePieceModel(self.path)
        )
        self.fingerprint: str = self._model.fingerprint
        """Digest of everything that the ids depend on."""
        self.vocab_size: int = self._model.vocab_size
        self.bos: int = self._model.bos
        """The id of the begin of sequence, which encoding never adds; -1 where there is none."""
        self.eod: int = self._model.eod
        """The id that ends a document: the model's end of sequence."""
        self.has_prefix: bool = self._model.has_prefix
        """Whether encoding puts a space before a text, which decoding removes."""
        self.special: dict[str, int] = self._model.special
        """Ids of special tokens by the names that stand for them in what a chat template renders."""
        self.special_tokens_map: dict[str, str] = self._model.special_tokens_map
        """Names of special tokens by what a chat template calls them: `eos_token`, and `bos_token` and others that there are."""

    def encode(self, text: str | bytes, continues: bool = False) -> list[int]:
        """Encode text, or any bytes, as token ids; bos, eod and unk are never among them.

        Args:
            text: bytes are read as UTF-8 where they are UTF-8. What is not, and lone surrogates in a str, a sentencepiece
                model keeps as bytes, and a tokenizer.json replaces by U+FFFD.
            continues: the text follows another one, so that a sentencepiece model puts no space before it.
        """
        return self._model.encode(text, continues)

    def encode_rendered(self, text: str, continues: bool = False) -> list[int]:
        """Encode what a chat template rendered, as transformers does: names of special tokens are these tokens.

        Args:
            continues: the text follows another one, so that nothing is put before it.
        """
        return self._model.encode_rendered(text, continues)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that the ids stand for; control tokens such as bos and eod stand for none.

        A tokenizer.json gives those of `decode`.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token id {token_id} must lie in [0, {self.vocab_size}), the vocabulary of {self.path}; "
                    "decode with the tokenizer that encoded the ids"
                )
        return self._model.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(data: DataConfig) -> Tokenizer:
    """Open the tokenizer of a run.

    Raises:
        FileNotFoundError, ValueError: as `Tokenizer`; or `data.tokenizer` or `data.train` is empty.
    """
    for name, value in (("tokenizer", data.tokenizer), ("train", data.train)):
        if not value:
            raise ValueError(f"data.{name} is empty; set it in the YAML or as data.{name}=...")
    return Tokenizer(str(data.tokenizer))
