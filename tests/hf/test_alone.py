"""An exported folder where nothing of this repository, and little else, can be imported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf.export import export_run
from dash_megatron.training.sample import sample_from_run
from tests.training.test_resume import run_of
from tests.training.workers import train_all

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
# refuses what a fresh environment with torch, transformers and safetensors does not have, then runs a script
ALONE = """
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

REFUSED = {"dash_megatron", "data_tools", "deepspeed", "megatron", "triton", "sentencepiece", "google", "accelerate"}

class Fresh(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else super().find_spec(name, path, target)

# without the finder of packages under development
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Fresh]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not REFUSED & set(sys.modules), REFUSED & set(sys.modules)
"""


def test_an_exported_model_alone_generates_the_text_of_training(
    tiny_config: dict[str, Any], run_processes: Callable[..., None], tmp_path: Path
) -> None:
    attention = {"scaling_factor": 4.0, "local_chunks": 1, "query_pool": 16}
    changes = {"training": {"steps": 30}, "data": {"seq_length": 256}, "attention": attention}
    tree = run_of(tiny_config, tmp_path / "run", **changes)
    run_processes(1, train_all, [(tree, None)])
    export_run(tree["run_dir"], tmp_path / "hf", dtype="float32")
    prompt = "def1 self2 "
    expected = sample_from_run(tree["run_dir"], prompt, max_new_tokens=100, temperature=0)
    assert len(Tokenizer(tree["data"]["tokenizer"]).encode(expected)) > 50, (
        expected
    )  # past three chunk borders
    command = [sys.executable, "-c", ALONE, str(SCRIPT), str(tmp_path / "hf"), "--prompt", prompt]
    done = subprocess.run(
        [*command, "--temperature", "0", "--max-new-tokens", "100"],
        capture_output=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == prompt + expected + "\n"
