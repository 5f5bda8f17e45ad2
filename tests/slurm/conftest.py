"""A real SLURM for the tests of a worker, and runs on it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import FRAIL, Cluster, missing_programs, wait_until

ROOT = Path(__file__).parents[2]
# its files are commands, which import each other as such
sys.path.insert(0, str(ROOT / "slurm"))
# of a loaded machine: a start takes 10 seconds on two idle cores
SECONDS = 600.0
# the time limits of tests are of first starts
MORE_TIME = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || scontrol update "JobId=$SLURM_JOB_ID" TimeLimit=60'
FREE_PORT = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1])"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Nodes that end with the session."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install Debian's packages slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets have names of 107 letters
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Study:
    """Runs of one folder on a cluster."""

    cluster: Cluster
    folder: Path
    tree: dict[str, Any]
    """Config of the runs, but for `run_dir`."""

    def write_config(self, name: str, **sections: dict[str, Any]) -> Path:
        """Config of a run, with keys of sections changed."""
        tree = {**self.tree, "run_dir": str(self.folder / "runs" / name)}
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        path = self.folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    def write_site(self, name: str, step_seconds: Sequence[float] = (), **keys: Any) -> Path:
        """Site file of this cluster; steps of a job's first starts last so many seconds longer than they need to."""
        seconds = " ".join(map(str, step_seconds))
        slowly = ["env", f"STEP_SECONDS={seconds}", sys.executable, str(ROOT / "tests/slurm/slowly.py")]
        site = {
            "cpus_per_process": 1,
            "warning_seconds": 60,
            "scratch": str(self.folder / "scratch"),
            # all nodes are this machine, and no name server knows their names
            "environment": {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1},
            "setup": f"export MASTER_PORT=$({shlex.quote(sys.executable)} -c {shlex.quote(FREE_PORT)})\n{MORE_TIME}",
            "container": slowly if seconds else [],
            "sbatch": [f"--exclude={FRAIL}"],
        }
        path = self.folder / f"site_{name}.yaml"
        path.write_text(yaml.safe_dump({**site, **keys}))
        return path

    def submit(self, site: Path, *arguments: str | Path, time: str = "60", nodes: int = 2) -> str:
        """Call submit.py, without GPUs; the job's id."""
        machines = ["--site", site, "--nodes", nodes, "--gpus-per-node", 0, "--time", time]
        done = self.call("submit.py", *arguments, *machines)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(":")[0].removeprefix("job ")

    def log(self, name: str, pattern: str) -> str:
        """The text of a run's log files of a pattern."""
        return "".join(
            path.read_text() for path in sorted((self.folder / "runs" / name / "logs").glob(pattern))
        )

    def call(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a script of slurm/ as a user would."""
        return subprocess.run(
            [sys.executable, str(ROOT / "slurm" / script), *map(str, arguments)],
            env=self.cluster.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def events(self, name: str) -> list[tuple[str, str]]:
        """Names and details of a run's history."""
        path = self.folder / "runs" / name / "slurm" / "events.tsv"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line.split("\t")[3], line.split("\t")[4]) for line in lines]

    def names(self, name: str) -> list[str]:
        """What happened to a run, in order."""
        return [event for event, _ in self.events(name)]

    def newest_checkpoint(self, name: str) -> int:
        """Step of the newest published checkpoint of a run; fails where there is none."""
        folders = (self.folder / "runs" / name / "checkpoints").glob("step_" + "[0-9]" * 8)
        return max(int(folder.name.removeprefix("step_")) for folder in folders)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of a run's metrics.jsonl."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until a run has logged a step."""
        self._wait(
            name, lambda: any(line["step"] >= step for line in self.metrics(name)), f"reach step {step}"
        )

    def wait_for_end(self, name: str) -> None:
        """Wait until a run is done, or stopped for good."""
        self._wait(name, lambda: self.names(name)[-1:] in (["done"], ["stopped"]), "end")

    def _wait(self, name: str, condition: Any, what: str) -> None:
        if wait_until(condition, SECONDS):
            return
        logs = sorted((self.folder / "runs" / name / "logs").rglob("*.log"))
        texts = [f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
        queue = self.cluster.run("squeue", check=False)
        pytest.fail(
            f"{name} did not {what} in {SECONDS:.0f} s: {self.events(name)}\n{queue}\n"
            + "\n".join(texts)
            + self.cluster.logs()
        )


@pytest.fixture(scope="session")
def study(cluster: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Runs of 40 steps of a 2-layer model, with a checkpoint every 5."""
    tree = {
        "model": {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96},
        "attention": {"chunk_size": 16},
        "data": {
            "tokenizer": str(tiny_data / "tokenizer.model"),
            "train": [str(tiny_data / "train")],
            "seq_length": 64,
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 40, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        "checkpoint": {"every": 5},
        "logging": {"every": 1, "tensorboard": False},
    }
    return Study(cluster, tmp_path_factory.mktemp("study"), tree)
