"""Tokens are read in spite of short outages, and a file cut short is an error that says so, not the process's end."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from dash_megatron.data.bin_reader import BinReader


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "train.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    return path


def test_a_piece_is_read_from_its_place(numbers: Path) -> None:
    reader = BinReader(str(numbers))
    assert reader.read(np.uint16, 3, 20).tolist() == [10, 11, 12]
    assert reader.read(np.uint16, 0, 20).tolist() == []


def test_a_file_that_is_away_for_a_moment_is_waited_for(numbers: Path) -> None:
    away = numbers.with_suffix(".away")
    os.rename(numbers, away)
    threading.Timer(0.5, os.rename, (away, numbers)).start()
    assert BinReader(str(numbers), seconds=30).read(np.uint16, 1, 0).tolist() == [0]


def test_a_file_cut_short_while_it_is_read_is_named(numbers: Path) -> None:
    reader = BinReader(str(numbers), seconds=30)
    assert reader.read(np.uint16, 2, 0).tolist() == [0, 1]
    os.truncate(numbers, 100)
    with pytest.raises(OSError, match=r"read 20 bytes at 90 of .*train.bin: the file ends at byte 100"):
        reader.read(np.uint16, 10, 90)
