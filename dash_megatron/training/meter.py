"""Measures training steps: loss and routing over all processes, and the time that training itself takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.config.flops import peak_flops, training_flops_per_token
from dash_megatron.data.batches import PackedBatch, num_target_tokens
from dash_megatron.layers import routing_means, take_context_bytes
from dash_megatron.parallel import context_parallel_group, tensor_group
from dash_megatron.training.metrics import StepMetrics
from dash_megatron.training.validation import Validation

T = TypeVar("T")


class _StepSums(NamedTuple, Generic[T]):
    """Sums over a step: float64 scalars, or numbers."""

    loss: T
    contexts: T
    """Sum over tokens of how many tokens each may attend to causally, itself included."""
    tokens: T
    target_tokens: T


class _LayerSums(NamedTuple, Generic[T]):
    """Sums over a step by layer: float64 [layers], or lists of numbers."""

    available: T
    """Mean chunks of a token, of each forward pass."""
    selected: T
    measured: T
    """Forward passes with a router."""
    sent_forward: T
    """Bytes to context-parallel peers."""
    sent_backward: T


class StepTotals:
    """Loss and routing of one step, summed over its micro-batches, then over the processes.

    Args:
        num_layers: layers of the model.
        device: where the process group communicates.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        num_step, num_layer = len(_StepSums._fields), len(_LayerSums._fields)
        # one tensor, which is summed over processes at once, and views of it
        self._sums = torch.zeros(num_step + num_layer * num_layers, dtype=torch.float64, device=device)
        self._of_step, self._of_layers = self._sums[:num_step], self._sums[num_step:].view(num_layer, -1)
        self._step_sums, self._layer_sums = _StepSums(*self._of_step), _LayerSums(*self._of_layers)
        self._imbalance = torch.ones((), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, batch: PackedBatch, model: torch.nn.Module) -> None:
        """Count one micro-batch, right after its backward pass; never waits for the device."""
        self._step_sums.loss.add_(loss.detach())
        self._step_sums.contexts.add_((batch.position_ids + 1).sum())
        self._step_sums.tokens.add_(batch.tokens.numel())
        self._step_sums.target_tokens.add_(num_target_tokens(batch))
        for layer, means in routing_means(model).items():
            self._layer_sums.available[layer] += means.chunks_available
            self._layer_sums.selected[layer] += means.chunks_selected
            self._layer_sums.measured[layer] += 1
        for layer, (forward, backward) in take_context_bytes(model).items():
            self._layer_sums.sent_forward[layer] += forward
            self._layer_sums.sent_backward[layer] += backward

    def reduce(self) -> None:
        """Add up the sums of all processes; collective, and waits for the device."""
        self._compare_context_ranks()
        dist.all_reduce(self._sums)
        # tensor-parallel ranks have copies of these; of routing, which belongs to kv heads, they have their own
        self._of_step /= dist.get_world_size(tensor_group())
        self._step_values: _StepSums[float] = _StepSums(*self._of_step.tolist())
        self._layer_values: _LayerSums[list[float]] = _LayerSums(*self._of_layers.tolist())

    def _compare_context_ranks(self) -> None:
        """Selected chunks of the busiest rank over the mean of the ranks that share its sequences; the largest in the run."""
        group = context_parallel_group()
        most = self._layer_sums.selected.sum()
        mean = most / dist.get_world_size(group)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(mean, group=group)
        self._imbalance = torch.where(mean > 0, most / mean, 1.0)
        dist.all_reduce(self._imbalance, dist.ReduceOp.MAX)

    @property
    def loss(self) -> float:
        """Mean loss of the global batch's target tokens, in nats."""
        return self._step_values.loss

    @property
    def target_tokens(self) -> int:
        """Number of the global batch's tokens that enter the loss."""
        return round(self._step_values.target_tokens)

    @property
    def context(self) -> float:
        """Mean number of tokens that a token may attend to causally, itself included."""
        return self._step_values.contexts / self._step_values.tokens

    @property
    def densities(self) -> list[float | None]:
        """Selected over causally available chunks of each layer; None without a router."""
        sums = self._layer_values
        return [x / y if y else None for x, y in zip(sums.selected, sums.available, strict=True)]

    @property
    def chunks_selected(self) -> list[float | None]:
        """Selected chunks per token of each layer, own chunk included; None without a router."""
        sums = self._layer_values
        return [x / y if y else None for x, y in zip(sums.selected, sums.measured, strict=True)]

    @property
    def context_imbalance(self) -> float:
        """Most selected chunks of a context-parallel rank over the mean of its group; 1 without routers."""
        return self._imbalance.item()

    @property
    def context_bytes_forward(self) -> list[float]:
        """Bytes that a process sent to context-parallel peers in forward passes of each layer, mean over processes."""
        return [sent / dist.get_world_size() for sent in self._layer_values.sent_forward]

    @property
    def context_bytes_backward(self) -> list[float]:
        """As `context_bytes_forward`, in backward passes."""
        return [sent / dist.get_world_size() for sent in self._layer_values.sent_backward]


