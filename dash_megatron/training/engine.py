"""The model and its optimizer under DeepSpeed's ZeRO; no other file imports DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.utils import all_gather_dp_groups, get_global_norm_of_tensors, is_invalid_grad_norm
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS, ZeRORuntimeException
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import nvtx

from dash_megatron.checkpoint.fragments import Fragment, adam_state, fragments, local_shapes, refresh_weights
from dash_megatron.config import Config, ZeroConfig
from dash_megatron.ops.adamw import adamw_step
from dash_megatron.parallel import GradientGroups, gradient_group
from dash_megatron.parallel.libraries import without_compiler
from dash_megatron.training.adamw import GuardedAdamW, parameter_groups
from dash_megatron.training.gradient_sums import GradientSums

with without_compiler():
    # ZeRO would import it when a run starts, with the compiler
    import deepspeed.runtime.zero.muon.muon_optimizer

# Empty, so that DeepSpeed does not compile its shared-memory reduction when it starts: that serves inference only, and
# needs a C++ compiler and ninja where training needs neither.
deepspeed.ops.__compatible_ops__ = {}
# Profilers of CUDA alone read the ranges it marks; without one they are a tenth of a ZeRO 3 step on the CPU.
nvtx.enable_nvtx = torch.cuda.is_available()

BUCKET_ELEMENTS = 500_000_000
"""Gradients that ZeRO reduces together, at most: DeepSpeed's default of `reduce_bucket_size`."""


