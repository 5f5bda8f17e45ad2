"""The tables and pictures of docs/scaling.md are made by docs/tools/scaling.py."""

from pathlib import Path

import pytest

from dash_megatron.config import load_config
from dash_megatron.planning import traffic
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.search import search
from docs.tools import scaling
from docs.tools.scaling import Extent, fill_in, sparse_ratio

ROOT = Path(__file__).parents[2]


def test_the_quick_tables_of_the_page_are_current() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    names = ("steps", "kernels", "exchanges", "balance")
    assert fill_in(page, names) == page, "run `python -m docs.tools.scaling --output docs/`"
    with pytest.raises(ValueError, match="begin steps"):
        fill_in("", ["steps"])


def test_a_row_of_the_tables_of_routers_and_of_layouts_is_current() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    extent = Extent(("512K",), densities=(0.25,), table_gpus=(64,), table_densities=(0.1,))
    for table in (scaling.router_table, scaling.layout_table):
        assert table(extent).splitlines()[-1] in page, "run `python -m docs.tools.scaling --output docs/`"


def test_parallelism_tells_what_sums_in_float32_cost_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "8b_128k.yaml")

    def lost(gpus: int) -> str:
        speeds = []
        for gradient_bytes in (2, 4):
            monkeypatch.setattr(traffic, "FLOAT32_BYTES", gradient_bytes)
            speeds.append(search(config, gpus, AssumedRouting(density=0.1))[0].tokens_per_second_per_gpu)
        return f"{1 - speeds[1] / speeds[0]:.1%}"

    page = " ".join((ROOT / "docs" / "parallelism.md").read_text().split())
    assert (
        f"8B at 128K and 10% loses {lost(64)} of its throughput by this on 64 GPUs, and {lost(512)} on 512"
        in page
    )


def test_sparse_saves_nothing_without_locality() -> None:
    assert sparse_ratio(0.1, 0.0) == pytest.approx(1.0, abs=0.01)
    assert sparse_ratio(0.02, 0.98) < 0.3


def test_the_page_and_its_pictures_are_made_in_one_go_at_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in scaling.TABLES:
        text = f"<!-- begin {name} -->\n<!-- end -->\n"
        with (tmp_path / "scaling.md").open("a") as page:
            page.write(text)
    scaling.main(["--output", str(tmp_path), "--small"])
    page = (tmp_path / "scaling.md").read_text()
    assert page.count("\n| --- |") == len(scaling.TABLES)
    pictures = {path.name for path in (tmp_path / "results").iterdir()}
    parts = ("throughput", "step", "sparse", "balance")
    assert pictures == {f"scaling_{part}.png" for part in parts}
    assert pictures == {path.name for path in (ROOT / "docs" / "results").glob("scaling_*.png")}
