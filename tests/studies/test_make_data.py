"""The data that the larger studies train on."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dash_megatron.data.blend import blend_prefixes
from dash_megatron.data.sidecar import Sidecar
from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "VOCAB_SIZE": "400", "LONG_TOKENS": "2e4", "SHORT_TOKENS": "6e3", "LENGTHS": "1024 2048", "SHORT_LENGTHS": "256 512", "PARTS": "2",
    "HELD_OUT": "0.4", "MIDDLE_TOKENS": "2e4", "MIDDLE_LENGTHS": "512 512",
}  # fmt: skip


def make_data(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "studies" / "make_data.sh"), *arguments],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, "PYTHON": sys.executable, "OUTPUT": str(output)},
        text=True,
        capture_output=True,
        timeout=300,
    )


def write_texts(folder: Path, documents: int, seed: int) -> str:
    """Always the same: which documents are held out is drawn from what they say."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(500)]
    for number in range(documents):
        (folder / f"part_{number}").mkdir(parents=True)
        lines = (" ".join(draw.choices(words, k=10)) for _ in range(1000))
        (folder / f"part_{number}" / "text.py").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_studies_find_all_the_data_that_they_name(tmp_path: Path) -> None:
    texts = [write_texts(tmp_path / name, 3, seed) for seed, name in enumerate(("one", "other", "valid"))]
    done = make_data(tmp_path / "data", *texts[:2], "--", texts[2])
    assert done.returncode == 0, done.stderr
    sidecars = {}
    for name in ("quality_16k", "retrieval_16k", "scaling_8k", "choices_8k", "branches_16k"):
        for run in expand(load_study(ROOT / "studies" / f"{name}.yaml")):
            data = run.config.data
            assert data.tokenizer == "data/tokenizer.model"
            for prefix in blend_prefixes([*data.train, *data.valid]):
                sidecars[prefix] = Sidecar.read(str(tmp_path / prefix))
    assert set(sidecars) == {
        f"data/{name}"
        for name in (
            "train", "valid", "held_out", "retrieval", "retrieval_short", "retrieval_valid",
            "retrieval_8k",
        )
    }  # fmt: skip
    assert sidecars["data/retrieval"].tokens == pytest.approx(2e4, rel=0.5)
    assert sidecars["data/retrieval_short"].tokens == pytest.approx(6e3, rel=0.5)
    assert (tmp_path / "data" / "tokenizer.model").is_file()


def test_without_folders_on_both_sides_it_says_how_it_is_called(tmp_path: Path) -> None:
    done = make_data(tmp_path / "data", "--", str(ROOT))
    assert done.returncode == 2
    assert "usage: studies/make_data.sh TRAIN_FOLDER... -- VALID_FOLDER" in done.stderr
    assert not (tmp_path / "data").exists()
