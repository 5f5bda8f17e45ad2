"""Batches whose loss or gradient is wrong: which updates are skipped, and what is kept of them for a replay."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from dash_megatron.checkpoint.files import write_tensors
from dash_megatron.config import FaultsConfig
from dash_megatron.data.batches import PackedBatch
from dash_megatron.files import path_for_message, write_whole
from dash_megatron.json_lines import strict_json
from dash_megatron.parallel import context_rank, data_rank, tensor_group
from dash_megatron.retry import retry

logger = logging.getLogger(__name__)

_TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


@dataclass(frozen=True)
class Fault:
    """An update that was skipped, as `<run>/faults/step_00000123/fault.json` holds it, with null for NaN and infinity."""

    step: int
    """Number of the update that was skipped, counted from 1."""
    reason: str
    loss: float
    """Loss of the global batch, in nats; may be non-finite (NaN or inf)."""
    grad_norm: float
    """Global gradient norm before clipping; may be non-finite (NaN or inf)."""
    first_sample: int
    """Number of the first training sample of the global batch; the others follow it."""
    num_samples: int
    policy: str
    """What the run does: skip, rollback or halt; known, where an earlier rollback had marked the batch."""
    checkpoint: int | None = None
    """Step of the newest checkpoint when the fault was found."""

    def __str__(self) -> str:
        last = self.first_sample + self.num_samples - 1
        return f"{self.reason} (step {self.step}, training samples {self.first_sample} to {last})"


class Guard:
    """Decides which updates to skip, by numbers that all processes share, so that all decide alike.

    Args:
        config: the policies of a run.
        global_batch: samples of a step.
    """

    def __init__(self, config: FaultsConfig, global_batch: int) -> None:
        self.config = config
        self.global_batch = global_batch
        self.skipped_batches: set[int] = set()
        """First sample of each global batch whose update is skipped; after a rollback some of them are still to come."""
        self.losses: deque[float] = deque(maxlen=config.loss_window)
        """Losses of the last updates that were made."""

    def check_loss(self, step: int, first_sample: int, loss: float) -> Fault | None:
        """Decide before an update whether to skip it: the fault, or None where the update is to be made."""
        if first_sample in self.skipped_batches:
            return Fault(step, "skipped before", loss, 0.0, first_sample, self.global_batch, "known")
        if not math.isfinite(loss):
            return self._fault(step, f"the loss is {loss}", loss, first_sample, self.config.non_finite)
        limit = self.spike_limit()
        if limit is not None and loss > limit:
            reason = f"the loss {loss:.4f} is a spike above {limit:.4f}"
            return self._fault(step, reason, loss, first_sample, self.config.loss_spike_policy)
        return None

    def check_gradient(self, step: int, first_sample: int, loss: float, grad_norm: float) -> Fault | None:
        """Tell after `Engine.step`, which skips non-finite gradients itself, whether it did: the fault, or None.

        The loss of an update that was made is remembered, to find spikes.
        """
        if not math.isfinite(grad_norm):
            reason = f"the gradient norm is {grad_norm}"
            return self._fault(step, reason, loss, first_sample, self.config.non_finite, grad_norm)
        self.losses.append(loss)
        return None

    def spike_limit(self) -> float | None:
        """The loss above which a step counts as a spike; None while too few losses are known."""
        if self.config.loss_spike is None or len(self.losses) < self.config.loss_window:
            return None
        return statistics.fmean(self.losses) + self.config.loss_spike * statistics.pstdev(self.losses)

    def num_skipped(self, consumed_samples: int) -> int:
        """How many updates were skipped among those that read samples before `consumed_samples`."""
        return sum(first < consumed_samples for first in self.skipped_batches)

    def _fault(
        self, step: int, reason: str, loss: float, first_sample: int, policy: str, grad_norm: float = math.nan
    ) -> Fault:
        self.skipped_batches.add(first_sample)
        in_a_row, first = 0, first_sample
        while first in self.skipped_batches:
            in_a_row, first = in_a_row + 1, first - self.global_batch
        if in_a_row >= self.config.max_in_a_row and policy != "halt":
            policy, reason = "halt", f"{reason}, as in {in_a_row} steps in a row something was wrong"
        return Fault(step, reason, loss, grad_norm, first_sample, self.global_batch, policy)

    def state_dict(self) -> dict[str, list[Any]]:
        """What a resumed run needs to decide as this one would, as JSON holds it in a checkpoint."""
        # `left_out` is the name in checkpoints
        return {"left_out": sorted(self.skipped_batches), "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, list[Any]]) -> None:
        """Take up a saved state. Batches marked after it was saved stay marked: a rollback does not train on them again."""
        self.skipped_batches |= set(state["left_out"])
        self.losses.clear()
        self.losses.extend(state["losses"])


def fault_folder(run_dir: str | Path, step: int) -> Path:
    """Folder in which the fault of a step is kept."""
    return Path(run_dir) / "faults" / f"step_{step:08d}"


def keep_fault(run_dir: str | Path, fault: Fault, batches: list[PackedBatch]) -> None:
    """Call `write_fault` on every process of a run but those whose tensor-parallel group has written already."""
    if dist.get_rank(tensor_group()) == 0:
        write_fault(run_dir, fault, batches, data_rank(), context_rank(), main=dist.get_rank() == 0)


def write_fault(
    run_dir: str | Path,
    fault: Fault,
    batches: list[PackedBatch],
    data_rank: int,
    context_rank: int,
    main: bool,
) -> None:
    """Write this process's micro-batches of a fault, and from one process its facts, each file whole or not at all.

    Where the disk does not take them, that is logged, and the run goes on.

    Args:
        run_dir: the run's folder.
        fault: what is known of it.
        batches: as read: of context-parallel ranks, each has its own tokens only.
        data_rank, context_rank: name the file; of tensor-parallel ranks, which read the same, one writes.
        main: whether this process writes `fault.json`.
    """
    folder = fault_folder(run_dir, fault.step)
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        parts = {name: getattr(batch, name) for name in _TENSORS}
        parts["sample_ids"] = torch.tensor(batch.sample_ids)
        if batch.context is not None:
            parts["token_index"] = batch.context.token
        tensors |= {f"{index}.{name}": part.detach().cpu().contiguous() for name, part in parts.items()}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"data_{data_rank:05d}_context_{context_rank:03d}.safetensors"
        temporary = path.with_suffix(".tmp")
        write_tensors(temporary, tensors)
        os.replace(temporary, path)
        if main:
            write_whole(folder / "fault.json", strict_json(asdict(fault), indent=2) + "\n")

    try:
        retry(write, f"keep the batch of step {fault.step} for a replay", seconds=10, path=run_dir)
    except OSError as error:
        logger.error("%s; the run goes on without it", error.strerror)


def read_fault(folder: str | Path) -> tuple[Fault, dict[int, list[PackedBatch]]]:
    """Read what `write_fault` wrote, on the CPU.

    Args:
        folder: such as `<run>/faults/step_00000123`.

    Returns:
        The fault, and the micro-batches of each data-parallel rank, in order. Where context-parallel ranks shared the
        tokens, batches are whole again (`context` is None): `PackedBatch.shard` divides them anew.

    Raises:
        FileNotFoundError: no fault was kept there, or files of it are missing.
    """
    folder = Path(folder)
    facts, files = folder / "fault.json", sorted(folder.glob("data_*_context_*.safetensors"))
    if not facts.is_file() or not files:
        raise FileNotFoundError(
            f"{path_for_message(folder)} has no fault.json with its batches; give a folder of a run's faults/, such as "
            "runs/quickstart/faults/step_00000123"
        )
    shards: dict[int, list[dict[str, Tensor]]] = {}
    for path in files:
        shards.setdefault(int(path.stem.split("_")[1]), []).append(load_file(path))
    known = json.loads(facts.read_text(encoding="utf-8"))
    known |= {name: math.nan for name in ("loss", "grad_norm") if known[name] is None}
    return Fault(**known), {rank: _whole_batches(parts, folder) for rank, parts in shards.items()}


def _whole_batches(shards: list[dict[str, Tensor]], folder: Path) -> list[PackedBatch]:
    """Put the tokens of all context-parallel ranks of each micro-batch into their order."""
    batches = []
    for index in range(len({name.split(".")[0] for name in shards[0]})):
        parts = [
            {name.split(".")[1]: part for name, part in shard.items() if name.split(".")[0] == str(index)}
            for shard in shards
        ]
        cu_seqlens = parts[0]["cu_seqlens"]
        places = torch.cat([part.get("token_index", torch.arange(part["tokens"].numel())) for part in parts])
        if len(places) != int(cu_seqlens[-1]):
            raise FileNotFoundError(
                f"{folder} has {len(places)} of {int(cu_seqlens[-1])} tokens: a context-parallel rank's file is "
                "missing; copy all of them"
            )
        order = places.argsort()
        tokens, labels, loss_mask, position_ids = (
            torch.cat([part[name] for part in parts], dim=1)[:, order] for name in _TENSORS[:4]
        )
        ids = [int(number) for number in parts[0]["sample_ids"]]
        longest = int(cu_seqlens.diff().max())
        batches.append(PackedBatch(tokens, labels, loss_mask, position_ids, cu_seqlens, longest, ids))
    return batches
