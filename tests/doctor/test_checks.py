"""Every check that needs one process: it succeeds on what is sound, and fails where one thing is broken."""

import collections
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dash_megatron.__main__ import main
from dash_megatron.config import Config, config_from_dict
from dash_megatron.doctor import disk, examine, kernels
from dash_megatron.doctor.examine import choose_checks
from dash_megatron.doctor.inputs import check_data_files
from dash_megatron.doctor.leak import check_leak
from dash_megatron.doctor.parity import check_parity
from dash_megatron.doctor.resume import check_resume, compare_starts, small_run
from dash_megatron.doctor.runner import Check, Finding, merge_largest, run_checks
from dash_megatron.doctor.session import Session
from dash_megatron.doctor.small import tiny_config
from dash_megatron.layers import DashCoreAttention, FullCoreAttention
from dash_megatron.parallel import destroy_process_groups
from tests.ops.quick_interpreter import quicken

QUICK = ("versions", "data", "disk", "kernels", "leak", "bandwidth", "parity")


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    tree = config.model_dump(mode="json")
    return config_from_dict({**tree, **{name: {**tree[name], **part} for name, part in sections.items()}})


def test_one_process_examines_a_sound_run_and_leaves_nothing(
    tiny_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_dir = tmp_path / "runs" / "new"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--only", ",".join(QUICK), f"run_dir={run_dir}"]
    assert main(["doctor", *arguments]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"{run_dir}: 1 process(es) on cpu, 1 data x 1 context x 1 tensor parallel; rank 0 on "
    )
    alone = {"kernels": "skipped", "bandwidth": "skipped", "parity": "skipped"}
    assert [line.split()[:2] for line in lines] == [[alone.get(name, "ok"), name] for name in QUICK]
    assert "no GPU; TRITON_INTERPRET=1" in lines[3]
    assert last == "nothing failed"
    assert not run_dir.parent.exists()


def test_a_failed_check_is_exit_code_1_and_told_with_its_remedy(
    tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    assert (
        main(["doctor", "--config", str(tmp_path / "config.yaml"), "--only", "data", "data.train=[/no]"]) == 1
    )
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("failed   data")
    assert "/no.idx does not exist" in line
    assert last == "failed: data"


def test_a_doctor_that_is_told_to_end_cleans_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_ended(session: Session) -> Finding:
        Path(session.config.run_dir).mkdir()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return Finding()

    monkeypatch.setattr(examine, "CHECKS", (Check("end", 60, be_ended, merge_largest),))
    try:
        with pytest.raises(SystemExit) as ended:
            examine.examine(config, environment={})
    finally:
        destroy_process_groups()
    assert ended.value.code == 143
    assert not Path(config.run_dir).exists()


def test_an_unknown_check_or_a_wrong_config_is_exit_code_2(
    tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    for arguments, message in (
        (["--only", "disk,dsik"], "'dsik', which is no check"),
        (["parallel.tensor=2"], "parallel.tensor=2 x parallel.context=1 = 2 must divide the 1 processes"),
    ):
        assert main(["doctor", "--config", str(path), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_checks_keep_their_order_and_versions_come_always() -> None:
    assert [check.name for check in choose_checks("resume,disk")] == ["versions", "disk", "resume"]


def test_missing_or_cut_data_fails_and_every_fault_is_named(
    session: Session, tiny_data: Path, tmp_path: Path
) -> None:
    assert check_data_files(session).status == "ok"
    for suffix in (".bin", ".idx", ".idx.json"):
        shutil.copy(tiny_data / f"train{suffix}", tmp_path / f"cut{suffix}")
    os.truncate(tmp_path / "cut.bin", 1000)
    session.config = changed(session.config, data={"train": [str(tmp_path / "cut"), "/nowhere/train"]})
    finding = check_data_files(session)
    assert finding.status == "failed"
    assert "cut.bin has 1000 bytes" in finding.message
    assert "/nowhere/train.idx does not exist" in finding.message
    assert int(finding.figures["valid tokens"]) > 0


def test_a_disk_without_room_for_the_checkpoints_fails_with_figures(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.config = changed(session.config, checkpoint={"every": 10, "keep": 2}, training={"steps": 1000})
    size = disk.check_disk(session).figures["checkpoint GiB"]
    usage = collections.namedtuple("usage", "free")
    for room, status in ((3.1, "ok"), (2.9, "failed")):
        free = int(room * float(size) * 2**30)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free))
        finding = disk.check_disk(session)
        assert finding.status == status
        assert finding.figures["checkpoints"] == 3
    assert "must hold" in finding.message
    assert list(Path(session.config.run_dir).iterdir()) == []
    # those of an earlier start will be replaced
    folder = Path(session.config.run_dir) / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(int(float(size) * 2**30)))
    assert disk.check_disk(session).status == "ok"


def test_rank_0_alone_looks_through_all_checkpoints(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(session.config.run_dir) / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    (folder / "weights").touch()
    looked: list[Path] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: bool(looked.append(path)) or is_file(path))
    for rank in (0, 1):
        looked.clear()
        monkeypatch.setattr(session, "rank", rank)
        assert disk.check_disk(session).status == "ok"
        assert (folder / "weights" in looked) == (rank == 0)


@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "count"),
    [
        (0, 0, 0, 1),
        (0, 3, 0, 1),
        (10, 0, 0, 10),
        (10, 3, 0, 4),
        (60, 3, 0, 2),
        (10, 2, 25, 5),
        (10, 3, 10, 10),
    ],
)
def test_checkpoints_on_disk_at_once_are_counted(
    every: int, keep: int, keep_every: int, count: int, config: Config
) -> None:
    kept = {"every": every, "keep": keep, "keep_every": keep_every}
    assert disk.checkpoints_kept(changed(config, training={"steps": 100}, checkpoint=kept)) == count


def test_a_run_folder_that_cannot_be_written_fails(session: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    session.config = session.config.model_copy(update={"run_dir": str(tmp_path / "file" / "run")})
    result = run_checks(session, [Check("disk", 60, disk.check_disk, merge_largest)]).results[0]
    assert result.status == "failed"
    assert "NotADirectoryError" in result.message


@pytest.mark.parametrize("kind", ["dash", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_across_documents_is_a_leak(
    kind: str, precision: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.config = changed(session.config, attention={"kind": kind}, training={"precision": precision})
    finding = check_leak(session)
    assert finding.status == "ok", finding.message
    module = DashCoreAttention if kind == "dash" else FullCoreAttention
    attend = module._attend_here

    def leaky(self: Any, q: Any, k: Any, v: Any, packed: Any) -> Any:
        return attend(self, q, k, v, None)

    monkeypatch.setattr(module, "_attend_here", leaky)
    finding = check_leak(session)
    assert finding.status == "failed"
    # forward into later documents, backward into earlier ones
    assert "the loss of document 3 changed" in finding.message
    assert "the gradient of document 0 changed" in finding.message


def test_kernels_that_run_nowhere_are_skipped_with_the_reason(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    session.device = torch.device("cpu")
    assert "no GPU" in kernels.check_kernels(session).message
    for section in ({"kind": "full"}, {"backend": "reference"}):
        session.config = changed(session.config, attention=section)
        assert kernels.check_kernels(session).status == "skipped"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, ""),
        ("out", "bfloat16 out differs from the reference by"),
        ("dk", "float32 dk differs from the reference by"),
        ("chunks", "select another number of chunks"),
    ],
)
def test_kernels_that_err_in_an_output_a_gradient_or_a_choice_fail(
    broken: str | None, message: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quicken(monkeypatch)
    attention = {"scaling_factor": [0.5, 1.0]}
    session.config = changed(session.config, training={"precision": "bf16"}, attention=attention)
    run = kernels._run

    def breaking_run(config: Config, inputs: kernels.Inputs, backend: str) -> Any:
        out, gradients, selected = run(config, inputs, backend)
        if backend == "triton" and broken == "out":
            out = out * 1.05
        if backend == "triton" and broken == "dk":
            gradients = gradients[0], gradients[1] * 1.05, *gradients[2:]
        if backend == "triton" and broken == "chunks":
            selected = selected + (torch.arange(len(selected[0]), device=out.device) < 5)[:, None]
        return out, gradients, selected

    monkeypatch.setattr(kernels, "_run", breaking_run)
    finding = kernels.check_kernels(session)
    assert finding.status == ("failed" if broken else "ok"), finding
    assert message in finding.message


def test_one_process_has_no_parity_to_check(session: Session) -> None:
    assert check_parity(session).status == "skipped"


def test_the_small_run_of_a_large_config_keeps_layout_and_heads(config: Config) -> None:
    large = changed(
        config,
        model={"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "hidden_size": 4096},
        parallel={"tensor": 4, "context": 2, "context_comm": "a2a", "sequence": True},
        schedule={"kind": "wsd", "warmup_steps": 500, "decay_steps": 500},
        training={"steps": 5000, "global_batch": 512, "micro_batch": 2, "precision": "bf16"},
        attention={"full_layers": [0, 8], "scaling_factor": [2.0, 4.0, 3.0, 1.0] * 8},
        zero={"stage": 2},
        data={"valid": ["/valid"], "seq_length_curriculum": {0: 64, 4000: config.data.seq_length}},
        evaluation={"every": 100, "tasks": ["copy"], "tasks_every": 100, "task_lengths": [100]},
    )
    small = small_run(large, 16, Path("/x"))
    assert (small.evaluation.every, small.evaluation.tasks_every) == (0, 0)
    assert tiny_config(large).data.seq_length_curriculum is None
    for name in ("parallel", "zero", "optimizer"):
        assert getattr(small, name) == getattr(large, name)
    assert (small.model.heads, small.model.kv_heads, small.model.channels_per_head) == (32, 8, 128)
    assert (small.model.layers, small.attention.full_layers) == (2, (0,))
    assert small.attention.scaling_factor == (1.0, 4.0)
    assert (small.data.seq_length, small.training.precision) == (large.data.seq_length, "bf16")
    assert small.accumulation_steps(16) == 1
    assert small.run_dir == "/x/run"
    assert small.data.cache_dir == "/x/index_cache"
    index = Path(large.run_dir) / "index_cache"
    index.mkdir(parents=True)
    assert small_run(large, 16, Path("/x")).data.cache_dir == str(index)


def test_a_small_run_that_fails_shows_its_last_output_and_is_removed(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of memory\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    result = run_checks(session, [Check("resume", 60, check_resume, merge_largest)]).results[0]
    assert result.status == "failed"
    assert "start 1 of the small run failed: out of memory" in result.message
    assert list(Path(session.config.run_dir).iterdir()) == []


LOSSES = {1: 5.0, 2: 4.5, 3: 4.25, 4: 4.125}


@pytest.mark.parametrize(
    ("began", "again", "message"),
    [
        ((0, 2), LOSSES, ""),
        ((0, 0), LOSSES, "began after steps [0, 0]"),
        ((0, 2), {**LOSSES, 4: 4.1250000001}, "the loss of step 4 is 4.1250000001 after resuming"),
        ((0, 2), {1: 5.0, 2: 4.5, 3: 4.25}, "the loss of step 4 is None"),
        ((0, 2), {**LOSSES, 3: float("nan")}, "the loss of step 3 is nan"),
    ],
)
def test_a_resumed_run_must_have_the_same_losses_after_the_save(
    began: tuple[int, int], again: dict[int, float], message: str
) -> None:
    finding = compare_starts(began, [LOSSES, again])
    assert finding.status == ("failed" if message else "ok")
    assert message in finding.message
