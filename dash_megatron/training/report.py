"""Reports of a run: lines on the console, `metrics.jsonl`, `routing.jsonl` and curves on trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch.profiler import record_function

from dash_megatron.config import Config
from dash_megatron.config.flops import parameter_count
from dash_megatron.data.blend import unigram_entropy
from dash_megatron.layers import DashCoreAttention
from dash_megatron.ops.backend import keep_triton_cache
from dash_megatron.training.health import BusyTime, CollapseAlarm
from dash_megatron.training.meter import Meter, StepResult
from dash_megatron.training.metrics import MetricsWriter, console_line, read_metrics
from dash_megatron.training.routing import RoutingProbe
from dash_megatron.training.setup import write_chat_template, write_config
from dash_megatron.training.trackers import Tracker, close_quietly, open_wandb
from dash_megatron.training.validation import Validation


class Reporter:
    """Measures a run's steps on all processes, and writes them down on rank 0.

    Args:
        config: the run.
        vocab_size: rows of the output projection.
        layers: core attentions with a router by layer, counted from 0.
        device: what this process computes on.
    """

    def __init__(
        self, config: Config, vocab_size: int, layers: Mapping[int, DashCoreAttention], device: torch.device
    ) -> None:
        self.config, self.vocab_size, self.device = config, vocab_size, device
        self.is_main = dist.get_rank() == 0
        self.busy = BusyTime(device)
        self.collapse = CollapseAlarm(config.faults.collapse_steps)
        self.routing = RoutingProbe(config.logging.routing_every if self.is_main else 0, layers)
        self.meter = Meter(config, vocab_size, dist.get_world_size(), device)
        self.writer: MetricsWriter | None = None
        self._awaits_first_step = False
        self.trackers: list[Tracker] = []

    def start(self, step: int, commit: str) -> None:
        """Write the resolved config, say what is about to run, and start the clock.

        Args:
            step: finished steps; later lines of an earlier start are dropped.
            commit: of the code that runs.
        """
        if self.is_main:
            write_config(self.config, commit)
            write_chat_template(self.config)
            wandb = open_wandb(self.config)
            self.trackers = [] if wandb is None else [wandb]
            self.open(step)
            print(introduction(self.config, self.vocab_size, step, self.device), flush=True)
            self._awaits_first_step = self.device.type == "cuda"
            if self._awaits_first_step:
                print(f"first step: compiling the kernels that are not in {keep_triton_cache()}", flush=True)
        self.meter.start()

    def open(self, step: int) -> None:
        """On rank 0: open the files to go on after a step; lines of later steps are dropped."""
        self.close()
        if self.is_main:
            self.writer = MetricsWriter(
                self.config.run_dir, self.config.logging.tensorboard, step, self.trackers
            )

    def close(self) -> None:
        """Close the files, if they are open."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    @contextlib.contextmanager
    def watching_forward(self, step: int, micro_batch: int) -> Iterator[None]:
        """Time the forward pass within, and measure its routers where that is due."""
        with record_function("forward"), self.busy.computing(), self.routing.watching(step, micro_batch):
            yield

    def count_step(self, result: StepResult) -> None:
        """Count a finished step in times and alarms; the device must have finished it."""
        self.meter.count_step()
        if self._awaits_first_step:
            self._awaits_first_step = False
            print(f"first step done after {self.meter.seconds_since_lap():.1f} s", flush=True)
        self.busy.end_of_step()
        if self.config.attention.kind == "dash":  # no other router is learned
            self.collapse.update(result.step, result.totals.densities, result.totals.chunks_selected)

    def log(self, result: StepResult, valid: Validation) -> None:
        """Report the first and last step, every `logging.every` steps, validations and routing; collective."""
        if self.writer is not None:
            self.routing.report(result.step, self.config.model.layers, self.writer)
        step, last = result.step, self.config.training.steps
        if not (step in (1, last) or step % self.config.logging.every == 0 or valid != Validation()):
            return
        self.meter.lap()
        slowest = self.busy.slowest()
        if self.writer is None:
            return
        self.busy.warn_of(*slowest, self.config.faults.straggler_ratio)
        metrics = self.meter.measure(result, valid, alarms=self.collapse.alarms, slowest=slowest)
        self.writer.write(metrics)
        print(console_line(metrics, last, (last - step) * self.meter.seconds_per_step), flush=True)

    def finish(self, step: int) -> None:
        """Close the metrics; say how far the model is from one that knows token frequencies only."""
        if self.writer is None:
            return
        self.close()
        for tracker in self.trackers:
            close_quietly(tracker)
        if step < self.config.training.steps:
            print(f"stopped by a signal after step {step}; start again to go on", flush=True)
            return
        losses = [line["valid_loss"] for line in read_metrics(self.config.run_dir)]
        validated = [loss for loss in losses if loss is not None]
        if validated:
            entropy = unigram_entropy(self.config.data.train)
            print(
                f"validation loss {validated[-1]:.3f}, unigram entropy of the corpus {entropy:.3f} (nats per token)"
            )


def introduction(config: Config, vocab_size: int, step: int, device: torch.device) -> str:
    """Two lines for people: the run and its model, and how processes share the work."""
    training, parallel, processes = config.training, config.parallel, dist.get_world_size()
    parameters = parameter_count(config, vocab_size)
    first = f"from {training.init_from}" if training.init_from else "from scratch"
    start = f"resuming after step {step}" if step else first
    return (
        f"{config.run_dir}: {parameters / 1e6:,.1f}M parameters, {config.attention.kind} attention, "
        f"{training.steps} steps of {training.global_batch} x {config.data.seq_length} tokens, {start}\n"
        f"{processes} process(es) on {device.type}: {config.data_parallel_size(processes)} data x "
        f"{parallel.context} context x {parallel.tensor} tensor parallel, {config.accumulation_steps(processes)} "
        f"micro-batch(es) of {training.micro_batch} a step, ZeRO {config.zero.stage}, {training.precision}"
    )
