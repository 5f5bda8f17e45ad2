"""Checkpoints are published whole or not at all, checked before they are read, and damaged ones are kept aside."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from sentencepiece import sentencepiece_model_pb2

from dash_megatron.__main__ import main
from dash_megatron.checkpoint import files, folder
from dash_megatron.checkpoint.folder import (
    DESCRIPTION,
    agreed_steps,
    checkpoint_folder,
    finished_steps,
    tag_of,
)
from dash_megatron.checkpoint.stored import StoredState
from dash_megatron.checkpoint.weights import open_weights, stored_config
from dash_megatron.config import config_from_dict
from dash_megatron.parallel import destroy_process_groups
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.sample import sample_from_run
from dash_megatron.training.trainer import Trainer
from data_tools.write_sidecar import main as write_sidecar
from tests.tiny import tiny_tree


@pytest.fixture(autouse=True)
def _leave_groups() -> Iterator[None]:
    yield
    leave_groups()


def leave_groups() -> None:
    """As if the process had ended: DeepSpeed remembers groups that torch alone destroyed."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    destroy_process_groups()


def train(tree: dict[str, Any], **sections: dict[str, Any]) -> Trainer:
    """Run alone, in this process, to the end."""
    leave_groups()
    changed = {name: {**tree.get(name, {}), **values} for name, values in sections.items()}
    try:
        trainer = Trainer(config_from_dict({**tree, **changed}), {})
        trainer.run()
    finally:
        leave_groups()
    return trainer


