"""Continuing a prompt with a trained checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from dash_megatron.__main__ import main
from tests.conftest import run_in_processes
from tests.tiny import WORDS
from tests.training.workers import train_all


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path_factory.mktemp("trained")),
        "model": {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96},
        "attention": {"chunk_size": 16},
        "data": {"tokenizer": str(tiny_data / "tokenizer.model"), "train": [str(tiny_data / "train")]},
        "training": {"steps": 40, "global_batch": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-2},
    }
    tree["data"].update(seq_length=128, num_workers=0)
    run_in_processes(tmp_path_factory.mktemp("logs"), 1, train_all, [(tree, None)])
    return tree["run_dir"]


def test_a_trained_model_continues_in_the_words_it_has_read(
    trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["sample", trained, "--prompt", "def1 self2 ", "--max-new-tokens", "60", "--temperature", "0.5"])
        == 0
    )
    text = capsys.readouterr().out.splitlines()[-1]
    assert text.startswith("def1 self2 ")
    assert any(word in text[len("def1 self2 ") :] for word in WORDS)


def test_the_same_seed_draws_the_same_text(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["sample", trained, "--prompt", "def1 ", "--seed", seed, "--max-new-tokens", "40"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "7"], "no checkpoint of step 7"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0, which takes the argmax, or at least 0.001"),
        (["--temperature", "nan"], "temperature=nan must be 0, which takes the argmax, or at least 0.001"),
        (
            ["--temperature", "1e-40"],
            "temperature=1e-40 must be 0, which takes the argmax, or at least 0.001",
        ),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--seed", "99999999999999999999"], "seed=99999999999999999999 must lie in [0, 2**63)"),
        (["--prompt", "long " * 200], "must have fewer than data.seq_length=128"),
    ],
)
def test_a_wrong_argument_is_an_error(
    arguments: list[str], message: str, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", trained, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_folder_is_told_apart_from_a_run_without_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for tool in ("sample", "evaluate"):
        assert main([tool, str(tmp_path / "nothing")]) == 2
        assert f"{tmp_path}/nothing does not exist" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "empty")]) == 2
    assert "empty has no checkpoint; give the folder of a run that saved one" in capsys.readouterr().err
