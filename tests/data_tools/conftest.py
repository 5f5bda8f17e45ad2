"""Documents, and a small tokenizer for them."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data_tools.train_tokenizer import train


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    words = [
        "alpha",
        "beta",
        "\u03b3\u03ac\u03bc\u03bc\u03b1",
        "def f(x):\n    return x",
        "12345",
        "\u2581",
        "\u2028line",
        "caf\u00e9",
    ]
    return [f"text {number} " + " ".join(rng.choices(words, k=rng.randrange(1, 40))) for number in range(400)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory, texts) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    train([str(folder / "texts.jsonl")], folder / "tokenizer.model", vocab_size=330)
    return folder / "tokenizer.model"


@pytest.fixture(
    params=["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.parquet", "a.arrow", "folder"]
)
def input_name(request) -> str:
    """A name for `write_input`, one of each kind."""
    return request.param


@pytest.fixture(scope="session")
def write_input():
    """A function that writes texts to a file of the kind its name tells, or as text files into a folder."""

    def write(path: Path, texts: list[str], text_key: str = "text") -> Path:
        lines = "".join(json.dumps({"id": 1, text_key: text}) + "\n" for text in texts).encode()
        records = [{"id": 1, text_key: text} for text in texts]
        if path.name.endswith((".jsonl", "lines.json", ".ndjson")):
            path.write_bytes(lines)
        elif path.name.endswith(".json"):
            path.write_text(json.dumps(records, indent=1))
        elif path.name.endswith(".json.gz"):
            path.write_bytes(gzip.compress(json.dumps(records).encode()))
        elif path.name.endswith((".arrow", ".feather")):
            table = pyarrow.table({"id": list(range(len(texts))), text_key: texts})
            new = pyarrow.ipc.new_stream if path.name.endswith(".arrow") else pyarrow.ipc.new_file
            with new(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=37)
        elif path.name.endswith(".gz"):
            # two members, as `cat a.gz b.gz` makes them
            middle = len(lines) // 2
            path.write_bytes(gzip.compress(lines[:middle]) + gzip.compress(lines[middle:]))
        elif path.name.endswith(".zst"):
            compress, middle = zstandard.ZstdCompressor().compress, len(lines) // 2
            path.write_bytes(compress(lines[:middle]) + compress(lines[middle:]))
        elif path.name.endswith(".parquet"):
            table = pyarrow.table({"id": list(range(len(texts))), text_key: texts})
            pyarrow.parquet.write_table(table, path, row_group_size=37)
        else:
            path.mkdir()
            for number, text in enumerate(texts):
                folder = path / f"part{number // 100}"
                folder.mkdir(exist_ok=True)
                (folder / f"{number:05d}.txt").write_bytes(text.encode())
        return path

    return write
