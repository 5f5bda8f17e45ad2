"""DeepSpeed, and nothing but: the only file that imports it."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from dash_megatron.config import Config
from dash_megatron.layers.sharding import Split, join, split_of
from dash_megatron.parallel import GradientGroups, tensor_group

# Empty, so that DeepSpeed does not compile its shared-memory reduction when it starts: that serves inference only, and
# needs a C++ compiler and ninja where training needs neither.
deepspeed.ops.__compatible_ops__ = {}

_Reader = Callable[[], Tensor]


class Engine:
    """A model, its AdamW and its gradients, sharded by ZeRO over the processes that hold the same weights.

    A step is: `set_lr`, then for every micro-batch `model(...)`, `backward`, `step`; DeepSpeed counts micro-batches
    and updates weights on the last one.

    Args:
        model: weights in float32, the same on every process, or its tensor-parallel shard.
        config: a checked run config.
        world_size: number of processes that hold the same weights, data x context parallel: their gradients add up.
    """

    def __init__(self, model: torch.nn.Module, config: Config, world_size: int) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        self.world_size = world_size
        self.tensor_size = config.parallel.tensor
        device = next(model.parameters()).device
        optimizer = _GuardedAdamW(
            _parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=device.type == "cuda",
        )
        # it prints its memory, whatever the log level
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=_deepspeed_config(config, world_size),
                dist_init_required=False,
                # without tensor parallelism the processes that hold the same weights are all there are
                mpu=GradientGroups() if config.parallel.tensor > 1 else None,
            )
        # ZeRO 0 in fp32 has no optimizer wrapper that would keep the gradient norm
        self._optimizer_is_plain = isinstance(self._optimizer, torch.optim.Optimizer)
        self._plain_grad_norm = 0.0
        self._adamw = optimizer
        optimizer.norm_of_this_update = self._norm_of_this_update

    @property
    def model(self) -> torch.nn.Module:
        """The callable whose forward pass DeepSpeed watches."""
        return self._engine

    @property
    def module(self) -> torch.nn.Module:
        """The model itself, whose weights may be sharded."""
        return self._engine.module

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the step's gradient.

        The step's gradient is the plain sum over micro-batches and processes: DeepSpeed's mean over processes is
        undone here and its division by accumulation steps is switched off, so that the caller alone decides what
        the loss is divided by.
        """
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> None:
        """Count a micro-batch; on the step's last one clip, update weights and clear gradients."""
        if self._optimizer_is_plain and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._plain_grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.step()

    def leave_out_update(self, leave_out: bool) -> None:
        """Decide whether the coming update is left out: gradients are cleared, weights and moments stay.

        One whose gradient norm is no number is left out anyway.
        """
        self._adamw.leave_out = leave_out

    def _norm_of_this_update(self) -> float:
        return self._plain_grad_norm if self._optimizer_is_plain else float(self._optimizer._global_grad_norm)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        return (
            self._plain_grad_norm if self._optimizer_is_plain else float(self._engine.get_global_grad_norm())
        )

    def full_gradients(self) -> dict[str, Tensor]:
        """Every parameter's gradient, whole and in float32, between the last `backward` and `step`; collective."""
        return {
            name: self._whole(_full_gradient(parameter), split_of(parameter))
            for name, parameter in self.module.named_parameters()
        }

    def full_weights(self) -> dict[str, Tensor]:
        """Every parameter, whole and in float32, from the master weights where there are any; collective."""
        return {
            name: self._whole(_full_weight(parameter), split_of(parameter))
            for name, parameter in self.module.named_parameters()
        }

    def _whole(self, shard: Tensor, split: Split | None) -> Tensor:
        """Join the shards of all tensor-parallel ranks."""
        if split is None or self.tensor_size == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.tensor_size)]
        dist.all_gather(shards, shard.contiguous(), group=tensor_group())
        return join(shards, split)

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write weights, optimizer and `state` to `folder/tag`; collective."""
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Read what `save` wrote into this engine and give back its `state`; collective.

        Raises:
            RuntimeError: DeepSpeed found no checkpoint there.
        """
        path, state = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError(f"{folder / tag} holds no checkpoint that DeepSpeed can read")
        return state


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves out an update when told to, or when the global gradient norm is no number.

    DeepSpeed knows that norm only within its own step, right before it calls this one. Its wrappers leave out such
    updates too, except those of bf16 under ZeRO 1 and 2; without ZeRO nothing does.
    """

    leave_out = False
    norm_of_this_update: Callable[[], float] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update, or only make the state that the first update would find."""
        norm = self.norm_of_this_update
        if not self.leave_out and (norm is None or math.isfinite(norm())):
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    device = parameter.device if group["fused"] else "cpu"
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return None


class CheckpointWeights(Mapping[str, Tensor]):
    """A checkpoint's weights by parameter name, each read and made whole when asked for; on CPU, without process group.

    ZeRO 1 to 3 give the float32 master weights, ZeRO 0 the weights in training precision. Files are mapped, not read:
    what is asked for takes memory, and what was given back and dropped takes none.

    Args:
        folder, tag: the checkpoint is `folder/tag`.
        zero_stage: of the run that wrote it.
        splits: how the weights that are split over tensor-parallel ranks are split.
        tensor_size: tensor-parallel size of the run that wrote it.

    Raises:
        ValueError, FileNotFoundError: a file of the checkpoint is missing or damaged.
    """

    def __init__(
        self, folder: Path, tag: str, zero_stage: int, splits: Mapping[str, Split], tensor_size: int
    ) -> None:
        self._splits = splits
        self._shards: list[dict[str, _Reader]] = []
        for rank in range(tensor_size):
            with _files_of_tensor_rank(folder / tag, rank) as path:
                self._shards.append(_readers(path, zero_stage))

    def __getitem__(self, name: str) -> Tensor:
        return join([shard[name]() for shard in self._shards], self._splits.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards[0])

    def __len__(self) -> int:
        return len(self._shards[0])


