"""A run's folder has one owner at a time, and a dead one does not keep it."""

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_megatron.exit_codes import ExitCode
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.owner import FILE, Owner
from tests.conftest import Started, train_command


def own_and_wait(run_dir: str) -> None:
    Owner(run_dir, beat_seconds=0.05)
    print("owned", flush=True)
    time.sleep(60)


def own_and_fork(run_dir: str) -> None:
    Owner(run_dir, beat_seconds=0.05)
    if child := os.fork():
        print(f"forked {child}", flush=True)
    time.sleep(60)


def own_and_keep_python_from_running(run_dir: str) -> None:
    Owner(run_dir, beat_seconds=0.05)
    library = ctypes.PyDLL(None)  # holds Python's lock, as others do
    print("owned", flush=True)
    library.sleep(60)


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """A process that owns the test's folder."""
    process = Started(tmp_path / "log", own_and_wait, str(tmp_path))
    process.wait_for("owned")
    yield process
    process.kill()


def as_of_another_machine(path: Path) -> dict[str, Any]:
    """Change an owner's file to what a process of another node would have written."""
    facts = {**json.loads(path.read_text()), "machine": "elsewhere", "host": "node7"}
    path.write_text(json.dumps(facts))
    return facts


def test_a_living_owner_is_named_and_a_killed_one_is_followed_at_once(other: Started, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=rf"belongs to process {other.process.pid} on {os.uname().nodename}, .* since 20\d\d-",
    ):
        Owner(tmp_path)
    other.kill()
    begin = time.monotonic()
    owner = Owner(tmp_path)
    assert time.monotonic() - begin < 5
    assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    owner.release()
    assert not (tmp_path / FILE).exists()


def test_a_copy_of_a_folder_in_use_belongs_to_nobody(
    other: Started, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dash_megatron")
    shutil.copytree(tmp_path, tmp_path / "copy")
    (tmp_path / "other_name").symlink_to(tmp_path)
    begin = time.monotonic()
    Owner(tmp_path / "copy").release()
    assert time.monotonic() - begin < 5
    assert f"copy: process {other.process.pid} on {socket.gethostname()} has died, or owns" in caplog.text
    with pytest.raises(ValueError, match=f"belongs to process {other.process.pid} on"):
        Owner(tmp_path / "other_name")


def test_an_owner_on_another_machine_keeps_the_folder_by_its_signs_of_life(tmp_path: Path) -> None:
    owner = Owner(tmp_path, beat_seconds=99)
    facts = as_of_another_machine(tmp_path / FILE)
    living = threading.Event()

    def beat() -> None:
        while not living.wait(0.05):
            os.utime(tmp_path / FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ValueError, match=f"process {facts['process']} on node7"):
        Owner(tmp_path, dead_seconds=20)
    living.set()
    thread.join()
    Owner(tmp_path, dead_seconds=0.3).release()
    owner.release()


def test_an_owner_gives_signs_of_life_while_a_library_keeps_its_threads_from_running(tmp_path: Path) -> None:
    busy = Started(tmp_path / "log", own_and_keep_python_from_running, str(tmp_path))
    try:
        busy.wait_for("owned")
        time.sleep(0.3)  # until it is in the library
        facts = as_of_another_machine(tmp_path / FILE)
        for signals in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # srun sends them to all of a step
            for child in children(facts["process"]):
                os.kill(child, signals)
        with pytest.raises(ValueError, match=f"process {facts['process']} on node7"):
            Owner(tmp_path, dead_seconds=3)
    finally:
        busy.kill()
    Owner(tmp_path, dead_seconds=1).release()


def test_no_sign_of_life_is_given_of_an_owner_that_was_killed_though_what_it_forked_lives(
    tmp_path: Path,
) -> None:
    killed = Started(tmp_path / "log", own_and_fork, str(tmp_path))
    killed.wait_for("forked")
    forked = int((tmp_path / "log").read_text().split("forked ")[1].split()[0])
    try:
        as_of_another_machine(tmp_path / FILE)
        killed.kill()
        Owner(tmp_path, dead_seconds=1).release()
        os.kill(forked, 0)  # lives
    finally:
        os.kill(forked, signal.SIGKILL)


def test_an_owner_that_may_start_no_process_gives_signs_of_life_by_its_own_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    owner = Owner(tmp_path, beat_seconds=0.05)
    assert f"touches {tmp_path / FILE}: Resource temporarily unavailable" in caplog.text
    first = (tmp_path / FILE).stat().st_mtime_ns
    deadline = time.monotonic() + 20
    while (tmp_path / FILE).stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    owner.release()


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for path in found for number in path.read_text().split()]


def test_an_owner_that_was_taken_for_dead_stops_and_one_whose_file_is_lost_goes_on(
    other: Started, tmp_path: Path
) -> None:
    (tmp_path / FILE).unlink()
    deadline = time.monotonic() + 20
    while not (tmp_path / FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    written = (tmp_path / FILE).read_text()
    assert json.loads(written)["process"] == other.process.pid
    (tmp_path / FILE).write_text("")  # damage says nothing of another owner
    time.sleep(0.3)
    (tmp_path / FILE).write_text(written)
    as_of_another_machine(tmp_path / FILE)
    code, output = other.end(20)
    assert code == ExitCode.CONFIG_ERROR
    assert "on node7 has taken over" in output


def test_a_file_that_says_nothing_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("")
    Owner(tmp_path, dead_seconds=0.1).release()


def test_a_folder_of_imported_weights_is_no_run_dir(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").touch()
    with pytest.raises(ValueError, match=r"is a folder of `convert from-hf`, .*; choose another run_dir"):
        Owner(tmp_path)
    assert not (tmp_path / "owner.json").exists()


def test_a_second_start_of_a_run_leaves_the_first_alone(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny_config, "training": {**tiny_config["training"], "steps": 40}}))
    first = Started(tmp_path / "first", train_command, "--config", str(path))
    first.wait_for("step  1/40")
    code, output = Started(tmp_path / "second", train_command, "--config", str(path)).end()
    assert code == ExitCode.CONFIG_ERROR
    assert f"belongs to process {first.process.pid} on" in output
    assert "Traceback" not in output
    assert first.end()[0] == ExitCode.DONE
    run = Path(tiny_config["run_dir"])
    assert read_metrics(run)[-1]["step"] == 40
    assert not (run / FILE).exists()
