"""The picture of attention's time against density is drawn from the table of stages."""

import csv
from pathlib import Path

import pytest

from docs.tools.kernel_picture import TABLE, density, label, main


def test_density_is_pairs_selected_over_those_available() -> None:
    # two rows of three chunks, two heads: 2 x 2 x 16 x (1 + 2 + 3) pairs, of which half
    row = {"batch": "2", "kv_heads": "2", "tokens": "48", "chunk_size": "16", "selected": "0.000192"}
    assert density(row) == pytest.approx(0.5)


def test_the_picture_has_every_row_whose_whole_passes_were_timed(tmp_path: Path) -> None:
    main(["--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["kernel_routings.png"]
    with TABLE.open() as lines:
        timed = [row for row in csv.DictReader(lines) if row["forward"]]
    assert {label(row) for row in timed} >= {
        "each query for itself, 64K, 32/8, D = 128, C = 64",
        "runs of 32 queries, 64K, 32/2, D = 128, C = 64",
        "trained routers, 8 x 16K, 8/2, D = 64, C = 32",
    }
