"""What a machine that only submits has to import."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import subprocess, sys
from unittest import mock
from dash_megatron.__main__ import main
done = mock.Mock(returncode=0, stdout="job 7: somewhere\\n")
with mock.patch.object(subprocess, "run", return_value=done) as run:
    code = main(["study", "submit", STUDY, "--slurm", "--nodes 1 --gpus-per-node 8 --time 1:00:00 --inputs-later"])
assert run.call_args.args[0][1].endswith("slurm/submit.py")
print(code, "torch" in sys.modules)
"""


def test_submitting_to_slurm_needs_no_torch(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    text = (ROOT / "studies" / "quality_16k.yaml").read_text()
    assert "evaluate:" in text
    study.write_text(text.replace("output: runs/studies/quality_16k", f"output: {tmp_path / 'output'}"))
    code = CODE.replace("STUDY", repr(str(study)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout
    assert list((tmp_path / "output" / "configs").iterdir())
