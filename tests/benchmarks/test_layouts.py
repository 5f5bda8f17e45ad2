"""Whole steps of layouts are timed in two processes, beside what the planner says of them, and one that fails is a row."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import class_of, shares_of_step
from benchmarks.layouts import as_overrides, first_error, in_words
from benchmarks.persistence import make_selected
from dash_megatron.config import load_config
from dash_megatron.planning.layout import Layout
from dash_megatron.planning.search import configured_layout
from tests.conftest import NO_GPU, run_python

ROOT = Path(__file__).parents[2]
SHAPE = ["model.layers=1", "model.heads=4", "model.head_dim=16", "attention.backend=triton"]
SHAPE += [
    "data.seq_length=128",
    "attention.query_pool=2",
    "attention.pool_heads=true",
]


COMMAND = [sys.executable, "benchmarks/layouts.py", "--config", "configs/8b_64k.yaml", "--tiny"]


def _run(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    command = [*COMMAND, "--gpus", "2", "--steps", "1", "--output", str(folder), *arguments]
    done = run_python(*command[1:], cwd=ROOT, TRITON_INTERPRET="1")
    assert not done.returncode, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return rows, (folder / "table.txt").read_text()


def test_a_step_of_two_processes_is_timed_with_choices_of_trained_routers(tmp_path: Path) -> None:
    layout = "parallel.context=2 parallel.context_comm=all_gather"
    wrong = "parallel.context=3"
    rows, table = _run(tmp_path, "--kind", "dash", "--layout", layout, "--layout", wrong, *SHAPE)
    row, failed = rows
    assert "error" not in row, row["error"]
    assert row["layout_words"] == "data 1 context 2 all_gather ZeRO 3 none"
    # each head's choices, and the own chunks, of the 1 to 4 that tokens see
    made = [make_selected("d11_c32", 2, 1, 128, 32, "cpu", seed=2 * 2 + head) for head in range(2)]
    selected = torch.cat(made).sum(-1).double().mean() + 1
    assert row["density"] == pytest.approx(selected.item() / 2.5, abs=1e-5)
    assert row["loss"] == pytest.approx(torch.tensor(320.0).log().item(), abs=0.2)
    assert len(row["all_seconds"]) == 3
    assert row["tokens_per_second_per_gpu"] == pytest.approx(128 / row["seconds"] / 2)
    assert row["seconds_ratio"] == pytest.approx(row["seconds"] / row["planned_seconds"])
    assert 0 < row["waited_for"] <= row["communication"] < 1
    assert row["milliseconds"]["communication"] > 0
    # a CPU has no kernels
    assert row["idle"] is None
    assert row["context_bytes_per_layer_and_step"][0] > 0
    assert "parallel.context=3" in failed["error"]
    assert table.count("8b_64k") == 2


def test_a_case_that_takes_too_long_is_killed_and_a_later_one_left_out(tmp_path: Path) -> None:
    layout = ["--kind", "full", "--layout", "parallel.context=2"]
    rows, _ = _run(tmp_path, *layout, *layout[2:], "--limit", "2", "--seconds", "3")
    assert "killed after 2 s" in rows[0]["error"]
    assert rows[1]["error"].startswith("no time left")


def test_an_order_to_stop_ends_the_processes_of_the_case(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    launcher = ["--launcher", f"sh -c 'echo > {tmp_path}/begun; exec sleep 600'"]
    command = [*COMMAND, "--output", str(tmp_path), "--layout", "parallel.context=1", *launcher]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | NO_GPU, pass_fds=[writer], stdout=subprocess.DEVNULL
    )
    os.close(writer)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    # the case's processes have inherited the other end
    assert select.select([reader], [], [], 10)[0]
    os.close(reader)


@pytest.mark.parametrize("launcher", ["no-such-launcher -n {gpus}", "", "srun 'quoted"])
def test_a_launcher_that_cannot_be_started_is_refused_before_any_case(launcher: str, tmp_path: Path) -> None:
    command = [*COMMAND, "--output", str(tmp_path / "layouts"), "--launcher", launcher]
    done = run_python(*command[1:], cwd=ROOT)
    assert done.returncode == 2
    assert "--launcher" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "layouts").exists()


def test_the_first_error_of_any_rank_is_told() -> None:
    log = "a note on an Error\n[rank1]:   raise it\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\nValueError: later\n"
    assert first_error(log) == "torch.OutOfMemoryError: CUDA out of memory"
    assert first_error("ValueError: x=1 must be 2\n") == "ValueError: x=1 must be 2"
    assert first_error("killed\n") == "no error told"


def test_communication_is_waited_for_where_nothing_else_runs() -> None:
    sent = [(0.0, 2.0), (1.0, 3.0), (6.0, 7.0)]
    assert shares_of_step(sent, [(2.0, 5.0), (2.5, 6.5)], 10.0) == pytest.approx((0.4, 0.25))
    assert shares_of_step([], [], 0.0) == (0.0, 0.0)


def test_every_kernel_of_the_project_and_the_usual_ones_of_torch_have_a_class() -> None:
    others = {"cross_entropy": "loss", "swiglu": "elementwise", "rotary": "elementwise"}
    for path in (ROOT / "dash_megatron/ops").rglob("*.py"):
        for name in re.findall(r"^def (\w+_kernel)\(.*?^\)", path.read_text(), re.MULTILINE | re.DOTALL):
            assert class_of(name) == others.get(path.stem, "attention"), name
    torchs = {
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN": "matmul",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1x1x1_kernel0_0": "attention",
        "triton_poi_fused_add_cat_mul_rsub_sigmoid_silu_split_0": "elementwise",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>": "elementwise",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIterator)": "copy",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native": "copy",
        "Memcpy DtoD (Device -> Device)": "copy",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>": "norm",
        "triton_poi_fused_add_copy_copy__div_mul_sqrt_sub_0": "optimizer",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>": "optimizer",
        "void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, long>": "other",
    }
    assert {name: class_of(name) for name in torchs} == torchs


def test_overrides_of_a_layout_give_a_config_that_layout() -> None:
    layout = Layout(2, 2, 3, 2, "p2p", "selective", True)
    config = load_config("configs/8b_64k.yaml", ["training.global_batch=3", *as_overrides(layout).split()])
    assert configured_layout(config, 12) == layout
    assert in_words(layout) == "data 3 context 2 p2p tensor 2 sequence ZeRO 2 selective"
