"""Make documents that can be learned from only by looking far back: needles in text, and lists of pairs to recall.

python -m data_tools.make_retrieval --text data/corpus --tokenizer data/tokenizer.model --lengths 16384 16384 --tokens 5e7 \\
    --output data/retrieval.jsonl

A document has exactly the number of tokens that was drawn for it, the one that ends it included: where shortest and longest are the
`data.seq_length` of a run, every row holds one whole, and no row parts a question from its answer.

They are worded as the tasks `needle`, `niah_...` and `associative_recall` of `python -m dash_megatron evaluate`, but ask
several questions each, and none has the names or numbers of an evaluation's sample.
"""

import argparse
import functools
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.tasks import needles_with_questions, pairs_with_questions
from dash_megatron.evaluation.text import break_lines
from data_tools.arguments import add_text_key, make_parser, run
from data_tools.atomic import atomic_write
from data_tools.readers import BadLineCounter, read_inputs
from data_tools.shards import goes_to_valid

# Of a list's lines, how many ask: what is asked for is all that can be learned, the rest is chance.
QUESTION_SHARE = (0.125, 0.5)
MAX_NEEDLES = 128
# Share of a document to aim at before it is filled up, and the least that it must come to; shorter ones lack at most so many tokens.
TARGET_SHARE, MIN_SHARE, MAX_MISSING_TOKENS = 0.97, 0.9, 64
MAX_TRIES = 12
# Text whose tokens are counted, to know how many bytes a token has.
SAMPLE_BYTES = 1 << 20


def _filler(text: Sequence[str], text_key: str, max_mb: float, valid_fraction: float) -> list[str]:
    """Lines of the inputs, from the first document on, without those that `tokenize_corpus` holds out."""
    lines: list[str] = []
    room = max_mb * 1e6
    for document in read_inputs(text, text_key, BadLineCounter(0)):
        if goes_to_valid(document.text.encode(), valid_fraction, seed=0):
            continue
        for line in break_lines(document.text):
            room -= len(line)
            lines.append(line)
        if room < 0:
            break
    if not lines:
        raise ValueError(f"--text {' '.join(text)} must hold at least one line of text; give another input")
    return lines


def _needles(
    generator: random.Random,
    length: float,
    lines: list[str],
    tokens_per_byte: float,
    tokens_per_needle: float,
) -> str:
    # as often one as two to three, or 64 to 128; the text is most of a document
    most = min(MAX_NEEDLES, max(1, int(length / 4 / tokens_per_needle)))
    count = int(math.exp(generator.uniform(0, math.log(most + 1))))
    begin, size = generator.randrange(len(lines)), 0
    room = (length - count * tokens_per_needle) / tokens_per_byte
    filler = itertools.chain(itertools.islice(lines, begin, None), itertools.cycle(lines))
    taken = []
    while size < room:
        taken.append(next(filler))
        size += len(taken[-1].encode()) + 1
    return needles_with_questions(generator, taken, count)


def _pairs(generator: random.Random, length: float, tokens_per_pair: float) -> str:
    lines = max(2, round(length / tokens_per_pair))
    questions = max(1, round(lines * generator.uniform(*QUESTION_SHARE)))
    return pairs_with_questions(generator, lines - questions, questions)


def _text_before(generator: random.Random, lines: list[str], count: Callable[[str], int], tokens: int) -> str:
    """Text of the corpus of so many tokens, its line end included; of about so many where none is found at once."""
    begin, text = generator.randrange(len(lines)), ""
    filler = itertools.chain(itertools.islice(lines, begin, None), itertools.cycle(lines))
    while count(text) < tokens:
        text += next(filler) + "\n"
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        found = count(text[:middle] + "\n")
        if found == tokens:
            return text[:middle] + "\n"
        low, high = (middle + 1, high) if found < tokens else (low, middle)
    return text[:low] + "\n"


def _filled(
    generator: random.Random,
    make: Callable[[float], str],
    lines: list[str],
    count: Callable[[str], int],
    tokens: int,
) -> str | None:
    """A document of exactly so many tokens: one of about as many, after text of the corpus; None where it does not fit."""
    size = TARGET_SHARE * tokens
    for _ in range(MAX_TRIES):
        text = make(size)
        found = count(text)
        if found == tokens:
            return text
        if 0 < tokens - found <= max((1 - MIN_SHARE) * tokens, MAX_MISSING_TOKENS):
            text = _text_before(generator, lines, count, tokens - found) + text
            if count(text) == tokens:
                return text
        else:
            size *= TARGET_SHARE * tokens / found
    return None


