"""PREFIX.idx.json: facts that a .bin/.idx pair does not hold, above all which tokenizer made it."""

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np

from dash_megatron.data.index_file import check_bin_size, check_lengths, edges_digest, read_index
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.files import path_for_message, write_whole

_TOKENS_PER_READ = 1 << 20
_MAX_DOCUMENTS = (1 << 31) - 1
"""Megatron numbers them in int32, and what is above would silently be others."""


@dataclass(frozen=True)
class Sidecar:
    """Facts about PREFIX.bin and PREFIX.idx."""

    tokenizer_fingerprint: str
    """sha256 of the tokenizer's model file."""
    vocab_size: int
    eod: int
    """Token that ends each document."""
    documents: int
    tokens: int
    dtype: str
    """numpy's name for the type of a token in the .bin: uint16, int32 or int64."""
    bin_bytes: int
    max_token_id: int
    """-1 where there are no tokens."""
    idx_digest: str
    bin_digest: str
    """See `edges_digest`."""
    unigram_entropy_nats: float
    """Entropy of the tokens' frequencies: the loss of a model that knows nothing else."""
    answer_tokens: int | None = None
    """Tokens that PREFIX.answers.bin marks, which alone are learnt; None where there is no such file and all are."""
    answers_digest: str | None = None
    """See `edges_digest`; of PREFIX.answers.bin."""
    chat_template: str | None = None
    """The template that rendered the conversations; None where there are none."""

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write PREFIX.idx.json, whole or not at all."""
        write_whole(sidecar_path(prefix), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, prefix: str | os.PathLike[str]) -> "Sidecar":
        """Read PREFIX.idx.json.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is not what `write` writes.
        """
        path = sidecar_path(prefix)
        remedy = f"make it with `python -m data_tools.write_sidecar --prefix {prefix} --tokenizer TOKENIZER`"
        if not path.is_file():
            read_index(prefix)  # where all of it is missing, that is the error
            raise FileNotFoundError(
                f"{path_for_message(path)} does not exist, so that nothing says which tokenizer made {prefix}.bin; {remedy}"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            # what came later has a default
            return cls(
                **{
                    field.name: values[field.name]
                    for field in fields(cls)
                    if field.default is MISSING or field.name in values
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be a data sidecar, but is none ({type(error).__name__}: {error}); {remedy}"
            ) from error


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """The path of the sidecar of PREFIX.bin and PREFIX.idx."""
    return Path(f"{os.fspath(prefix)}.idx.json")


def answers_path(prefix: str | os.PathLike[str]) -> Path:
    """The path of the marks of answers: a byte for each token of PREFIX.bin, 1 in answers and 0 elsewhere."""
    return Path(f"{os.fspath(prefix)}.answers.bin")


def check_data(prefix: str, tokenizer: Tokenizer, seq_length: int) -> Sidecar:
    """Read the sidecar of PREFIX.bin and PREFIX.idx after checking that they are whole, long enough and of this tokenizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the data is damaged, replaced, empty, shorter than a row, or of another tokenizer.
    """
    index = read_index(prefix)
    check_bin_size(prefix, index)
    sidecar = Sidecar.read(prefix)
    if sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{prefix} was made by the tokenizer with fingerprint {sidecar.tokenizer_fingerprint[:12]}, but "
            f"data.tokenizer={tokenizer.path} has {tokenizer.fingerprint[:12]}; they must agree: give the "
            "tokenizer that made the data, or tokenize the corpus again"
        )
    if sidecar.idx_digest != edges_digest(f"{prefix}.idx") or sidecar.bin_digest != edges_digest(
        f"{prefix}.bin"
    ):
        raise ValueError(
            f"{prefix}.idx.json must describe the files beside it, but {prefix}.bin or .idx was replaced "
            f"since; make it anew with `python -m data_tools.write_sidecar --prefix {prefix} --tokenizer "
            f"{tokenizer.path}`"
        )
    if index.documents > _MAX_DOCUMENTS:
        raise ValueError(
            f"{prefix} has {index.documents} documents and must have at most {_MAX_DOCUMENTS}; tokenize it as several data sets"
        )
    if index.tokens == 0:
        raise ValueError(
            f"{prefix} has no tokens; an empty corpus cannot be trained on: tokenize one with documents"
        )
    _check_answers(prefix, sidecar, tokenizer)
    # rows of conversations are filled up
    if sidecar.answer_tokens is None and index.tokens < seq_length + 1:
        raise ValueError(
            f"{prefix} has {index.tokens} tokens and must have at least data.seq_length + 1 = "
            f"{seq_length + 1} for one row; use more text, a larger --valid-fraction if this is validation "
            "data, or a smaller data.seq_length"
        )
    if sidecar.max_token_id >= tokenizer.vocab_size:
        raise ValueError(
            f"{prefix} has token id {sidecar.max_token_id}; ids must be below {tokenizer.vocab_size}, the "
            f"vocabulary of {tokenizer.path}; tokenize the corpus again with this tokenizer"
        )
    return sidecar


def _check_answers(prefix: str, sidecar: Sidecar, tokenizer: Tokenizer) -> None:
    path = answers_path(prefix)
    if sidecar.answer_tokens is not None and not path.is_file():
        raise FileNotFoundError(
            f"{path_for_message(path)} does not exist; it says which tokens of {prefix}.bin are answers: copy it too, or tokenize again"
        )
    known = edges_digest(path) if path.is_file() else None
    if known != sidecar.answers_digest:
        raise ValueError(
            f"{prefix}.idx.json must describe the files beside it, but {path} was replaced since; tokenize again, or make it "
            f"anew with `python -m data_tools.write_sidecar --prefix {prefix} --tokenizer {tokenizer.path}`"
        )
    if sidecar.answer_tokens == 0:
        raise ValueError(
            f"{path} marks no token, so that nothing of {prefix} would be learnt; tokenize again"
        )


def describe(
    prefix: str | os.PathLike[str],
    *,
    tokenizer_fingerprint: str,
    vocab_size: int,
    eod: int,
    chat_template: str | None = None,
) -> Sidecar:
    """Make the sidecar of PREFIX.bin, and of PREFIX.answers.bin if it is there, reading them once to count tokens.

    Args:
        prefix: of the files.
        tokenizer_fingerprint, vocab_size, eod, chat_template: see `Sidecar`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the .bin's size contradicts the .idx, the .idx is damaged, the .bin holds a token id outside the vocabulary, or
            the marks of answers are not one for each token.
    """
    index = read_index(prefix)
    check_bin_size(prefix, index)
    check_lengths(prefix)
    bin_path = f"{os.fspath(prefix)}.bin"
    counts = np.zeros(vocab_size, dtype=np.int64)
    first = 0
    with open(bin_path, "rb") as file:
        while block := file.read(_TOKENS_PER_READ * index.dtype.itemsize):
            ids = np.frombuffer(block, dtype=index.dtype)
            outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if outside.size:
                raise ValueError(
                    f"{bin_path} has id {int(ids[outside[0]])} at token {first + int(outside[0])}; ids must "
                    f"lie in [0, {vocab_size}), the tokenizer's vocabulary; give the tokenizer that made the "
                    "data"
                )
            counts += np.bincount(ids, minlength=vocab_size)
            first += ids.size
    return Sidecar(
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocab_size=vocab_size,
        eod=eod,
        documents=index.documents,
        tokens=index.tokens,
        dtype=index.dtype.name,
        bin_bytes=index.bin_bytes,
        max_token_id=int(np.flatnonzero(counts)[-1]) if first else -1,
        idx_digest=edges_digest(f"{os.fspath(prefix)}.idx"),
        bin_digest=edges_digest(bin_path),
        unigram_entropy_nats=_entropy_nats(counts),
        answer_tokens=_count_answers(prefix, index.tokens),
        answers_digest=edges_digest(answers_path(prefix)) if answers_path(prefix).is_file() else None,
        chat_template=chat_template,
    )


def _count_answers(prefix: str | os.PathLike[str], tokens: int) -> int | None:
    path = answers_path(prefix)
    if not path.is_file():
        return None
    if path.stat().st_size != tokens:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes and must have {tokens}, one for each token; tokenize again"
        )
    count = 0
    with open(path, "rb") as file:
        while block := file.read(_TOKENS_PER_READ):
            count += int(np.count_nonzero(np.frombuffer(block, dtype=np.uint8)))
    return count


def _entropy_nats(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())