class Engine:
    """A model, its AdamW and its gradients, sharded by ZeRO over the processes that hold the same weights.

    A step is: `set_lr`, then for every micro-batch `forward`, `backward`, `step`; DeepSpeed counts micro-batches
    and updates weights on the last one.

    Args:
        model: weights in float32, the same on every process, or its tensor-parallel shard.
        config: a checked run config.
        world_size: number of processes that hold the same weights, data x context parallel: their gradients add up.
    """

    def __init__(self, model: torch.nn.Module, config: Config, world_size: int) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        self.world_size = world_size
        self.zero_stage = config.zero.stage
        device = next(model.parameters()).device
        self._adam = GuardedAdamW(
            parameter_groups(model, config),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=device.type == "cuda",
        )
        # under ZeRO 0 DeepSpeed makes a first update, of gradients of zero, which would decay weights and count as one
        self._adam.skip = True
        # DeepSpeed prints its memory use here, whatever the log level
        with contextlib.redirect_stdout(io.StringIO()), _naming_options(config.zero):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=self._adam,
                config=_deepspeed_config(config, world_size, sum(p.numel() for p in model.parameters())),
                dist_init_required=False,
                # without tensor parallelism the processes that hold the same weights are all there are
                mpu=GradientGroups() if config.parallel.tensor > 1 else None,
            )
        self._adam.skip = False
        if type(self._optimizer) is BF16_Optimizer:
            # DeepSpeed makes it by itself
            self._optimizer.__class__ = _FusedBF16Optimizer
            self._optimizer.sums = GradientSums(self._optimizer) if world_size > 1 else None
            self._adam.update = self._optimizer.update_weights
        # ZeRO 0 in fp32 has no optimizer wrapper that would keep the gradient norm
        self._optimizer_is_plain = isinstance(self._optimizer, torch.optim.Optimizer)
        self._plain_grad_norm = 0.0
        self._adam.norm_of_this_update = self.grad_norm

    @property
    def model(self) -> torch.nn.Module:
        """The model, whose weights may be sharded; `forward` calls it with whole ones."""
        return self._engine.module

    def forward(self, *inputs: Any) -> Tensor:
        """What the model returns for its inputs, called through DeepSpeed."""
        return self._engine(*inputs)

    @record_function("backward")
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the step's gradient.

        The step's gradient is the plain sum over micro-batches and processes: DeepSpeed's mean over processes is
        undone here and its division by accumulation steps is switched off, so that the caller alone decides what
        the loss is divided by.
        """
        sums: GradientSums | None = getattr(self._optimizer, "sums", None)
        last = self._engine.is_gradient_accumulation_boundary()
        with contextlib.nullcontext() if sums is None else sums.taking(last):
            # only DeepSpeed's own sums are divided by the number of processes
            self._engine.backward(loss * (self.world_size if sums is None else 1), scale_wrt_gas=False)

    @record_function("update")
    def step(self) -> None:
        """Count a micro-batch; on the last one of a step clip gradients, update weights and clear gradients."""
        if self._optimizer_is_plain and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._plain_grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.step()

    def skip_update(self, skip: bool) -> None:
        """Decide whether the coming update is skipped: gradients are cleared, weights and moments stay.

        An update whose gradient norm is non-finite (NaN or inf) is skipped in any case.
        """
        self._adam.skip = skip

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def grad_norm(self) -> float:
        """Global gradient norm of the update that is being made, or of the last one, before clipping."""
        return self._plain_grad_norm if self._optimizer_is_plain else float(self._optimizer._global_grad_norm)

    def state(self) -> dict[str, Tensor]:
        """Float32 views of the master weights and Adam's moments that this process alone keeps.

        Keys are `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`; `fragment_starts` says which part of NAME it is.
        """
        if self.zero_stage == 0 and dist.get_rank(gradient_group()):
            return {}  # the first of the processes that hold the same keeps it for all
        return {
            f"{kind}/{name}": view
            for name, fragment in self._fragments().items()
            for kind, view in fragment.views(self._adam).items()
        }

    def fragment_starts(self) -> dict[str, int]:
        """By parameter name: where, in the flattened parameter, the elements begin that this process keeps."""
        return {name: fragment.start for name, fragment in self._fragments().items()}

    def adam_steps(self) -> int:
        """How many updates Adam has made."""
        return max(int(adam_state(self._adam, f.master)["step"]) for f in self._fragments().values())

    @torch.no_grad()
    def load_state(self, read: Callable[[str, str, int, int], Tensor], adam_steps: int) -> None:
        """Set master weights, moments and weights; collective.

        Args:
            read: `read(kind, name, start, numel)` gives elements of a flattened parameter of this tensor-parallel rank;
                kinds are those of `state`.
            adam_steps: how many updates made them.
        """
        for name, fragment in self._fragments().items():
            for kind, view in fragment.views(self._adam).items():
                view.copy_(read(kind, name, fragment.start, fragment.numel))
            adam_state(self._adam, fragment.master)["step"].fill_(adam_steps)
        refresh_weights(self._optimizer)

    def local_shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter before ZeRO shards it: that of its tensor-parallel shard."""
        return local_shapes(self.model)

    def _fragments(self) -> dict[str, Fragment]:
        return fragments(self.model, self._optimizer, self._adam)