def documents(
    lines: list[str], count: Callable[[str], int], lengths: tuple[int, int], seed: int
) -> Iterator[tuple[str, int]]:
    """Documents without end, two of needles for one of pairs, and how many tokens each has, the one that ends it included.

    Args:
        lines: filler between needles, and before what would be too short.
        count: tokens of a text.
        lengths: shortest and longest document in tokens; logarithms are drawn evenly.
        seed: a document depends on it, on `lines` and on its own number.
    """
    sample = "\n".join(lines)[:SAMPLE_BYTES]
    tokens_per_byte = count(sample) / len(sample.encode())
    generator = random.Random(f"{seed}:size")
    tokens_per_pair = count(pairs_with_questions(generator, 256, 0)) / 256
    tokens_per_needle = count(needles_with_questions(generator, [], 256)) / 256
    for number in itertools.count():
        generator = random.Random(f"retrieval:{seed}:{number}")
        length = round(math.exp(generator.uniform(*map(math.log, lengths))))
        make: Callable[[float], str] = (
            functools.partial(_pairs, generator, tokens_per_pair=tokens_per_pair)
            if number % 3 == 2
            else functools.partial(
                _needles,
                generator,
                lines=lines,
                tokens_per_byte=tokens_per_byte,
                tokens_per_needle=tokens_per_needle,
            )
        )
        document = _filled(generator, make, lines, count, length - 1)
        # needles do not fit into the very shortest documents, where three lines of pairs do
        if document:
            yield document, length


def make_retrieval(
    output: Path,
    text: Sequence[str],
    tokenizer_path: str,
    lengths: tuple[int, int],
    tokens: float,
    *,
    seed: int = 0,
    text_key: str = "text",
    max_mb: float = 64.0,
    valid_fraction: float = 0.0,
) -> int:
    """Write the documents as JSONL and give their number; arguments as on the command line.

    Raises:
        FileNotFoundError, ValueError: an input or argument is wrong; then nothing is written.
    """
    if not 64 <= lengths[0] <= lengths[1]:
        raise ValueError(
            f"--lengths {lengths[0]} {lengths[1]} must be at least 64 tokens, and the second no less than the first; "
            "such as 16384 16384"
        )
    if not 0 < tokens < math.inf:
        raise ValueError(f"--tokens {tokens} must be above 0, such as 5e7")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"--valid-fraction {valid_fraction} must be at least 0 and below 1, such as 0.02")
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output} must end in .jsonl; rename it")
    tokenizer = Tokenizer(tokenizer_path)
    lines = _filler(text, text_key, max_mb, valid_fraction)
    made = number = 0
    progress = tqdm(total=int(tokens), unit="tok", unit_scale=True, desc="retrieval", mininterval=1.0)
    output.parent.mkdir(parents=True, exist_ok=True)
    with progress, atomic_write(output) as file:
        for document, length in documents(lines, lambda x: len(tokenizer.encode(x)), lengths, seed):
            if made >= tokens:
                break
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            made, number = made + length, number + 1
            progress.update(length)
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = make_parser("make_retrieval", __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="PATH", help="filler: as make_corpus --input"
    )
    parser.add_argument("--tokenizer", required=True, help="to tell lengths in tokens")
    parser.add_argument(
        "--lengths",
        nargs=2,
        type=int,
        default=(4096, 16384),
        metavar=("SHORTEST", "LONGEST"),
        help="in tokens, the one that ends a document included (default: 4096 16384)",
    )
    parser.add_argument("--tokens", type=float, required=True, help="about how many to make")
    parser.add_argument("--seed", type=int, default=0)
    add_text_key(parser)
    parser.add_argument("--max-mb", type=float, default=64.0, help="of filler to read (default: 64)")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        help="as told to tokenize_corpus, with its default --seed: documents that it holds out give no filler (default: 0)",
    )
    return run(parser, arguments, _make)


def _make(options: argparse.Namespace) -> str:
    number = make_retrieval(
        options.output,
        options.text,
        options.tokenizer,
        tuple(options.lengths),
        options.tokens,
        seed=options.seed,
        text_key=options.text_key,
        max_mb=options.max_mb,
        valid_fraction=options.valid_fraction,
    )
    return f"{options.output}: {number} documents of {options.lengths[0]} to {options.lengths[1]} tokens"


if __name__ == "__main__":
    sys.exit(main())
