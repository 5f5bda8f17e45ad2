"""The training loop: one run, from a checked config to its last checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from dash_megatron.checkpoint.folder import agreed_steps, finished_steps
from dash_megatron.checkpoint.loading import load_newest
from dash_megatron.checkpoint.saving import Checkpointer
from dash_megatron.config import Config
from dash_megatron.config.flops import parameter_count
from dash_megatron.data.batches import PackedBatch
from dash_megatron.data.blend import unigram_entropy
from dash_megatron.exit_codes import ExitCode
from dash_megatron.layers import build_model, dash_layers, init_weights
from dash_megatron.ops.fingerprint import implementation_fingerprint
from dash_megatron.parallel import context_rank, data_rank, init_process_groups, read_launch, tensor_group
from dash_megatron.retry import make_writable_folder
from dash_megatron.training.density import DensityController
from dash_megatron.training.engine import Engine
from dash_megatron.training.faults import Fault, Guard, fault_folder, write_fault
from dash_megatron.training.health import BusyTime, CollapseAlarm, Watchdog
from dash_megatron.training.initial import load_initial_weights
from dash_megatron.training.loss import global_target_tokens, share_of_global_mean
from dash_megatron.training.meter import Meter, StepTotals
from dash_megatron.training.metrics import MetricsWriter, console_line, read_metrics
from dash_megatron.training.probe import check_probe, probe_loss
from dash_megatron.training.routing import RoutingProbe
from dash_megatron.training.schedule import learning_rate
from dash_megatron.training.setup import (
    check_same_implementation,
    code_commit,
    device_name,
    load_tokenizer,
    seed_everything,
    set_up_logging,
    write_config,
)
from dash_megatron.training.sources import batch_source, open_rows
from dash_megatron.training.stop import Halted, StopSignals, agree
from dash_megatron.training.validation import Validation, Validator

logger = logging.getLogger(__name__)


class NonFiniteError(Halted):
    """The loss or the gradient is no number, or a spike; nothing of the step was saved."""


class Trainer:
    """One run of one process.

    Args:
        config: a checked config.
        environment: variables of the launcher (torchrun, srun, or none).

    Raises:
        ValueError, FileNotFoundError: the config does not fit the processes, the data or an earlier start of the run.
    """

    def __init__(self, config: Config, environment: Mapping[str, str] = os.environ) -> None:
        self.config = config
        self.signals = StopSignals()
        self.stopping = self.rolled_back = False
        launch = read_launch(environment)
        self.data_parallel_size = config.data_parallel_size(launch.world_size)
        self.accumulation_steps = config.accumulation_steps(launch.world_size)
        self.tokenizer = load_tokenizer(config)
        self.vocab_size = config.padded_vocabulary(self.tokenizer.vocab_size)
        make_writable_folder(config.run_dir, "run_dir")
        seed_everything(config.training.seed)
        hang_minutes = config.faults.hang_minutes
        # not shorter than the watchdog, which shows where a process hangs; some minutes are needed to come together
        self.device = init_process_groups(launch, config.parallel, max(5.0, hang_minutes or 30.0))
        self.is_main = dist.get_rank() == 0
        set_up_logging(self.is_main)
        fingerprint = implementation_fingerprint()
        check_same_implementation(fingerprint)
        num_samples = config.training.steps * config.training.global_batch
        self.train_source = batch_source(
            config,
            open_rows(config, "train", num_samples, self.tokenizer),
            self.tokenizer.eod,
            self.device,
            num_workers=config.data.num_workers,
            max_context=config.data.context_length_at,
        )
        self.validator = Validator(config, self.tokenizer, self.device)
        model = build_model(config, self.vocab_size, self.device)
        init_weights(model, config.training.seed, config.model.init_std)
        earlier = None
        if config.training.init_from and not agreed_steps(config.run_dir):
            earlier = load_initial_weights(model, config.training.init_from, config.model)
        self.engine = Engine(model, config, self.data_parallel_size * config.parallel.context)
        self.commit = code_commit()
        about = {"commit": self.commit, "implementation": fingerprint, "device": device_name(self.device)}
        self.checkpointer = Checkpointer(self.engine, config, about)
        self.step = 0
        self.guard = Guard(config.faults, config.training.global_batch)
        self.watchdog = Watchdog(hang_minutes)
        self.busy = BusyTime(self.device)
        self.collapse = CollapseAlarm(config.faults.collapse_steps)
        self.density = DensityController(config.attention, dash_layers(model))
        if earlier is not None:
            self.density.begin_as(earlier)
        self.routing = RoutingProbe(config.logging.routing_every if self.is_main else 0, dash_layers(model))

    def run(self) -> ExitCode:
        """Train from the newest checkpoint, or from scratch, to the last step, or until a signal asks to stop.

        Returns:
            DONE after the last step, REQUEUE where a signal stopped the run before; either way all of it is saved.

        Raises:
            ValueError, OSError: as in `start`.
            Halted: the run stopped itself.
        """
        self.start()
        return self.train()

    def start(self) -> None:
        """Load the newest checkpoint and open the reports.

        Raises:
            ValueError, OSError: the checkpoint is of another run, or files cannot be read or written.
        """
        self.watchdog.beat()
        self.resume()
        self.start_reporting()

    def train(self) -> ExitCode:
        """Take steps until the last one, or until a signal on any process; see `run`."""
        while self.step < self.config.training.steps and not self.stopping:
            self.watchdog.beat()
            totals, lr = self.train_step()
            if self.rolled_back:
                continue
            self.maybe_log(totals, lr, self.maybe_validate())
            self.watchdog.beat()
            self.maybe_save()
        self.watchdog.stop()
        self.finish_reporting()
        return ExitCode.DONE if self.step == self.config.training.steps else ExitCode.REQUEUE

    def resume(self) -> None:
        """Restore weights, optimizer, random state, step and data position: all or nothing."""
        stored = load_newest(self.engine, self.config)
        if stored is None:
            return
        self.load_state_dict(stored.facts["trainer"])
        if self.config.checkpoint.check_loss:
            loss = probe_loss(self.engine, self.train_source, stored.probe(), self.device)
            check_probe(loss, stored.facts["probe_loss"], self.config.training.precision, str(stored.folder))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run beside weights, optimizer and random state; the same on every process."""
        return {
            "step": self.step,
            "data": self.train_source.state_dict(),
            "faults": self.guard.state_dict(),
            "density": self.density.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place in the run that `state_dict` described."""
        self.step = state["step"]
        self.train_source.load_state_dict({"steps": self.step, **state["data"]})
        self.guard.load_state_dict(state["faults"])
        self.density.load_state_dict(state.get("density", {}))

    def start_reporting(self) -> None:
        """Write the resolved config, say what is about to run, and start the clock."""
        self.writer: MetricsWriter | None = None
        if self.is_main:
            write_config(self.config, self.commit)
            self.writer = MetricsWriter(self.config.run_dir, self.config.logging.tensorboard, self.step)
            print(self._introduction(), flush=True)
        self.meter = Meter(self.config, self.vocab_size, dist.get_world_size(), self.device)

    def finish_reporting(self) -> None:
        """Close the metrics; say how far the model is from one that knows token frequencies only."""
        if self.writer is None:
            return
        self.writer.close()
        if self.step < self.config.training.steps:
            print(f"stopped by a signal after step {self.step}; start again to go on", flush=True)
            return
        validated = [
            line["valid_loss"] for line in read_metrics(self.config.run_dir) if line["valid_loss"] is not None
        ]
        if validated:
            entropy = unigram_entropy(self.config.data.train)
            print(
                f"validation loss {validated[-1]:.3f}, unigram entropy of the corpus {entropy:.3f} (nats per token)"
            )

    def train_step(self) -> tuple[StepTotals, float]:
        """Read one global batch and update the weights; give back its totals and learning rate."""
        self.engine.module.train()
        first_sample = self.train_source.consumed_samples
        with self.busy.reading():
            batches = self.next_batches()
        targets = global_target_tokens(batches, self.device)
        lr = learning_rate(self.step, self.config)
        self.engine.set_lr(lr)
        totals = StepTotals(self.config.model.layers, self.device)
        self.step += 1
        fault = None
        for index, batch in enumerate(batches):
            batch = batch.to(self.device, non_blocking=True)
            with self.busy.computing(), self.routing.watching(self.step, index):
                loss = share_of_global_mean(self.engine.model, batch, targets)
            self.engine.backward(loss)
            totals.add(loss, batch, self.engine.module)
            if index == self.accumulation_steps - 1:
                totals.reduce()
                fault = self.guard.judge_loss(self.step, first_sample, totals.loss)
                self.engine.leave_out_update(fault is not None)
            # DeepSpeed counts micro-batches: step() updates only on the last
            self.engine.step()
        norm = self.engine.grad_norm()
        fault = fault or self.guard.judge_gradient(self.step, first_sample, totals.loss, norm)
        self.meter.count_step()
        self.busy.end_of_step()
        self.density.update(self.step, totals.densities)
        if self.config.attention.kind == "dash":  # no other choice is learned
            self.collapse.update(self.step, totals.densities, totals.chunks_selected)
        self.stopping = agree(self.signals.requested, fault is not None)
        self.rolled_back = fault is not None and self.handle(replace(fault, grad_norm=norm), batches)
        return totals, lr

    def next_batches(self) -> list[PackedBatch]:
        """Read this process's micro-batches of one step; all processes of one copy of the model read the same."""
        return [self.train_source.next_batch() for _ in range(self.accumulation_steps)]

    def handle(self, fault: Fault, batches: list[PackedBatch]) -> bool:
        """Keep the batch of an update that was left out, and follow the policy; True: an older checkpoint is loaded.

        Raises:
            NonFiniteError: the policy is to halt, or became so after too many in a row.
        """
        if fault.policy == "known":
            return False
        saved = finished_steps(self.config.run_dir)
        fault = replace(fault, checkpoint=saved[-1] if saved else None)
        if dist.get_rank(tensor_group()) == 0:
            write_fault(self.config.run_dir, fault, batches, data_rank(), context_rank(), self.is_main)
        kept = fault_folder(self.config.run_dir, fault.step)
        if fault.policy == "halt":
            self.checkpointer.finish()
            raise NonFiniteError(
                f"{fault}. The newest checkpoint is of step {fault.checkpoint}: resume from it with a lower "
                f"optimizer.lr, or look at the batch, kept in {kept}"
            )
        logger.warning("%s: update left out, batch kept in %s", fault, kept)
        if fault.policy == "skip":
            return False
        return self.roll_back()

    def roll_back(self) -> bool:
        """Load the newest checkpoint in place; False where there is none, and nothing is done."""
        bad = self.step
        self.checkpointer.finish()
        if not agreed_steps(self.config.run_dir):
            logger.warning("no checkpoint to go back to: the update is left out, and that is all")
            return False
        with self.meter.paused():
            self.resume()
        if self.writer is not None:
            self.writer.close()
            self.writer = MetricsWriter(self.config.run_dir, self.config.logging.tensorboard, self.step)
        logger.warning("back from step %d to the checkpoint of step %d", bad, self.step)
        return True

    def maybe_validate(self) -> Validation:
        """Validate, and score tasks, at steps that are to; collective."""
        with self.meter.paused():
            return self.validator.run(self.engine, self.step, self.watchdog.beat)

    def maybe_log(self, totals: StepTotals, lr: float, valid: Validation) -> None:
        """Report the first and last step, every `logging.every` steps, validations and routing; rank 0."""
        if self.writer is not None:
            self.routing.report(self.step, self.config.model.layers, self.writer)
        last = self.config.training.steps
        due = self.step in (1, last) or self.step % self.config.logging.every == 0
        if not due and valid == Validation():
            return
        self.meter.lap()
        slowest = self.busy.slowest()
        if self.writer is not None:
            self.busy.warn_of(*slowest, self.config.faults.straggler_ratio)
            skipped = self.guard.skipped(self.train_source.consumed_samples)
            norm, alarms = self.engine.grad_norm(), self.collapse.alarms
            factors = self.density.factors(self.config.model.layers)
            metrics = self.meter.measure(
                self.step, totals, lr, norm, valid, skipped, alarms, slowest, factors
            )
            self.writer.write(metrics)
            print(console_line(metrics, last, (last - self.step) * self.meter.seconds_per_step), flush=True)

    def save_is_due(self) -> bool:
        """Every `checkpoint.every` steps, at the end, and before stopping; alike on all processes."""
        every = self.config.checkpoint.every
        return self.finished or bool(every and not self.step % every)

    @property
    def finished(self) -> bool:
        """Whether the last step was made, or a signal asked to stop."""
        return self.stopping or self.step == self.config.training.steps

    def maybe_save(self) -> None:
        """Publish what has been written since the last step, and save where that is due; collective."""
        self.checkpointer.poll()
        if not self.save_is_due():
            return
        with self.meter.paused():
            row = {name: tensor.clone() for name, tensor in self.train_source.dataset[0].items()}
            loss = probe_loss(self.engine, self.train_source, row, self.device)
            self.checkpointer.save(self.step, self.state_dict(), row, loss)
            if self.finished:
                self.checkpointer.finish()

    def _introduction(self) -> str:
        config, training, parallel = self.config, self.config.training, self.config.parallel
        parameters = parameter_count(config, self.vocab_size)
        first = f"from {training.init_from}" if training.init_from else "from scratch"
        start = f"resuming after step {self.step}" if self.step else first
        return (
            f"{config.run_dir}: {parameters / 1e6:,.1f}M parameters, {config.attention.kind} attention, "
            f"{training.steps} steps of {training.global_batch} x {config.data.seq_length} tokens, {start}\n"
            f"{dist.get_world_size()} process(es) on {self.device.type}: {self.data_parallel_size} data x "
            f"{parallel.context} context x {parallel.tensor} tensor parallel, {self.accumulation_steps} "
            f"micro-batch(es) of {training.micro_batch} a step, ZeRO {config.zero.stage}, {training.precision}"
        )
