"""The benchmark of generation walks through all its cases without a GPU."""

import json
from pathlib import Path

import pytest

from benchmarks import generate

CONFIG = Path(__file__).parents[2] / "configs" / "8b_128k.yaml"


def _run(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    output = str(tmp_path / "generate.json")
    fixed = ["--config", str(CONFIG), "--output", output, "--tokens", "2"]
    generate.main([*fixed, "--contexts", "1024", "--prefill", "256", *arguments])
    return json.loads(Path(output).read_text())["results"]


def test_every_case_is_timed_at_the_density_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = _run(tmp_path, "--tiny", "--density", "0.2")
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


def test_a_case_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(generate.CASES, "decode", fails)
    results = _run(tmp_path, "--tiny")
    assert [x.get("failed") for x in results] == ["RuntimeError: out of memory"] * 2 + [None] * 2
