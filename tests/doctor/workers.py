"""What processes of a test do: examine a run in which one thing is broken, and leave the results in files."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dash_megatron.config import config_from_dict
from dash_megatron.doctor import bandwidth, inputs, runner
from dash_megatron.doctor import session as session_module
from dash_megatron.doctor.examine import CHECKS
from dash_megatron.doctor.runner import Check, Finding, merge_largest, run_checks
from dash_megatron.doctor.session import Session
from dash_megatron.parallel import context_parallel_group, read_launch
from dash_megatron.parallel.context.communication import ContextGroup, PendingTensor


def examine_broken(tree: dict[str, Any], folder: str) -> None:
    """Save `{case: {check: result}}` to `<folder>/<rank>.json`; at last, rank 1 hangs."""
    session = Session(config_from_dict(tree), read_launch(os.environ))
    found = {
        "sound": _examine(session, *(check.name for check in CHECKS)),
        "fingerprint": _on_rank_1(session, _other_fingerprint, "versions", "disk"),
        "exchange": _examine_with(_wrong_exchange(), session, "parity", "leak"),
        "tensors": _examine_with(_other_weights(session.rank), session, "parity"),
        "network": _examine_with(mock.patch.object(bandwidth, "_shift"), session, "bandwidth"),
        "one raises": _one_raises_in_a_collective(session),
    }
    Path(folder, f"{session.rank}.json").write_text(json.dumps(found))
    _hang_on_rank_1(session, Path(folder, "hang.json"))


def _hang_on_rank_1(session: Session, path: Path) -> None:
    """Rank 1 does not end a check; rank 0 saves its results."""
    runner.GRACE_SECONDS = 2.0

    def hang(session: Session) -> Finding:
        time.sleep(300 * session.rank)
        return Finding()

    checks = [
        Check("hang", 1.0, hang, merge_largest),
        Check("next", 60.0, lambda session: Finding(), merge_largest),
    ]
    examination = run_checks(session, checks)
    if session.rank == 0:
        results = [asdict(result) for result in examination.results]
        path.write_text(json.dumps([examination.processes_lost, results]))
    time.sleep(300)


def _examine(session: Session, *names: str) -> dict[str, Any]:
    results = run_checks(session, [check for check in CHECKS if check.name in names]).results
    return {result.name: asdict(result) for result in results}


def _examine_with(broken: Any, session: Session, *names: str) -> dict[str, Any]:
    with broken:
        return _examine(session, *names)


def _on_rank_1(session: Session, broken: Callable[[], Any], *names: str) -> dict[str, Any]:
    return _examine_with(broken(), session, *names) if session.rank else _examine(session, *names)


def _other_fingerprint() -> Any:
    return mock.patch.object(inputs, "implementation_fingerprint", return_value="launch table of last week")


def _wrong_exchange() -> Any:
    """Gradients of keys that other ranks attended to are dropped."""

    send = ContextGroup.send_shares

    def own_share_only(self: ContextGroup, shares: torch.Tensor) -> PendingTensor:
        alone = torch.zeros_like(shares)
        alone[self.rank] = shares[self.rank]
        return send(self, alone)

    return mock.patch.object(ContextGroup, "send_shares", own_share_only)


def _other_weights(rank: int) -> Any:
    """Rank 1 begins with other weights wherever it is one of several."""
    from dash_megatron.doctor import parity

    build = parity.build

    def build_apart(config: Any, device: torch.device) -> Any:
        model = build(config, device)
        if rank == 1 and config.parallel.context > 1:
            torch.nn.init.normal_(next(model.parameters()), std=0.2)
        return model

    return mock.patch.object(parity, "build", build_apart)


def _one_raises_in_a_collective(session: Session) -> dict[str, Any]:
    """Rank 0 waits for a partner that will not come; the checks after that communicate as if nothing had been."""

    def sum_up(session: Session) -> Finding:
        with session.model_groups(session.config.parallel):
            if session.rank == 1:
                raise RuntimeError("out of memory")
            dist.all_reduce(torch.ones(1), group=context_parallel_group())
        return Finding()

    def divide(session: Session) -> Finding:
        session.run_on_all(lambda: 1 / (1 - session.rank))
        return Finding()

    checks = [
        Check("sum", 60.0, sum_up, merge_largest),
        Check("part", 60.0, divide, merge_largest),
        *(check for check in CHECKS if check.name in ("bandwidth", "leak")),
    ]
    with mock.patch.object(session_module, "COLLECTIVE_TIMEOUT_SECONDS", 2.0):
        first = run_checks(session, checks[:1]).results
    return {result.name: asdict(result) for result in [*first, *run_checks(session, checks[1:]).results]}
