"""The picture of attention's time against density is drawn from the table of stages."""

import csv
from pathlib import Path

import pytest

from docs.tools.kernel_picture import TABLE, density, label, main, ours


def test_density_is_pairs_selected_over_those_available() -> None:
    # two rows of three chunks, two heads: 2 x 2 x 16 x (1 + 2 + 3) pairs, of which half
    row = {"batch": "2", "kv_heads": "2", "tokens": "48", "chunk_size": "16", "selected": "0.000192"}
    assert density(row) == pytest.approx(0.5)


def test_stages_are_added_up_where_no_whole_pass_was_timed() -> None:
    with TABLE.open() as lines:
        rows = {row["routing"]: row for row in csv.DictReader(lines) if row["forward"]}
    row = rows["like d25_c32_w4m16g layer 3"]
    # route, attend, queries, the router's backward, keys
    assert ours(row, "total") == pytest.approx(16.62 + 32.00 + 60.05 + 6.54 + 158.14)
    assert ours(row, "forward") == 47.88


def test_the_picture_has_every_row_whose_whole_passes_were_timed(tmp_path: Path) -> None:
    main(["--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["kernel_routings.png"]
    with TABLE.open() as lines:
        timed = [row for row in csv.DictReader(lines) if row["forward"]]
    assert {label(row) for row in timed} >= {
        "each query for itself, 64K, 32/8, D = 128, C = 64",
        "runs of 32 queries, 64K, 32/2, D = 128, C = 64",
        "trained routers, 8 x 16K, 8/2, D = 64, C = 32",
        "like a trained router, 64K, 32/8, D = 128, C = 32",
    }
