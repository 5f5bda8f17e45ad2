"""A training step is given to a GPU without waiting for it: nothing in its forward and backward reads what the GPU computes."""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from dash_megatron.config import config_from_dict
from tests.ops.quick_interpreter import quicken
from tests.training.test_global_batch import with_changes

# read values, or have sizes that depend on them
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "bincount"}
INDEXING = {"index", "index_put", "index_put_"}
# of torch and of its tensors; what is made of numbers is copied to the GPU, which waits too
FUNCTIONS = [(torch.Tensor, "tolist"), (torch.Tensor, "cpu"), (torch.Tensor, "numpy"), (torch, "tensor")]
# `sparse` must know how many chunks to send before it sends them
BY_DESIGN = {"sparse": [f"parallel/context/exchange.py:_ask {what}" for what in ("nonzero", "tolist")]}
VOCABULARY = 96


class HostWaits(TorchDispatchMode):
    """Remembers the functions of the package, `file:name`, in which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "dash_megatron":
            # what an operator of the package does is watched too
            implementation = OPDEFS[f"dash_megatron::{name}"]._backend_fns[None]
            with self:
                return implementation(*args, **(kwargs or {}))
        # one value, which may be put where a mask is true, needs no places
        by_mask = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        by_mask = by_mask and not (len(args) > 2 and args[2].numel() == 1)
        if name in WAITING or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def watched(self, where: Any, name: str) -> Any:
        """A function of torch's that is noted when it is called."""
        original = getattr(where, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.note(name)
            return original(*args, **kwargs)

        return call

    def note(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if "/triton/" in path:
                return  # the interpreter in place of a kernel
            if path.endswith("/dash_megatron/ops/checks.py"):
                return  # reads values on a CPU alone
            if "/dash_megatron/" in path:
                self.found.add(f"{path.rpartition('/dash_megatron/')[2]}:{frame.f_code.co_name} {what}")
                return
            frame = frame.f_back
        self.found.add(f"elsewhere {what}")


def one_watched_step(cases: list[tuple[str, dict[str, Any]]], folder: str) -> None:
    """Leave what `HostWaits` found in every case in `<folder>/<name>_<rank>.json`."""
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    from dash_megatron.data.batches import pack_samples
    from dash_megatron.layers import build_model, init_weights
    from dash_megatron.parallel import context_rank, destroy_process_groups, init_process_groups, read_launch
    from dash_megatron.training.loss import share_of_global_mean

    quicken(pytest.MonkeyPatch())
    init_process_groups(read_launch(os.environ), config_from_dict(cases[0][1]).parallel)
    for name, tree in cases:
        config = config_from_dict(tree)
        model = build_model(config, VOCABULARY, "cpu")
        init_weights(model, 0, 0.2)
        row = torch.randint(
            1, VOCABULARY, (config.data.seq_length + 1,), generator=torch.Generator().manual_seed(0)
        )
        row[[37, 70]] = 0
        batch = pack_samples([{"tokens": row[:-1], "labels": row[1:]}], eod=0)
        attention = config.attention
        batch = batch.shard(context_rank(), 2, attention.chunk_size, attention.query_pool)
        targets = torch.tensor(float(config.data.seq_length))

        # what is made once, such as tables of positions, is there then
        share_of_global_mean(model, batch, targets).backward()
        waits = HostWaits()
        with contextlib.ExitStack() as stack:
            for where, function in FUNCTIONS:
                stack.enter_context(mock.patch.object(where, function, waits.watched(where, function)))
            stack.enter_context(waits)
            share_of_global_mean(model, batch, targets).backward()
        found = sorted(waits.found)
        Path(folder, f"{name}_{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    destroy_process_groups()


def test_a_steps_forward_and_backward_never_make_the_host_wait(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    attention = {"backend": "triton", "local_chunks": 1, "query_pool": 5, "pool_heads": True}
    tree = with_changes(
        tiny_config,
        model={"layers": 1, "head_dim": 16},
        attention={**attention, "learned_scaling": True},
        data={"seq_length": 128},
        training={"recompute": "selective"},
    )
    exchanges = ("all_gather", "a2a", "p2p", "sparse")
    cases = [(e, with_changes(tree, parallel={"context": 2, "context_comm": e})) for e in exchanges]
    run_processes(2, one_watched_step, cases, str(tmp_path))
    found = {
        name: sorted(
            {x for rank in (0, 1) for x in json.loads((tmp_path / f"{name}_{rank}.json").read_text())}
        )
        for name in exchanges
    }
    assert found == {name: BY_DESIGN.get(name, []) for name in exchanges}
