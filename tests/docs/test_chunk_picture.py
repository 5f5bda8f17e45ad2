"""The picture of what a trained router selects is drawn from the choices in the repository."""

from pathlib import Path

import numpy as np

from docs.tools.chunk_picture import in_cells, main, selected_shares


def test_a_cell_is_the_mean_over_its_pairs_of_a_chunk_and_an_earlier_one() -> None:
    share_Hcc = np.where(np.tri(8), np.arange(64.0).reshape(8, 8), np.nan)[None]
    cells = in_cells(share_Hcc)
    assert cells.shape == (1, 2, 2)
    assert cells[0, 1, 0] == share_Hcc[0, 4:, :4].mean()
    assert cells[0, 1, 1] == np.nanmean(share_Hcc[0, 4:, 4:])
    assert np.isnan(cells[0, 0, 1])


def test_tokens_select_their_own_chunk_and_no_later_one() -> None:
    share_Hcc = selected_shares(2)
    chunks = share_Hcc.shape[1]
    assert (np.diagonal(share_Hcc, axis1=1, axis2=2) == 1).all()
    assert (np.isfinite(share_Hcc) == np.tri(chunks, dtype=bool)).all()
    # the README of the choices says 0.026 of past chunks
    past = np.tri(chunks, k=-1, dtype=bool)
    assert round(float(share_Hcc[:, past].mean()), 3) == 0.026


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    main(["--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["quality_chunks.png"]