@contextlib.contextmanager
def _files_of_tensor_rank(path: Path, rank: int) -> Iterator[Path]:
    """A folder of links that make one tensor-parallel rank's files look like a whole checkpoint.

    DeepSpeed's reader takes every file it finds for a shard of one model, and looks for rank 0's names.
    """
    mine, first = f"mp_rank_{rank:02d}_", "mp_rank_00_"
    with tempfile.TemporaryDirectory() as name:
        for file in path.glob(f"*{mine}*.pt"):
            (Path(name) / file.name.replace(mine, first)).symlink_to(file.resolve())
        yield Path(name)


def _readers(path: Path, zero_stage: int) -> dict[str, _Reader]:
    """What reads each weight of a checkpoint without tensor parallelism."""
    if zero_stage == 3:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            lazy = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name, lazy_mode=True)
        return {name: tensor.contiguous for name, tensor in lazy.items()}
    states = _map_file(path / "mp_rank_00_model_states.pt")
    if zero_stage == 0:
        return {
            name: functools.partial(_join_slices, [value.flatten()], value.shape)
            for name, value in states["module"].items()
            if isinstance(value, Tensor)
        }
    shapes = {name: shape for group in states["param_shapes"] for name, shape in group.items()}
    files = list(path.glob("*zero_pp_rank_*_optim_states.pt"))
    if len(files) != states["dp_world_size"]:
        raise FileNotFoundError(
            f"{path.resolve()} has {len(files)} optimizer files, but {states['dp_world_size']} processes wrote it"
        )
    prefix = files[0].name.partition("zero_pp_rank_")[0]
    shards = [
        _map_file(path / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        for rank in range(len(files))
    ]
    if "param_slice_mappings" in shards[0] and zero_stage == 1 and prefix:
        slices = _named_slices(shards)
    else:
        slices = _consecutive_slices(shards, states["param_shapes"])
    return {name: functools.partial(_join_slices, slices[name], shape) for name, shape in shapes.items()}


def _map_file(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _join_slices(slices: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat(slices).view(shape)


def _named_slices(shards: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """Master weights of DeepSpeed's bf16 ZeRO-1 optimizer, which says what each rank holds of each."""
    slices: dict[str, list[Tensor]] = {}
    for shard in shards:
        groups = zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True)
        for flat, fragments in groups:
            for name, fragment in fragments.items():
                slices.setdefault(name, []).append(flat[fragment.start : fragment.start + fragment.numel])
    return slices


def _consecutive_slices(
    shards: list[dict[str, Any]], param_shapes: list[dict[str, torch.Size]]
) -> dict[str, list[Tensor]]:
    """Master weights of the ZeRO 1 and 2 optimizer: a group's stand in one row, cut into a piece for each rank."""
    slices: dict[str, list[Tensor]] = {}
    paddings = shards[0].get("param_alignment_paddings")
    for index, shapes in enumerate(param_shapes):
        pieces = [shard["single_partition_of_fp32_groups"][index] for shard in shards]
        ends = list(itertools.accumulate(len(piece) for piece in pieces))
        start = 0
        for number, (name, shape) in enumerate(shapes.items()):
            stop = start + shape.numel()
            if stop > ends[-1]:
                raise ValueError(
                    f"{name} ends at {stop}, past the {ends[-1]} weights that the optimizer files hold"
                )
            found = [
                piece[max(start - end + len(piece), 0) : stop - end + len(piece)]
                for piece, end in zip(pieces, ends, strict=True)
                if start < end and stop > end - len(piece)
            ]
            slices[name] = found
            start = stop + (paddings[index][number] if paddings is not None else 0)
    return slices


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    """ZeRO 1 and 2 link parameters to shards of the optimizer; ZeRO 3 shards the parameters."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _full_weight(parameter: torch.nn.Parameter) -> Tensor:
    weight = safe_get_full_fp32_param(parameter) if _is_sharded(parameter) else parameter
    return weight.detach().float().clone()


def _full_gradient(parameter: torch.nn.Parameter) -> Tensor:
    gradient = safe_get_full_grad(parameter) if _is_sharded(parameter) else parameter.grad
    return (
        torch.zeros_like(parameter, dtype=torch.float32)
        if gradient is None
        else gradient.detach().float().clone()
    )


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and summary queries do not."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (kept if parameter.dim() == 1 or name.endswith("summary_query") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    bf16, stage = config.training.precision == "bf16", config.zero.stage
    return {
        # DeepSpeed takes context ranks for data ranks that read samples of their own, and checks the product
        "train_batch_size": config.training.global_batch * config.parallel.context,
        "train_micro_batch_size_per_gpu": config.training.micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps(world_size * config.parallel.tensor),
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": bf16},
        # bf16 sums of many micro-batches lose what is small; ZeRO 0 knows one type only
        "data_types": {"grad_accum_dtype": "fp32" if stage or not bf16 else "bf16"},
        "zero_optimization": {"stage": stage, **config.zero.options},
        "zero_allow_untested_optimizer": True,  # it knows AdamW by its very class, not by those derived from it
        "steps_per_print": 2**31,
    }