@pytest.fixture
def run(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """A finished run of 4 steps that saved after each."""
    tree = {**tiny_config, "checkpoint": {"every": 1, "retry_seconds": 0}}
    train(tree)
    return tree


def folder_of(tree: dict[str, Any]) -> Path:
    return checkpoint_folder(tree["run_dir"])


def test_a_checkpoint_holds_what_its_manifest_says_and_no_pickles(run: dict[str, Any]) -> None:
    folder = folder_of(run) / "step_00000004"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert facts["step"] == facts["adam_steps"] == 4
    assert facts["trainer"]["data"] == {"consumed_samples": 16, "steps": 4}
    assert facts["about"].keys() == {"commit", "implementation", "device", "tokenizer", "data"}
    assert config_from_dict(facts["config"]) == config_from_dict(run)
    assert (folder_of(run) / "latest").read_text() == "step_00000004\n"


def test_weights_are_not_used_with_another_tokenizer_than_they_learnt(
    tiny_config: dict[str, Any], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    tree = {**tiny_tree(data, tmp_path / "run"), "training": {**tiny_config["training"], "steps": 1}}
    train(tree)
    path = data / "tokenizer.model"
    before = path.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(before)
    proto.trainer_spec.model_prefix = "made again"
    path.write_bytes(proto.SerializeToString())
    for name in ("train", "valid"):
        assert write_sidecar(["--prefix", str(data / name), "--tokenizer", str(path)]) == 0
    message = "whose tokens its weights know; put that one back"
    with pytest.raises(ValueError, match=message):
        train(tree, training={"steps": 2})
    capsys.readouterr()
    # a new run may mean the same by its token ids
    train({**tree, "run_dir": str(tmp_path / "next")}, training={"steps": 1, "init_from": tree["run_dir"]})
    assert f"training.init_from: data.tokenizer={path} has fingerprint" in capsys.readouterr().err
    for arguments in (
        ["sample", tree["run_dir"]],
        ["convert", "to-hf", tree["run_dir"], str(tmp_path / "exported")],
        ["evaluate", tree["run_dir"]],
        ["study", "routing", tree["run_dir"]],
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    path.write_bytes(before)
    assert main(["sample", tree["run_dir"], "--max-new-tokens", "1"]) == 0


def test_all_files_of_a_run_have_the_mode_that_the_umask_gives(tiny_config: dict[str, Any]) -> None:
    before = os.umask(0o027)
    try:
        train(tiny_config)
    finally:
        os.umask(before)
    run = Path(tiny_config["run_dir"])
    modes = {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_dir()}
    assert (modes, folders) == ({0o640}, {0o750})


def truncate(folder: Path) -> None:
    path = folder / "state_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "state_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_file(folder: Path) -> None:
    (folder / "probe.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {"check')


def change_description(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, r"state_00000.safetensors has \d+ bytes, but \d+ were written"),
        (flip, "checksum of state_00000.safetensors"),
        (remove_file, "probe.safetensors is missing"),
        (remove_manifest, "manifest.json is missing"),
        (cut_manifest, "manifest.json is damaged"),
        (change_description, "checksum of checkpoint.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_checkpoint_is_named_kept_aside_and_skipped(
    harm: Any, message: str, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read_metrics(run["run_dir"])
    harm(folder_of(run) / "step_00000004")
    with pytest.raises(ValueError, match=message):
        open_weights(run["run_dir"])
    capsys.readouterr()
    train(run)
    assert "resuming after step 3" in (output := capsys.readouterr()).out
    assert "step_00000004 is damaged" in output.err
    assert (folder_of(run) / "step_00000004.damaged").is_dir()
    assert finished_steps(run["run_dir"]) == [1, 2, 3, 4]
    assert [line["loss"] for line in read_metrics(run["run_dir"])] == [line["loss"] for line in expected]


def test_a_description_that_lacks_something_is_named(run: dict[str, Any]) -> None:
    path = folder_of(run) / "step_00000004" / "checkpoint.json"
    facts = json.loads(path.read_text())
    for key in ("config", "shapes"):
        path.write_text(json.dumps({name: fact for name, fact in facts.items() if name != key}))
        with pytest.raises(ValueError, match=rf"checkpoint.json is damaged: it has no {key}"):
            stored_config(run["run_dir"])


def test_with_damaged_checkpoints_alone_a_run_does_not_begin_anew(run: dict[str, Any]) -> None:
    for step in finished_steps(run["run_dir"]):
        flip(folder_of(run) / tag_of(step))
    written = (Path(run["run_dir"]) / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"has no undamaged checkpoint.* step_00000001.damaged, .*begin from"
        ):
            train(run)
    assert len(list(folder_of(run).glob("*.damaged"))) == 4
    assert (Path(run["run_dir"]) / "metrics.jsonl").read_bytes() == written
    for path in folder_of(run).glob("*.damaged"):
        shutil.rmtree(path)
    train(run)


def test_checkpoints_on_a_disk_that_is_away_do_not_let_a_run_begin_anew(tiny_config: dict[str, Any]) -> None:
    folder_of(tiny_config).parent.mkdir()
    folder_of(tiny_config).symlink_to("unmounted")
    with pytest.raises(
        FileNotFoundError, match=r"checkpoints is a link to unmounted, which does not exist; mount"
    ):
        train(tiny_config)
    folder_of(tiny_config).unlink()
    folder_of(tiny_config).touch()
    with pytest.raises(FileNotFoundError, match="checkpoints is a file"):
        train(tiny_config)


def test_other_ranks_take_what_rank_0_finds_in_the_folder_and_its_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").symlink_to("unmounted")
    sent: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", sent.extend)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(FileNotFoundError, match="is a link to unmounted"):
        agreed_steps(tmp_path)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda found: found.__setitem__(0, sent[0]))
    with pytest.raises(FileNotFoundError, match="is a link to unmounted"):
        agreed_steps(tmp_path)
    sent = [[3, 4]]
    assert agreed_steps(tmp_path) == [3, 4]


def test_data_that_was_replaced_since_the_checkpoint_is_told(
    tiny_data: Path, tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for steps, split in ((1, "train"), (2, "train"), (3, "valid")):
        for suffix in ("bin", "idx", "idx.json"):
            shutil.copy(tiny_data / f"{split}.{suffix}", tmp_path / f"mine.{suffix}")
        tree = {**tiny_config, "data": {**tiny_config["data"], "train": [str(tmp_path / "mine")]}}
        train(tree, training={"steps": steps})
        told.append("mine'] holds other data than when step_00000002 was saved" in capsys.readouterr().err)
    assert told == [False, False, True]


def test_old_checkpoints_go_but_for_the_newest_and_milestones_at_the_latest_after_the_next_save(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = [tag_of(2), tag_of(5)]
    rename = os.rename

    def refuse_once(old: Path, new: Path) -> None:
        if new.suffix == ".removed" and old.name in refused:
            refused.remove(old.name)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse_once)
    settings = {"every": 1, "keep": 2, "keep_every": 3}
    train(tiny_config, training={"steps": 8}, checkpoint=settings)
    assert refused == []
    assert finished_steps(tiny_config["run_dir"]) == [3, 6, 7, 8]
    told = capsys.readouterr().err
    assert "cannot remove step_00000002: Input/output error" in told


def test_a_process_opens_only_the_files_of_a_checkpoint_that_hold_what_it_reads(tmp_path: Path) -> None:
    starts = {f"state_{rank:05d}.safetensors": 4 * rank for rank in (2, 0, 1, 3)}
    facts = {
        "format": files.FORMAT,
        "shapes": {"w": [16]},
        "splits": {},
        "layout": {"tensor": 1},
        "config": {},
        "fragments": {name: {"tensor_rank": 0, "starts": {"w": start}} for name, start in starts.items()},
    }
    written = {DESCRIPTION: files.write_json(tmp_path / DESCRIPTION, facts)}
    for name, start in starts.items():
        part = torch.arange(start, start + 4, dtype=torch.float32)
        written[name] = files.write_tensors(tmp_path / name, {"weight/w": part})
    files.write_json(tmp_path / files.MANIFEST, {"files": written})
    for rank in (0, 3):
        (tmp_path / files.state_file(rank)).unlink()
    stored = StoredState(tmp_path)
    for start, numel in ((4, 4), (4, 8), (6, 4), (8, 1)):
        assert stored.read("weight", "w", 0, start, numel).tolist() == list(range(start, start + numel))
    # nor does it look at other files than its share of all
    found = [files.damage(tmp_path, share, 5) for share in range(5)]
    assert found == [
        None,
        None,
        "state_00000.safetensors is missing",
        None,
        "state_00003.safetensors is missing",
    ]


def test_a_run_killed_while_it_saves_goes_on_from_the_one_before(run: dict[str, Any]) -> None:
    folder = folder_of(run)
    (folder / "step_00000004").rename(folder / "step_00000004.partial")
    (folder / "step_00000004.partial" / "manifest.json").unlink()
    expected = read_metrics(run["run_dir"])
    train(run)
    assert [line["loss"] for line in read_metrics(run["run_dir"])] == [line["loss"] for line in expected]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        f"step_{step:08d}" for step in (1, 2, 3, 4)
    ]


def test_training_goes_on_while_a_checkpoint_is_written(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits for a step that comes after the save; a save that stopped training would wait for ever."""
    stepped, write = threading.Event(), files.write_tensors
    steps_at_publishing: dict[str, int] = {}

    def slow(path: Path, tensors: Any) -> Any:
        if path.name.startswith("state") and "step_00000002" in str(path):
            assert stepped.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(files, "write_tensors", slow)
    changed = {**tiny_config, "checkpoint": {"every": 2}}
    trainer = Trainer(config_from_dict(changed), {})
    step, publish = trainer.train_step, trainer.checkpointer._publish_files

    def watched_step() -> Any:
        result = step()
        if trainer.step == 3:
            stepped.set()
        return result

    def watched_publish(saved: int, results: Any) -> None:
        steps_at_publishing[str(saved)] = trainer.step
        publish(saved, results)

    monkeypatch.setattr(trainer, "train_step", watched_step)
    monkeypatch.setattr(trainer.checkpointer, "_publish_files", watched_publish)
    trainer.run()
    assert steps_at_publishing["2"] >= 3
    assert steps_at_publishing["4"] == 4
    assert finished_steps(tiny_config["run_dir"]) == [2, 4]


def test_what_is_saved_is_what_was_there_at_the_step(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The thread writes a copy, not weights that training has changed since."""
    released, write = threading.Event(), files.write_tensors

    def late(path: Path, tensors: Any) -> Any:
        assert released.wait(60)
        return write(path, tensors)

    tiny_config["schedule"] = {"kind": "constant"}
    train(tiny_config, training={"steps": 2})
    expected = dict(open_weights(tiny_config["run_dir"])[2])
    monkeypatch.setattr(files, "write_tensors", late)
    tree = {**tiny_config, "run_dir": str(tmp_path / "late"), "checkpoint": {"every": 2}}
    trainer = Trainer(config_from_dict(tree), {})
    step = trainer.train_step

    def watched() -> Any:
        result = step()
        if trainer.step == 4:
            released.set()
        return result

    monkeypatch.setattr(trainer, "train_step", watched)
    trainer.run()
    found = dict(open_weights(tmp_path / "late", 2)[2])
    assert all(bool((found[name] == weight).all()) for name, weight in expected.items())


def test_a_disk_that_stays_full_ends_the_run_and_harms_nothing(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(OSError, match=r"step 5 could not be written: process 0: .*disk full"):
        train(run, training={"steps": 8})
    assert finished_steps(run["run_dir"]) == [1, 2, 3, 4]
    monkeypatch.undo()
    train(run, training={"steps": 6})
    assert finished_steps(run["run_dir"]) == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_for_a_moment_does_not_end_the_run(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, write = iter([True, True]), files.write_tensors

    def sometimes(path: Path, tensors: Any) -> Any:
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, tensors)

    monkeypatch.setattr(files, "write_tensors", sometimes)
    train(tiny_config, checkpoint={"every": 2})
    assert finished_steps(tiny_config["run_dir"]) == [2, 4]


def test_loaded_weights_must_give_the_loss_of_the_stored_tokens(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"attention": {**run["attention"], "scaling_factor": 500.0}}
    with pytest.raises(ValueError, match=r"was saved with loss .* but gives .*check_loss=false"):
        train({**run, **other}, training={"steps": 5})
    train({**run, **other}, training={"steps": 5}, checkpoint={"check_loss": False})
    assert finished_steps(run["run_dir"])[-1] == 5


def test_readers_of_weights_refuse_a_damaged_checkpoint(run: dict[str, Any]) -> None:
    flip(folder_of(run) / "step_00000004")
    with pytest.raises(ValueError, match="name an earlier step"):
        sample_from_run(run["run_dir"], "def")
    assert isinstance(sample_from_run(run["run_dir"], "def", step=3, max_new_tokens=2), str)


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_one_line(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    flip(folder_of(run) / "step_00000004")
    monkeypatch.setattr(folder.os, "rename", refuse)
    with pytest.raises(
        PermissionError, match=r"cannot set step_00000004 aside.*Permission denied \(.*step_00000004\)"
    ):
        train(run)


def test_a_second_damaged_checkpoint_does_not_displace_the_first(run: dict[str, Any]) -> None:
    shutil.copytree(folder_of(run) / "step_00000004", folder_of(run) / "step_00000004.damaged")
    flip(folder_of(run) / "step_00000004")
    train(run)
    assert {path.name for path in folder_of(run).glob("*.damaged*")} == {
        "step_00000004.damaged",
        "step_00000004.damaged2",
    }


def test_a_checkpoint_of_a_layout_refused_today_opens_and_goes_on(
    tiny_config: dict[str, Any],
) -> None:
    tree = {**tiny_config, "checkpoint": {"every": 1}, "attention": {"kind": "full"}}
    train(tree, training={**tree["training"], "steps": 1})
    folder = folder_of(tree) / "step_00000001"
    description, manifest = folder / "checkpoint.json", folder / "manifest.json"
    facts = json.loads(description.read_text())
    facts["config"]["parallel"] |= {"context": 2, "context_comm": "all_gather"}
    written = json.loads(manifest.read_text())
    written["files"]["checkpoint.json"] = files.write_json(description, facts)
    manifest.write_text(json.dumps(written))
    config, step, weights = open_weights(tree["run_dir"])
    assert (config.attention.kind, step, config.parallel.context) == ("full", 1, 1)
    assert "embedding.word_embeddings.weight" in weights
    assert train(tree, training={**tree["training"], "steps": 2}).step == 2
