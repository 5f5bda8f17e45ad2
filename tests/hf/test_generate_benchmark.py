"""The benchmark of generation walks through all its cases without a GPU."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer, StaticCache

from benchmarks import generate
from benchmarks.density_search import PROBES, SPARE_TOKENS, set_decoding_density
from benchmarks.persistence import make_selected
from dash_megatron.hf.export import export_run
from dash_megatron.hf.fast_layer import FastLayer
from dash_megatron.hf.modeling_dash import DashForCausalLM
from dash_megatron.ops.decode import decode_and_count
from tests.conftest import run_python
from tests.data.test_chat import write_chatml

CONFIG = Path(__file__).parents[2] / "configs" / "8b_128k.yaml"
OWN = ["attention.router_projections=true", "attention.pool_heads=true"]


def _run(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    output = str(tmp_path / "generate.json")
    fixed = ["--config", str(CONFIG), "--output", output, "--tokens", "2"]
    generate.main([*fixed, "--contexts", "1024", "--prefill", "256", *arguments])
    return json.loads(Path(output).read_text())["results"]


@pytest.mark.parametrize("router", [[], OWN], ids=["shared", "own router"])
@pytest.mark.parametrize("query_pool", [1, 4])
def test_every_case_is_timed_at_the_density_asked_for(
    query_pool: int, router: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = [f"attention.query_pool={query_pool}", *router]
    results = _run(tmp_path, "--tiny", "--density", "0.2", *shape)
    assert [(x["what"], x["kind"]) for x in results] == [
        (what, kind) for what in ("decode", "prefill") for kind in ("dash", "full")
    ]
    # two layers of two heads: the density moves in steps of some chunks
    assert results[0]["density"] == pytest.approx(0.2, abs=0.05)
    for result in results:
        speed = {"decode": "tokens_per_second", "prefill": "prefill_tokens_per_second"}[str(result["what"])]
        assert float(str(result[speed])) > 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[:3] for line in table] == [
        [str(result[key]) for key in ("what", "context", "kind")] for result in results
    ]


def test_layers_that_are_always_full_decode_beside_those_with_a_router(tmp_path: Path) -> None:
    shape = ["attention.full_layers=[0]", "attention.query_pool=4", "model.layers=3"]
    decoded, *_ = results = _run(tmp_path, "--tiny", "--density", "0.2", *shape)
    assert not any("failed" in result for result in results)
    assert decoded["density"] == pytest.approx(0.2, abs=0.05)
    assert decoded["attention"]
    decoded, *_ = results = _run(tmp_path, "--tiny", "attention.full_layers=[0,1]")
    assert not any("failed" in result for result in results)
    assert decoded["density"] == 1


@pytest.mark.parametrize("option", ["--contexts", "--prefill"])
def test_an_override_may_stand_right_behind_numbers(option: str) -> None:
    options = generate.parse(
        ["model.layers=1", option, "64", "model.rope_scaling.factor=2", "--tiny", "a.b=1"]
    )
    assert options.overrides == ["model.layers=1", "model.rope_scaling.factor=2", "a.b=1"]
    assert getattr(options, option[2:]) == [64]


@torch.no_grad()
@pytest.mark.parametrize("router", [[], OWN], ids=["shared", "own router"])
def test_a_router_of_several_queries_decodes_on_at_the_density_that_was_searched(router: list[str]) -> None:
    shape = ["attention.query_pool=4", *router, "--config", str(CONFIG), "--tiny", "--contexts", "2048"]
    options = generate.parse(shape)
    model = generate.build_model(options, torch.device("cpu"))
    cache = StaticCache(config=model.config, max_cache_len=2048 + SPARE_TOKENS)
    generate.fill_cache(model, cache, 2048)
    assert set_decoding_density(model, cache, 2048, 0.1) == pytest.approx(0.1, abs=0.005)
    for layer in cache.layers:
        assert isinstance(layer, FastLayer)
        assert layer.store.queries is not None
        assert layer.store.queries.abs().sum((0, 2, 3)).all()
    shares = []

    def count(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, selected = decode_and_count(*arguments, **options)
        shares.append((selected / (2048 / 16)).mean().item())
        return out, selected

    with patch("dash_megatron.ops.decode.decode_and_count", count):
        for place in range(2048, 2048 + 32):
            token = torch.randint(model.vocab_size, (1, 1))
            model(token, position_ids=torch.full_like(token, place), past_key_values=cache)
    assert len(shares) == 64
    assert statistics.mean(shares) == pytest.approx(0.1, abs=0.03)


def test_a_case_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(generate.CASES, "decode", fails)
    results = _run(tmp_path, "--tiny")
    assert [x.get("failed") for x in results] == ["RuntimeError: out of memory"] * 2 + [None] * 2


def test_prompts_attend_to_choices_like_those_of_a_trained_model(tmp_path: Path) -> None:
    output = tmp_path / "generate.json"
    fixed = ["--config", str(CONFIG), "--tiny", "--prefill", "256", "--output", str(output)]
    shape = ["--choices", "d11_w2m16", "attention.chunk_size=64", "model.head_dim=16"]
    shape += ["attention.local_chunks=2", "attention.query_pool=16"]
    done = run_python(
        "-m", "benchmarks.generate", *fixed, *shape, cwd=CONFIG.parents[1], TRITON_INTERPRET="1"
    )
    assert not done.returncode, done.stderr
    dash, full = json.loads(output.read_text())["results"]
    assert (dash["what"], dash["kind"], full["kind"]) == ("prefill", "dash", "full")
    assert dash["prefill_tokens_per_second"] > 0
    made = make_selected("d11_w2m16", 2, 2, 256, 64, "cpu", seed=2)
    wanted = (made.sum(-1) + 1).double().mean().item() / 2.5
    assert dash["density"] == pytest.approx(wanted)


def test_choices_of_other_chunks_are_refused(tmp_path: Path) -> None:
    *_, dash, _ = _run(
        tmp_path, "--tiny", "--choices", "d11_c32", "attention.chunk_size=64", "model.head_dim=16"
    )
    assert "--choices d11_c32 must be one of ['d11', 'd25']" in str(dash["failed"])


@pytest.mark.parametrize("name", ["mixed", "own_router"])
def test_an_export_is_timed_on_a_text_as_it_selects(
    name: str, write_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_chatml(tmp_path / "source")
    config, _ = write_run(name, data={"tokenizer": str(source)})
    folder, text, output = tmp_path / "hf", tmp_path / "text", tmp_path / "generate.json"
    export_run(config.run_dir, folder, dtype="float32")
    text.write_text("chunks of tokens, " * 40)
    fixed = ["--model", str(folder), "--text", str(text), "--output", str(output)]
    generate.main([*fixed, "--prefill", "240", "10000"])
    dash, full, *longer = json.loads(output.read_text())["results"]
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"][:240]])
    model = DashForCausalLM.from_pretrained(folder).eval()
    layers = [layer.self_attn for layer in model.model.layers if not layer.self_attn.is_full]
    for attention in layers:
        attention.keep_selection = True
    model(tokens)
    place = torch.linspace(240 // PROBES, 240, PROBES).int() - 1
    chunks = place // layers[0].router.chunk_size + 1
    wanted = [(x.selection[0][:, place].sum(-1) / chunks).mean().item() for x in layers]
    assert dash["density"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
    assert full["density"] == 1
    assert full["prefill_tokens_per_second"] > 0
    assert all("must have the 10000 of --prefill" in x["failed"] for x in longer)
    with pytest.raises(SystemExit):
        generate.parse(["--text", str(text)])
    with pytest.raises(SystemExit):
        generate.parse(["--model", str(folder), "--contexts", "64"])
    assert "must be left out beside --model" in capsys.readouterr().err
