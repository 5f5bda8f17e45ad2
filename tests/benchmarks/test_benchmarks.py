"""Every benchmark runs at toy size without a GPU, with the kernels in Triton's interpreter, and reports plausible figures."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.choices import load_selected
from benchmarks.persistence import make_selected
from dash_megatron.config import ParallelConfig, config_from_dict
from tests.conftest import NO_GPU, run_python

ROOT = Path(__file__).parents[2]
STAGES = [
    "layout",
    "summarize",
    "route",
    "attend",
    "backward_queries",
    "backward_router",
    "backward_keys",
]
COVERED_ELSEWHERE = {
    "generate": "tests/hf/test_generate_benchmark.py",
    "density_search": "part of generate",
    "layouts": "tests/benchmarks/test_layouts.py",
    "layout_case": "part of layouts",
}
PARTS = {"cases", "choices", "given", "inputs", "kernels", "persistence", "stages", "timing"}


def _run(*command: str, interpreted: bool = True) -> str:
    done = run_python(*command, cwd=ROOT, **({"TRITON_INTERPRET": "1"} if interpreted else {}))
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_attention_times_every_stage_and_its_json_is_drawn(tmp_path: Path) -> None:
    measured, picture = tmp_path / "attention.json", tmp_path / "attention.png"
    table = _run("benchmarks/attention.py", "--tiny", "--json", str(measured))
    results = json.loads(measured.read_text())["results"]
    assert [row["case"]["tokens"] for row in results] == [48, 64, 64]
    for row in results:
        assert row["case"]["name"] in table
        assert 0.5 < row["density"] <= 1.0
        assert list(row["stages"]) == STAGES
        assert all(time > 0 for time in (*row["stages"].values(), *row["milliseconds"].values()))
        assert set(row["dense"]) == {"math", "reference"}
        assert not any(row["spread"].values())
    length = ["--tokens", "64", "--topics", "2"]
    _run("benchmarks/plot_attention.py", str(measured), "--output", str(picture), *length)
    assert picture.stat().st_size > 20_000


def test_attention_is_timed_on_chunks_that_a_trained_router_selected(tmp_path: Path) -> None:
    measured = tmp_path / "attention.json"
    trained = ["--tiny", "--routing", "trained", "--batch", "2"]
    _run("benchmarks/attention.py", *trained, "--json", str(measured))
    (row,) = json.loads(measured.read_text())["results"]
    assert (row["case"]["model"], row["case"]["layer"], row["case"]["batch"]) == ("d11", 2, 2)
    # the last 4 of 256 chunks
    past_HNc = load_selected("d11", 2)[:, -256:, -4:]
    own_N = torch.arange(256) // 64
    assert row["density"] == pytest.approx(((past_HNc.sum(-1) + 1) / (own_N + 1)).mean().item(), abs=1e-6)
    # of two rows and two heads, with the own chunks
    visited = past_HNc.unflatten(1, (-1, row["tiles"]["tokens"])).any(2).sum() * row["tiles"]["tokens"]
    pairs = {"selected": past_HNc.sum() + 512, "visited": visited + 512, "available": 2 * (own_N + 1).sum()}
    assert row["pairs"] == {name: 2 * int(count) for name, count in pairs.items()}
    assert list(row["errors"]) == ["out", "dq", "dk", "dv"]
    assert list(row["stages"]) == STAGES
    assert set(row["dense"]) == {"math"}


def test_queries_of_a_case_select_as_told(tmp_path: Path) -> None:
    measured = tmp_path / "attention.json"
    case = ["--tiny", "--cases", "64 tokens, 10 topics"]
    table = _run(
        "benchmarks/attention.py", *case, "--routing", "runs:2", "--no-deterministic", "--json", str(measured)
    )
    (row,) = json.loads(measured.read_text())["results"]
    assert row["case"]["run"] == 2
    assert list(row["milliseconds"]) == ["forward", "forward and backward"]
    assert "deterministic" not in table
    assert row["case"]["name"] == "64 tokens, 10 topics, runs:2"
    with pytest.raises(AssertionError, match="runs:0 must be independent, runs:N, unstructured or trained"):
        _run("benchmarks/attention.py", *case, "--routing", "runs:0")


def test_choices_like_a_trained_routers_are_made_for_any_case(tmp_path: Path) -> None:
    measured = tmp_path / "attention.json"
    case = ["--tiny", "--cases", "64 tokens, 2 topics", "--tokens", "192"]
    _run("benchmarks/attention.py", *case, "--routing", "trained:d25:2", "--json", str(measured))
    (row,) = json.loads(measured.read_text())["results"]
    assert row["case"]["name"] == "64 tokens, 2 topics, trained:d25:2, 192 tokens"
    made = make_selected("d25", 2, heads=1, tokens=192, chunk_size=64, device="cpu")
    assert row["pairs"]["selected"] == made.sum() + 192
    with pytest.raises(AssertionError, match=r"trained:d25:1 must be independent, .* 'trained:d25:2'"):
        _run("benchmarks/attention.py", *case, "--routing", "trained:d25:1")


def test_decode_times_caches_of_both_layouts(tmp_path: Path) -> None:
    measured = tmp_path / "decode.json"
    _run("-m", "benchmarks.decode", "--tiny", "--sweep", "--output", str(measured))
    contiguous, paged = json.loads(measured.read_text())["results"]
    for row in (contiguous, paged):
        assert 0.2 < row["density"] <= 1.0
        assert row["ours"] > 0
        assert {"{}", '{"splits": 3}', '{"block_scores": 1024}'} <= row["sweep"].keys()
    assert contiguous["speedup"] > 0
    assert contiguous["append"] > 0
    assert not paged["dense"]


def test_tuning_finds_a_configuration_for_every_stage(tmp_path: Path) -> None:
    table = tmp_path / "configs.json"
    shape = ["--groups", "2", "--head-dim", "16", "--chunk-size", "16", "--tile-rows", "32"]
    _run("benchmarks/tune_kernels.py", "--tiny", *shape, "--table", str(table))
    entry = json.loads(table.read_text())["CPU"]["bfloat16 D=16 C=16 G=2"]
    stages = {"route", "attend", "attend_pairs", "queries", "backward_pairs", "router", "keys", "pairs"}
    above = {"pairs_above", "attend_pairs_above", "backward_pairs_above"}
    assert entry.keys() == stages | above | {"tile_rows", "parts_per_multiprocessor"}
    assert all(entry[name] >= 0 for name in above)
    assert all({"num_warps", "num_stages"} <= entry[stage].keys() for stage in stages)


@pytest.mark.parametrize("own", ["false", "true"])
def test_a_whole_step_is_timed_with_full_attention_and_at_a_density(own: str, tmp_path: Path) -> None:
    measured = tmp_path / "step.json"
    arguments = ["--densities", "0.4", "--steps", "1", "--json", str(measured), "data.seq_length=512"]
    arguments += [f"attention.router_projections={own}"]
    _run("benchmarks/step.py", "--config", "configs/1b_16k.yaml", "--tiny", *arguments, interpreted=False)
    full, dash = json.loads(measured.read_text())["results"]
    assert (full["kind"], full["density"]) == ("full", 1.0)
    assert dash["kind"] == "dash"
    # two layers of two heads: the density moves in steps of some chunks
    assert dash["density"] == pytest.approx(0.4, abs=0.1)
    for row in (full, dash):
        assert row["tokens_per_second"] > 0
        assert row["attention_share"] < 1


def test_a_whole_step_of_a_model_of_full_size_needs_a_gpu() -> None:
    # as its users start it
    command = [sys.executable, "benchmarks/step.py", "--config", "configs/1b_16k.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | NO_GPU, capture_output=True, text=True)
    assert done.returncode
    assert "error: there is no GPU; add --tiny to time two narrow layers" in done.stderr


def test_a_whole_step_is_timed_with_choices_of_trained_routers(tmp_path: Path) -> None:
    measured = tmp_path / "step.json"
    trained = ["--config", "configs/1b_16k.yaml", "--tiny", "--routing", "trained", "--steps", "1"]
    overrides = [
        "data.seq_length=96",
        "attention.local_chunks=0",
        "attention.query_pool=1",
        "attention.router_projections=true",
    ]
    _run("benchmarks/step.py", *trained, "--json", str(measured), *overrides)
    full, *dash = json.loads(measured.read_text())["results"]
    assert full["choices"] is None
    assert [row["choices"] for row in dash] == ["d11_c32", "d25_c32"]
    own_N = torch.arange(96) // 32
    for row in dash:
        # the file's one layer stands for both
        made = make_selected(row["choices"], 2, 2, 96, 32, "cpu", seed=2)
        wanted = (made.sum(-1) + 1).double().mean() / (own_N + 1).double().mean()
        assert row["density"] == pytest.approx(wanted.item(), abs=1e-4)
        assert row["attention_share"] > 0
    with pytest.raises(AssertionError, match=r"chunk_size=128, .*local_chunks=4 must be one of the pairs"):
        _run("benchmarks/step.py", *trained, "attention.chunk_size=128")
    # the reference would select by its own routers
    with pytest.raises(AssertionError, match=r"gives choices to the Triton kernels.*set TRITON_INTERPRET=1"):
        _run("benchmarks/step.py", *trained, interpreted=False)


def test_full_attention_of_packed_rows_is_timed_by_what_is_here(tmp_path: Path) -> None:
    measured = tmp_path / "full.json"
    table = _run("benchmarks/full_attention.py", "--tiny", "--json", str(measured), interpreted=False)
    found = json.loads(measured.read_text())
    assert found["auto"] == "each"
    assert [row["documents"] for row in found["results"] if row["way"] == "each"] == [2, 8]
    for row in found["results"]:
        assert row["both_ms"] > 0 if row["way"] == "each" else "on cpu" in row["reason"]
    assert "training takes each" in table


@pytest.fixture
def single_process() -> Iterator[None]:
    from dash_megatron.parallel import destroy_process_groups, init_process_groups, read_launch

    init_process_groups(read_launch({}), ParallelConfig())
    yield
    destroy_process_groups()


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", ["dash", "full"])
def test_a_step_without_attention_calls_none(kind: str, tiny_config: dict[str, Any]) -> None:
    from benchmarks.step import hand_values_through
    from dash_megatron.layers import build_model, init_weights
    from dash_megatron.layers.core_attention import CoreAttention

    tiny_config["attention"]["kind"] = kind
    config = config_from_dict(tiny_config)
    model = build_model(config, 320, torch.device("cpu"))
    init_weights(model, 0, config.model.init_std)
    cores = [module for module in model.modules() if isinstance(module, CoreAttention)]
    assert len(cores) == 2
    tokens = torch.arange(32)[None]
    x = {name: torch.randn(32, 1, heads, 16) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    attended = cores[0](**x, attention_mask=None)
    hand_values_through(model)
    out = cores[0](**x, attention_mask=None)
    assert attended.shape == out.shape == (32, 1, 64)
    assert not torch.equal(attended, out)
    assert torch.equal(out.view(32, 1, 2, 2, 16), x["value"][:, :, :, None].expand(-1, -1, -1, 2, -1))
    for core in cores:
        core.routing = None
    loss = model(tokens, tokens, tokens, None)
    assert torch.isfinite(loss).all()
    assert all(core.routing is None for core in cores)


def test_every_benchmark_is_run_by_a_test() -> None:
    here = Path(__file__).read_text()
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if path.stem not in PARTS and path.stem not in COVERED_ELSEWHERE:
            assert f"benchmarks/{path.name}" in here or f"benchmarks.{path.stem}" in here, path.name