class _FusedBF16Optimizer(BF16_Optimizer):
    """DeepSpeed's optimizer for bf16 under ZeRO 1, which goes over gradients and weights less often.

    A parameter's first gradient of a step overwrites what the float32 buffer held, so that nothing is ever zeroed; the update
    clips, moves moments and weights, and rounds in one pass. Several processes add gradients up during the backward.
    """

    sums: GradientSums | None = None

    @torch.no_grad()
    def add_gradients(self, places: Iterable[tuple[int, int]]) -> None:
        """Add parameters' gradients of a micro-batch to those of the step: of each its group and its number there."""
        first: tuple[list[Tensor], list[Tensor]] = ([], [])
        for group, number in places:
            parameter, total = self.bf16_groups[group][number], self.fp32_groups_gradients[group][number]
            gradient, seen = parameter.grad.view(total.shape), self.fp32_groups_has_gradients[group]
            if seen[number]:
                total.add_(gradient)
            else:
                first[0].append(total)
                first[1].append(gradient)
                seen[number], parameter._hp_grad = True, total
        if first[0]:
            torch._foreach_copy_(*first)

    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Add gradients of a micro-batch to those of the step, which are float32."""
        assert not clear_lp_grads
        self.add_gradients(
            (group, number)
            for group, parameters in enumerate(self.bf16_groups)
            for number, parameter in enumerate(parameters)
            if parameter.grad is not None
        )
        # the next backward makes new ones, in place of zeros to which it adds
        self.clear_lp_grads(set_to_none=True)

    @torch.no_grad()
    def get_grads_for_reduction(self) -> Any:
        """As DeepSpeed's, of whole buffers: a parameter without a gradient in this step counts with zeros.

        Another process may have a gradient for it, and all must clip alike.
        """
        for sums, seen in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for number, total in enumerate(sums):
                if not seen[number]:
                    total.zero_()
                    seen[number] = True
        if self.sums is None:
            return super().get_grads_for_reduction()
        self.sums.finish()
        return [], {}

    def clear_hp_grads(self) -> None:
        """Let the next gradients be the first of a step."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """As DeepSpeed's, except that clipping and rounding are left to the inner optimizer, which calls `update_weights`."""
        gradients, _ = self.get_grads_for_norm()
        norm = get_global_norm_of_tensors(input_tensors=gradients, mpu=self.mpu, norm_type=self.norm_type)
        self.overflow = is_invalid_grad_norm(norm)
        self._global_grad_norm = float("inf") if self.overflow else norm
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        all_gather_dp_groups(
            groups_flat=self.bf16_groups_flat,
            partitioned_param_groups=self.bf16_partitioned_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )
        self.clear_hp_grads()

    def update_weights(self) -> None:
        """Update this process's part of weights and moments from the step's gradient and its norm."""
        clip = min(1.0, self.clip_grad / (float(self._global_grad_norm) + 1e-6)) if self.clip_grad else 1.0
        states = [adam_state(self.optimizer, master) for master in self.fp32_groups_flat_partition]
        # read before the first update is launched: reading waits for the device
        steps = [int(state["step"]) + 1 for state in states]
        for i, (group, state, step) in enumerate(
            zip(self.optimizer.param_groups, states, steps, strict=True)
        ):
            state["step"] += 1
            adamw_step(
                self.fp32_groups_flat_partition[i].detach(),
                self.fp32_groups_gradient_flat_partition[i],
                state["exp_avg"],
                state["exp_avg_sq"],
                self.bf16_partitioned_groups[i][dist.get_rank(self.real_dp_process_group[i])],
                clip=clip,
                step=step,
                **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
            )


# DeepSpeed knows torch's AdamW by its very class, and would warn of an untested optimizer at every start
ZERO_SUPPORTED_OPTIMIZERS.append(GuardedAdamW)


@contextlib.contextmanager
def _naming_options(zero: ZeroConfig) -> Iterator[None]:
    """Turn what DeepSpeed refuses within into a ValueError that names `zero.options`, where the config has any."""
    try:
        yield
    except (DeepSpeedConfigError, ZeRORuntimeException, ValueError) as error:
        if not zero.options:
            raise
        told = " ".join(str(error).split())
        raise ValueError(
            f"zero.options={zero.options} must be keys of zero_optimization that DeepSpeed {deepspeed.__version__} takes with "
            f"zero.stage={zero.stage} and an AdamW that is not its own; it says: {told}; remove what it names"
        ) from error


def _deepspeed_config(config: Config, world_size: int, parameters: int) -> dict[str, Any]:
    bf16, stage = config.training.precision == "bf16", config.zero.stage
    # DeepSpeed allocates a bucket whole, however small the model is
    bucket = min(BUCKET_ELEMENTS, parameters)
    return {
        # DeepSpeed takes context ranks for data ranks that read samples of their own, and checks the product
        "train_batch_size": config.training.global_batch * config.parallel.context,
        "train_micro_batch_size_per_gpu": config.training.micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps(world_size * config.parallel.tensor),
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": bf16},
        # bf16 sums of many micro-batches lose what is small; ZeRO 0 knows one type only
        "data_types": {"grad_accum_dtype": "fp32" if stage or not bf16 else "bf16"},
        # so do bf16 sums over many processes: 512 gradients of 1, added one after another, give 256
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, **config.zero.options},
        "steps_per_print": 2**31,
        # it waits for the device twice a micro-batch
        "timers": {"throughput": {"enabled": False}},
    }
