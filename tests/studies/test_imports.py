"""What a machine that only submits has to import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CODE = """
import subprocess, sys
from unittest import mock
from dash_megatron.__main__ import main
done = mock.Mock(returncode=0, stdout="job 7: somewhere\\n")
with mock.patch.object(subprocess, "run", return_value=done) as run:
    code = main(["study", "submit", STUDY, "--slurm", "--nodes 1 --gpus-per-node 8 --time 1:00:00"])
assert run.call_args.args[0][1].endswith("slurm/submit.py")
# the study has looked at the inputs of all runs
assert "--inputs-later" in run.call_args.args[0]
print(code, "torch" in sys.modules)
"""


def test_submitting_to_slurm_looks_at_data_and_needs_no_torch(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    study = tmp_path / "study.yaml"
    tree = yaml.safe_load((ROOT / "studies" / "quality_16k.yaml").read_text())
    assert "evaluate" in tree
    tiny = tiny_config["data"]
    # of which the validation is too short for rows of 16K
    data = {"data.tokenizer": tiny["tokenizer"], "data.train": tiny["train"], "data.valid": tiny["train"]}
    tree["output"] = str(tmp_path / "output")
    tree["overrides"] = {**tree.get("overrides", {}), **data}
    study.write_text(yaml.safe_dump(tree))
    code = CODE.replace("STUDY", repr(str(study)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout
    assert list((tmp_path / "output" / "configs").iterdir())
