"""Compute a batch again that gave a wrong loss or gradient, and say which sample and which module it came from."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dash_megatron.checkpoint.folder import finished_steps
from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.config import Config, ParallelConfig, load_config
from dash_megatron.data.batches import PackedBatch, num_target_tokens
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.files import check_run_folder
from dash_megatron.layers import DashGPTModel, build_model, init_weights
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups
from dash_megatron.training.faults import fault_folder, read_fault
from dash_megatron.training.initial import load_initial_weights


class SampleLoss(NamedTuple):
    """The loss of one sample of the batch."""

    sample: int
    loss: float
    """Mean loss of its target tokens, in nats; 0 without any."""
    document: tuple[int, int]
    """First token within the sample, and the one past the last, of its document with the largest loss."""
    document_loss: float


@dataclass
class Replay:
    """Losses and gradients of a batch that was computed again."""

    samples: list[SampleLoss] = field(default_factory=list)
    first_module: str | None = None
    """The first module, in the order of the forward pass, with a non-finite output; None where all are finite."""
    gradient_norms: dict[str, float] = field(default_factory=dict)
    """Norm of every parameter's gradient of the batch's mean loss, before clipping."""

    @property
    def gradient_norm(self) -> float:
        """Norm of the gradient of all parameters together."""
        return math.hypot(*self.gradient_norms.values())

    @property
    def is_finite(self) -> bool:
        """Whether all losses, gradients and outputs of modules are finite."""
        losses = [sample.loss for sample in self.samples]
        return self.first_module is None and all(map(math.isfinite, [*losses, self.gradient_norm]))


def replay_step(run_dir: str | Path, step: int) -> int:
    """Print what the batch kept of a step gives with the newest checkpoint at or before it, on one process.

    Args:
        run_dir: the run's folder.
        step: whose batch was kept in `<run_dir>/faults`.

    Returns:
        0 where everything is finite, 1 otherwise.

    Raises:
        FileNotFoundError: there is no such folder, or nothing was kept of that step.
    """
    check_run_folder(run_dir)
    fault, batches_of_ranks = read_fault(fault_folder(run_dir, step))
    batches = [batch for _, batches in sorted(batches_of_ranks.items()) for batch in batches]
    print(f"kept: {fault}")
    device = init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    try:
        model, config, origin = _load_model(run_dir, step, device)
        precision = str(next(model.parameters()).dtype).removeprefix("torch.")
        print(f"{origin}, {precision} on {device.type}, attention.backend={config.attention.backend}")
        result = replay_batches(model, batches, config.data.seq_length)
    finally:
        destroy_process_groups()
    print(render(result))
    return 0 if result.is_finite else 1


def replay_batches(model: DashGPTModel, batches: Sequence[PackedBatch], seq_length: int) -> Replay:
    """Losses and gradients of one global batch.

    Args:
        model: on any device.
        batches: its micro-batches, whole, on the host.
        seq_length: tokens of a sample.
    """
    device = next(model.parameters()).device
    result = Replay()
    targets = max(1, sum(int(num_target_tokens(batch)) for batch in batches))
    model.train()
    model.zero_grad()
    with _watched(model, result):
        for batch in batches:
            there = batch.to(device)
            loss_BN = model(there.tokens, there.position_ids, there.labels, there.cu_seqlens)
            # not a product, in which what is masked could be NaN
            kept = loss_BN[there.loss_mask]
            (kept.sum() / targets).backward()
            result.samples += _sample_losses(loss_BN.detach().float().cpu()[0], batch, seq_length)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        result.gradient_norms[name] = 0.0 if gradient is None else gradient.float().norm().item()
    return result


def render(result: Replay) -> str:
    """The result as text for people, the largest losses and gradients first."""
    lines = ["", "sample         loss   document with the largest loss"]
    for sample in sorted(result.samples, key=lambda sample: _nan_as_infinity(sample.loss), reverse=True):
        start, end = sample.document
        lines.append(
            f"{sample.sample:<10} {sample.loss:8.4f}   tokens {start} to {end - 1}: {sample.document_loss:.4f}"
        )
    groups: dict[str, list[str]] = {}
    for name in result.gradient_norms:
        groups.setdefault(_group_of(name), []).append(name)
    norms = {
        group: math.hypot(*(result.gradient_norms[name] for name in names)) for group, names in groups.items()
    }
    lines += ["", f"gradient norm {result.gradient_norm:.4g}, by group; its largest parameter"]
    for group, norm in sorted(norms.items(), key=lambda pair: _nan_as_infinity(pair[1]), reverse=True):
        largest = max(groups[group], key=lambda name: _nan_as_infinity(result.gradient_norms[name]))
        lines.append(f"{norm:10.4g}  {group}; {largest} {result.gradient_norms[largest]:.4g}")
    module = result.first_module
    lines.append("")
    lines.append(
        f"first module with an output that is not finite: {module}" if module else "every output is finite"
    )
    if not result.is_finite and not module:
        lines.append("losses or gradients are not finite although the outputs of all modules are")
    return "\n".join(lines)


def _load_model(run_dir: str | Path, step: int, device: torch.device) -> tuple[DashGPTModel, Config, str]:
    """The model with the weights nearest to those that met the batch, its config, and where these come from."""
    earlier = [saved for saved in finished_steps(run_dir) if saved <= step]
    if earlier:
        config, saved, weights = load_weights(run_dir, earlier[-1])
        config = config.model_copy(update={"parallel": ParallelConfig()})
        model = build_model(config, weights["embedding.word_embeddings.weight"].shape[0], device)
        model.load_state_dict(weights, strict=False)
        origin = f"weights of step {saved}"
    else:
        config = load_config(Path(run_dir) / "config.yaml", ["parallel={}"])
        vocab_size = config.padded_vocabulary(Tokenizer(str(config.data.tokenizer)).vocab_size)
        model = build_model(config, vocab_size, device)
        init_weights(model, config.training.seed, config.model.init_std)
        if config.training.init_from:
            load_initial_weights(model, config.training.init_from, config.model)
        origin = f"initial weights, as there is no checkpoint at or before step {step}"
    if config.training.precision == "bf16":
        model.bfloat16()
    return model, config, origin


@contextlib.contextmanager
def _watched(model: torch.nn.Module, result: Replay) -> Iterator[None]:
    """Note the first module with a non-finite output; inner modules end before the outer ones."""

    def hook(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
            if result.first_module is None and not all(x.isfinite().all() for x in tensors):
                result.first_module = name or "the model"

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample_losses(loss_T: Tensor, batch: PackedBatch, seq_length: int) -> list[SampleLoss]:
    mask_T, bounds = batch.loss_mask[0], batch.cu_seqlens.tolist()
    losses = []
    for row, sample in enumerate(batch.sample_ids):
        first, last = row * seq_length, (row + 1) * seq_length
        cuts = [first, *(bound for bound in bounds if first < bound < last), last]
        documents = [
            ((start - first, end - first), _mean(loss_T[start:end], mask_T[start:end]))
            for start, end in itertools.pairwise(cuts)
        ]
        document, worst = max(documents, key=lambda pair: _nan_as_infinity(pair[1]))
        losses.append(SampleLoss(sample, _mean(loss_T[first:last], mask_T[first:last]), document, worst))
    return losses


def _mean(loss: Tensor, mask: Tensor) -> float:
    return loss[mask].mean().item() if mask.any() else 0.0


def _nan_as_infinity(value: float) -> float:
    """A value to sort by, in which NaN counts as infinite."""
    return value if math.isfinite(value) else math.inf


def _group_of(name: str) -> str:
    """The group that a parameter is reported in: `decoder.layers.3.mlp` within a layer, else the first part of its name."""
    parts = name.split(".")
    return ".".join(parts[:4]) if parts[:2] == ["decoder", "layers"] else parts[0]
