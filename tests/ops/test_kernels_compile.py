"""Kernels compile, and fit into shared memory, on GPUs that nobody here has. Interpreted kernels never meet the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DASH = {
    "_summarize_fwd_kernel", "_finish_kernel", "_pool_kernel", "_route_kernel", "_attend_fwd_kernel", "_dq_kernel",
    "_router_bwd_kernel", "_dkv_pairs_kernel", "decode_attend_kernel", "_rope_kernel", "_swiglu_backward_kernel",
    "_loss_gradient_kernel",
}  # fmt: skip
BY_PAIR = {"_attend_pairs_kernel", "_backward_pairs_kernel"}


@pytest.mark.parametrize(
    ("name", "capability", "shared_kib", "multiprocessors", "shapes", "kernels"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, 163, 108, ["recipe"], DASH),
        ("NVIDIA L40S", 89, 99, 142, ["default"], DASH - {"_pool_kernel"}),
        ("NVIDIA H200", 90, 227, 132, ["default"], DASH - {"_pool_kernel"} | BY_PAIR),
        ("NVIDIA B200", 100, 227, 148, ["recipe"], DASH),
    ],
)
def test_kernels_compile_and_fit_into_the_shared_memory_of(
    name, capability, shared_kib, multiprocessors, shapes, kernels, tmp_path
):
    arguments = [name, capability, shared_kib * 1024, multiprocessors, *shapes]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_for", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [line.split() for line in run.stdout.splitlines()]
    assert kernels <= {kernel for kernel, _ in found}
    assert {kernel: shared for kernel, shared in found if int(shared) > shared_kib * 1024} == {}
