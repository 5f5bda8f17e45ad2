"""Train a byte-fallback BPE tokenizer through which every byte string passes unharmed.

python -m data_tools.train_tokenizer --input data/corpus --vocab-size 4096 --output data/tokenizer.model
"""

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

from dash_megatron.data.tokenizer import Tokenizer
from data_tools.arguments import add_input, add_max_bad_lines, add_text_key, make_parser, run
from data_tools.atomic import atomic_write
from data_tools.readers import BadLineCounter, find_inputs, read_inputs, warn_of_unread_files

# unk, bos, eos and the 256 bytes
MIN_VOCABULARY = 259 + 1
_PIECE_CHARACTERS = 2000
_HELD_OUT_BYTES = 1_000_000
# The trainer skips a whole piece that contains one of these, its own marks.
_RESERVED = str.maketrans({"\x00": " ", "\u2585": " "})


class _Sample:
    """A stream of training pieces that leaves some documents for the measurement.

    A document's hash decides whether it is used, so that a sample of a large corpus is drawn from all of it,
    and is the same in each run.
    """

    def __init__(
        self, inputs: Sequence[str], text_key: str, max_bytes: float, bad_lines: BadLineCounter
    ) -> None:
        self.inputs = inputs
        self.text_key = text_key
        self.max_bytes = max_bytes
        self.bad_lines = bad_lines
        self.used_bytes = 0
        self.held_out: list[str] = []
        self.error: Exception | None = None
        """What stopped the stream; sentencepiece turns it into a RuntimeError of its own."""
        self._held_out_bytes = 0
        total = sum(os.path.getsize(path) for path in find_inputs(inputs, text_key))
        self._share = min(1.0, max_bytes / max(1, total))

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._stream()
        except Exception as error:
            self.error = error
            raise

    def _stream(self) -> Iterator[str]:
        for document in read_inputs(self.inputs, self.text_key, self.bad_lines):
            data = document.text.encode("utf-8")
            number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if number % 50 == 0 and self._held_out_bytes < _HELD_OUT_BYTES:
                self.held_out.append(document.text)
                self._held_out_bytes += len(data)
            elif number / 2**64 < self._share:
                if self.used_bytes >= self.max_bytes:
                    return
                self.used_bytes += len(data)
                yield from _pieces(document.text.translate(_RESERVED))


def _pieces(text: str) -> Iterator[str]:
    """Cut a text before newlines; the trainer drops a newline at a piece's end, and only there."""
    start = 0
    while start < len(text):
        stop = start + _PIECE_CHARACTERS
        if stop < len(text):
            newline = text.rfind("\n", start + 1, stop)
            before = start + len(text[start:newline].rstrip("\n")) if newline > 0 else start
            stop = before if before > start else stop
        yield text[start:stop]
        start = stop


def train(
    inputs: Sequence[str],
    output: Path,
    *,
    vocab_size: int,
    text_key: str = "text",
    max_mb: float = 100.0,
    character_coverage: float = 0.9995,
    max_bad_lines: int = 0,
) -> tuple[Tokenizer, float | None]:
    """Train and write a tokenizer; arguments as on the command line.

    Returns:
        The tokenizer, and the bytes in one of its tokens on documents it has not seen (None: all were used).

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: the output is a folder or would be JSON; or the corpus is empty, too small for the vocabulary, or holds
            too many bad lines.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ValueError(
            f"--vocab-size={vocab_size} must be at least {MIN_VOCABULARY}: 256 bytes, unk, bos, eos and "
            "a piece"
        )
    if output.is_dir() or output.suffix == ".json":
        raise ValueError(
            f"--output={output} must be a model file, not {'a folder' if output.is_dir() else 'JSON'}, such as "
            f"{(output if output.is_dir() else output.parent) / 'tokenizer.model'}"
        )
    if max_mb <= 0:
        raise ValueError(f"--max-mb={max_mb} must be above 0; leave it out for 100")
    warn_of_unread_files(inputs, text_key)
    sample = _Sample(inputs, text_key, max_mb * 1e6, BadLineCounter(max_bad_lines))
    pieces: Iterator[str] = iter(sample)
    first = next(pieces, None)
    if first is None:
        # a corpus of one or two documents may all be held out: train on them, then, and measure nothing
        pieces = chain.from_iterable(_pieces(text.translate(_RESERVED)) for text in sample.held_out)
        first, sample.held_out = next(pieces, None), []
    if first is None:
        raise ValueError("--input must hold text to train on, but has no document with text; check the files")
    try:
        model = _train_model(chain([first], pieces), vocab_size, character_coverage)
    except RuntimeError as error:
        if sample.error is not None:
            raise sample.error from None
        raise ValueError(_explain(str(error), vocab_size)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output, "wb") as file:
        file.write(model)
    tokenizer = Tokenizer(output)
    num_tokens = sum(len(tokenizer.encode(text)) for text in sample.held_out)
    num_bytes = sum(len(text.encode("utf-8")) for text in sample.held_out)
    return tokenizer, num_bytes / num_tokens if num_tokens else None


def _train_model(pieces: Iterator[str], vocab_size: int, character_coverage: float) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=pieces,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        byte_fallback=True,
        # the text as it is: nothing rewritten, added or trimmed
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        # indentation and blank lines get pieces of their own
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=4 * _PIECE_CHARACTERS + 4,
        # part of the model file, and so of its fingerprint: it may not depend on the machine
        num_threads=4,
        minloglevel=2,
    )
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    highest = re.search(r"too high \(\d+\).*<= (\d+)", message)
    if highest:
        return (
            f"--vocab-size={vocab_size} must be at most {highest[1]}, the pieces this corpus has to offer; "
            f"set --vocab-size {highest[1]} or give more text"
        )
    lowest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if lowest:
        return (
            f"--vocab-size={vocab_size} must be at least {lowest[1]}, for the corpus's different characters; "
            "raise it or lower --character-coverage (other characters are then spelt in bytes)"
        )
    return f"--vocab-size={vocab_size} does not fit this corpus: {message}; give more text or a smaller size"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = make_parser("train_tokenizer", __doc__)
    add_input(parser)
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, required=True)
    add_text_key(parser)
    parser.add_argument(
        "--max-mb", type=float, default=100.0, help="text to train on, a sample (default: 100)"
    )
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="default: 0.9995; the rest is bytes"
    )
    add_max_bad_lines(parser)
    return run(parser, arguments, _train)


def _train(options: argparse.Namespace) -> str:
    tokenizer, bytes_per_token = train(
        options.input,
        options.output,
        vocab_size=options.vocab_size,
        text_key=options.text_key,
        max_mb=options.max_mb,
        character_coverage=options.character_coverage,
        max_bad_lines=options.max_bad_lines,
    )
    measured = (
        "no document held out" if bytes_per_token is None else f"{bytes_per_token:.2f} bytes a token held out"
    )
    return (
        f"{options.output}: {tokenizer.vocab_size} pieces, {measured}, fingerprint "
        f"{tokenizer.fingerprint[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
