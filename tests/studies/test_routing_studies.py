"""Dispersion of routing on scores whose answer is known, and runs that have no router to study."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_megatron.__main__ import main
from dash_megatron.ops.types import Router
from dash_megatron.studies import dispersion as module
from dash_megatron.studies import routing, routing_pictures
from dash_megatron.studies.dispersion import dispersion, group_mean

ROOT = Path(__file__).parents[2]


def test_equal_scores_spread_over_all_chunks_and_a_clear_winner_takes_all_of_entmax() -> None:
    z = torch.zeros(1, 2, 16)
    for alpha in (None, 1.5, 2.0):
        found = dispersion(group_mean(z, alpha))
        assert found["effective_chunks"].item() == pytest.approx(16, rel=1e-4)
        assert found["density"].item() == 1
    # beyond a gap of 1 / (alpha - 1) the best chunk has all of the probability, however many others there are
    z[..., 0] = 2.5
    for alpha in (1.5, 2.0):
        found = dispersion(group_mean(z, alpha))
        assert found["effective_chunks"].item() == pytest.approx(1)
        assert (found["largest"].item(), found["density"].item()) == (pytest.approx(1), 1 / 16)
    largest = dispersion(group_mean(z, None))["largest"].item()
    assert largest == pytest.approx(math.exp(2.5) / (math.exp(2.5) + 15))


def test_heads_that_want_different_chunks_spread_the_mean_of_their_group() -> None:
    z = 10 * torch.eye(4)[None, :, :]
    assert dispersion(group_mean(z, 1.5))["effective_chunks"].item() == pytest.approx(4, rel=1e-4)
    alone = list(module._groups(z, 1, 1.5))
    assert len(alone) == 4
    assert all(dispersion(p)["effective_chunks"].item() == pytest.approx(1) for p in alone)


def test_made_up_inputs_grow_by_appending_and_are_the_same_for_a_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNKS", (16, 64))
    sources, again = dict(module._made_up(3)), dict(module._made_up(3))
    assert sources.keys() == module.INPUTS.keys()
    for name, source in sources.items():
        (short,), (long,) = source.scores
        assert long.shape == (module.QUERIES, 16, 64)
        assert torch.equal(short, long[..., :16])
        assert torch.equal(long, again[name].scores[1][0])
    assert sources["random"].scores[1][0].std().item() == pytest.approx(1, abs=0.05)


def test_scores_of_a_run_are_of_queries_that_have_so_many_chunks_to_select_from() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 100, 4, 8, generator=generator), torch.randn(1, 100, 2, 8, generator=generator)
    found: dict[int, list[Any]] = {}
    router = Router(8, torch.tensor([1.0, 3.0]), local_chunks=1, query_pool=3)
    for count, z in module._scores_by_chunks(q, k, torch.zeros(2, 8), router, most=3):
        found.setdefault(count, []).append(z)
    assert {count: [list(z.shape) for z in scores] for count, scores in found.items()} == {
        4: [[3, 2, 4]] * 2,
        8: [[3, 2, 8]] * 2,
    }
    # the last one with 4 chunks before the local one: token 47, on the mean keys of chunks 0 to 3
    means = k[0, :32, 1].view(4, 8, 8).mean(1)
    factor = 3.0 / math.sqrt(8)
    torch.testing.assert_close(found[4][1][-1], factor * q[0, 45:48, 2:].mean(0) @ means.T)


@pytest.mark.parametrize(
    ("attention", "valid", "message"),
    [
        ({"kind": "full"}, True, "has no router: attention.kind=full"),
        ({"full_layers": [0, 1]}, True, r"has no router: .*full_layers=\[0, 1\]"),
        ({}, False, "has no validation data"),
    ],
    ids=["dense", "all layers dense", "no data"],
)
def test_a_run_without_a_router_or_validation_data_is_an_error(
    attention: dict[str, Any],
    valid: bool,
    message: str,
    tiny_config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dash_megatron.config import config_from_dict

    tree = {**tiny_config, "attention": attention}
    tree["data"] = {**tree["data"], "valid": tree["data"]["valid"] if valid else []}
    monkeypatch.setattr(routing, "load_weights", lambda *_: (config_from_dict(tree), 4, {}))
    with pytest.raises(ValueError, match=message), routing.open_run("runs/tiny"):
        pass


def test_a_folder_without_checkpoints_and_a_wrong_device_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "routing", str(tmp_path)]) == 2
    assert "has no checkpoint; give the folder of a run" in capsys.readouterr().err
    assert main(["study", "dispersion", str(tmp_path), "--device", "tpu", "--output", str(tmp_path)]) == 2
    assert "--device tpu must be auto, cpu, or cuda" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["0", "-5"])
def test_a_length_without_tokens_is_an_error(
    length: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "routing", str(tmp_path), "--length", length]) == 2
    assert f"--length {length} must be at least 1" in capsys.readouterr().err


def test_made_up_inputs_have_no_step_and_no_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--step", "--length"):
        assert main(["study", "dispersion", option, "3", "--output", str(tmp_path / "out")]) == 2
        assert "give RUN_DIR too" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_say_what_they_show_and_of_which_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: dict[str, str] = {}
    ticks: dict[str, list[str]] = {}

    def note(figure: Any, path: Path) -> None:
        titles[path.name] = figure.get_suptitle()
        ticks[path.name] = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
        routing_pictures.plt.close(figure)

    monkeypatch.setattr(routing_pictures, "save", note)
    report = json.loads((ROOT / "docs" / "results" / "quality" / "routing_second.json").read_text())
    routing_pictures.draw_routing(report, {0: np.zeros((2, 8, 8))}, tmp_path)
    assert titles["chunks.png"] == (
        "Which chunks the tokens of each chunk select\n"
        "dash_25-dash_1.5e+08tok_seed1 step 1144, one validation document of 16,384 tokens"
    )
    assert len({title.partition("\n")[0] for title in titles.values()}) == 4
    assert ticks["positions.png"] == [f"{64 << power:,}" for power in range(9)]