@dataclass(frozen=True)
class StepResult:
    """What a finished training step gave; its metrics are made of it."""

    step: int
    """Number of the step, counted from 1."""
    totals: StepTotals
    """Loss and routing, reduced over all processes."""
    lr: float
    grad_norm: float
    """Global gradient norm before clipping; non-finite where the update was skipped for it."""
    samples: int
    """Samples read since the start of the run."""
    skipped: int
    """Updates skipped since the start of the run."""
    scaling_factors: list[float | None]
    """Scaling factor of each layer for the next step; None without a router."""


class Meter:
    """Turns results of steps into metrics, and keeps time.

    Args:
        config: the run.
        vocab_size: rows of the output projection.
        world_size: number of all processes; rates per process are the run's rate divided by it.
        device: what this process computes on.
    """

    def __init__(self, config: Config, vocab_size: int, world_size: int, device: torch.device) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.world_size = world_size
        self.on_gpu = device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if self.on_gpu else None
        self.tokens_per_step = config.training.global_batch * config.data.seq_length
        self.seconds_per_step = 0.0
        self.start()

    def start(self) -> None:
        """Start the clock: the time before was not spent on training."""
        self._start, self._steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within: for work that is not training."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def count_step(self) -> None:
        """Count a step since the last `lap`."""
        self._steps += 1

    def seconds_since_lap(self) -> float:
        """Seconds that training has taken since the last lap or the start."""
        return time.perf_counter() - self._start

    def lap(self) -> None:
        """Set `seconds_per_step` to the mean over the steps since the last lap, and begin a new lap."""
        seconds = self.seconds_since_lap()
        self.seconds_per_step = seconds / max(1, self._steps)
        self._start, self._steps = self._start + seconds, 0

    def measure(
        self, result: StepResult, valid: Validation, *, alarms: int, slowest: tuple[int, float]
    ) -> StepMetrics:
        """Make the metrics of a step, with the rates of the last lap.

        Args:
            result: what the step gave.
            valid: what validation found after it.
            alarms: layers whose router has collapsed.
            slowest: rank of the busiest process, and its time over the median of all.
        """
        totals = result.totals
        density, selected = totals.densities, totals.chunks_selected
        routed = [value for value in density if value is not None]
        by_layer = {layer: value for layer, value in enumerate(selected) if value is not None}
        rate = self.tokens_per_step / self.seconds_per_step
        model_flops, dense_flops = (
            training_flops_per_token(self.config, self.vocab_size, totals.context, chunks)
            * rate
            / self.world_size
            for chunks in (by_layer, None)
        )
        return StepMetrics(
            step=result.step,
            loss=totals.loss,
            valid_loss=valid.loss,
            valid_loss_by_position=valid.by_position,
            tasks=valid.tasks,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens=result.samples * self.config.data.seq_length,
            target_tokens=totals.target_tokens,
            context_length=self.config.data.context_length_at(result.step - 1),
            tokens_per_second=rate,
            model_tflops_per_second=model_flops / 1e12,
            dense_equivalent_tflops_per_second=dense_flops / 1e12,
            model_flops_utilization=model_flops / self.peak if self.peak else None,
            density=sum(routed) / len(routed) if routed else None,
            density_per_layer=density,
            chunks_selected_per_layer=selected,
            scaling_factor_per_layer=result.scaling_factors,
            context_imbalance=totals.context_imbalance,
            context_bytes_forward_per_layer=totals.context_bytes_forward,
            context_bytes_backward_per_layer=totals.context_bytes_backward,
            processes=self.world_size,
            gpu_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None,
            skipped=result.skipped,
            alarms=alarms,
            slowest_rank=slowest[0],
            slowest_over_median=slowest[1],
        )
