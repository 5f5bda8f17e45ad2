"""The training loop: one run, from a checked config to its last checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from dash_megatron.agreement import agreed
from dash_megatron.checkpoint.folder import agreed_steps, check_initial_folder, finished_steps
from dash_megatron.checkpoint.loading import load_newest
from dash_megatron.checkpoint.saving import Checkpointer
from dash_megatron.config import Config
from dash_megatron.data.batches import PackedBatch
from dash_megatron.data.blend import data_fingerprint
from dash_megatron.data.tokenizer import load_tokenizer
from dash_megatron.exit_codes import ExitCode
from dash_megatron.layers import build_model, dash_layers, init_weights
from dash_megatron.parallel import init_process_groups, read_launch
from dash_megatron.parallel.groups import pick_device
from dash_megatron.retry import make_writable_folder
from dash_megatron.training import setup
from dash_megatron.training.changes import describe_changes
from dash_megatron.training.density import DensityController
from dash_megatron.training.engine import Engine
from dash_megatron.training.faults import Fault, Guard, fault_folder, keep_fault
from dash_megatron.training.health import Watchdog
from dash_megatron.training.initial import load_initial_weights
from dash_megatron.training.loss import global_target_tokens, share_of_global_mean
from dash_megatron.training.meter import StepResult, StepTotals
from dash_megatron.training.owner import own_run_folder
from dash_megatron.training.probe import check_probe, probe_loss
from dash_megatron.training.report import Reporter
from dash_megatron.training.schedule import learning_rate
from dash_megatron.training.sources import open_rows, training_source
from dash_megatron.training.stop import Halted, StopSignals, agree_to_stop
from dash_megatron.training.trace import StepTracer
from dash_megatron.training.trackers import check_tensorboard, check_wandb
from dash_megatron.training.validation import Validation, Validator

logger = logging.getLogger(__name__)


class NonFiniteError(Halted):
    """The loss or the gradient is non-finite (NaN or inf), or a spike; nothing of the step was saved."""


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
        self.step = 0
        launch = read_launch(environment)
        self.accumulation_steps = config.accumulation_steps(launch.world_size)
        check_wandb(config)
        setup.check_backend(config.attention, pick_device(launch))
        self.tokenizer = load_tokenizer(config.data)
        self.vocab_size = config.padded_vocabulary(self.tokenizer.vocab_size)
        make_writable_folder(config.run_dir, "run_dir")
        check_tensorboard(config)
        setup.seed_everything(config.training.seed)
        hang_minutes = config.faults.hang_minutes
        # not shorter than the watchdog, which shows where a process hangs; some minutes are needed to come together
        self.device = init_process_groups(launch, config.parallel, max(5.0, hang_minutes or 30.0))
        self.is_main = dist.get_rank() == 0
        setup.set_up_logging(self.is_main)
        setup.warn_of_new_positions(config)
        self.owner = own_run_folder(config.run_dir)
        about = setup.about_this_code(self.device) | {"tokenizer": self.tokenizer.fingerprint}
        setup.check_same_implementation(about["implementation"])
        initial = None if agreed_steps(config.run_dir) else config.training.init_from
        if initial:
            # a wrong name is told before the rows of the data are ordered, which may take minutes
            agreed(lambda: check_initial_folder(initial))
        self.train_source = training_source(config, self.tokenizer, self.device)
        self.validator = Validator(config, self.tokenizer, self.device)
        model = build_model(config, self.vocab_size, self.device)
        init_weights(model, config.training.seed, config.model.init_std)
        routers = dash_layers(model)
        self.density = DensityController(config.attention, routers)
        if initial:
            earlier = load_initial_weights(model, initial, config.model, self.tokenizer)
            if earlier is not None:
                self.density.begin_as(earlier)
        self.engine = Engine(
            model, config, config.data_parallel_size(launch.world_size) * config.parallel.context
        )
        self.commit = about["commit"]
        self.about = about | {"data": agreed(lambda: data_fingerprint(config.data.train))}
        self.checkpointer = Checkpointer(self.engine, config, self.about)
        self.guard = Guard(config.faults, config.training.global_batch)
        self.watchdog = Watchdog(hang_minutes)
        self.reporter = Reporter(config, self.vocab_size, routers, self.device)
        self.tracer = StepTracer(config.logging.profile_steps, config.run_dir, dist.get_rank(), self.device)

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
        self.watchdog.tell_of(self.config.run_dir, self.reporter.busy.hosts)
        self.resume()
        self.reporter.start(self.step, self.commit)

    def train(self) -> ExitCode:
        """Take steps until the last one, or until a signal on any process; see `run`."""
        while self.step < self.config.training.steps and not self.stopping:
            self.watchdog.beat()
            with self.tracer.step(self.step + 1):
                result = self.train_step()
            if self.rolled_back:
                continue
            self.reporter.log(result, self.maybe_validate())
            self.watchdog.beat()
            self.maybe_save()
        self.watchdog.stop()
        self.tracer.close()
        self.reporter.finish(self.step)
        if self.owner is not None:
            self.owner.release()
        return ExitCode.DONE if self.step == self.config.training.steps else ExitCode.REQUEUE

    def train_step(self) -> StepResult:
        """Read one global batch and update the weights, unless its loss or gradient is wrong; collective."""
        self.engine.model.train()
        first_sample = self.train_source.consumed_samples
        with self.reporter.busy.reading():
            batches = [self.train_source.next_batch() for _ in range(self.accumulation_steps)]
        lr = learning_rate(self.step, self.config)
        self.engine.set_lr(lr)
        self.step += 1
        totals = self.forward_and_backward(batches)
        fault = self.guard.check_loss(self.step, first_sample, totals.loss)
        self.engine.skip_update(fault is not None)
        self.engine.step()
        norm = self.engine.grad_norm()
        fault = fault or self.guard.check_gradient(self.step, first_sample, totals.loss, norm)
        self.density.update(self.step, totals.densities)
        samples = self.train_source.consumed_samples
        factors = self.density.factors(self.config.model.layers)
        result = StepResult(self.step, totals, lr, norm, samples, self.guard.num_skipped(samples), factors)
        self.reporter.count_step(result)
        self.stopping = agree_to_stop(self.signals.requested, fault is not None)
        self.rolled_back = fault is not None and self.handle_fault(replace(fault, grad_norm=norm), batches)
        return result

    def forward_and_backward(self, batches: list[PackedBatch]) -> StepTotals:
        """Add up the gradients of a step's micro-batches, and give their loss and routing over all processes."""
        targets = global_target_tokens(batches, self.device)
        totals = StepTotals(self.config.model.layers, self.device)
        for index, batch in enumerate(batches):
            if index:
                # DeepSpeed counts micro-batches: the step's last call, which updates, is train_step's
                self.engine.step()
            batch = batch.to(self.device, non_blocking=True)
            with self.reporter.watching_forward(self.step, index):
                loss = share_of_global_mean(self.engine.forward, batch, targets)
            self.engine.backward(loss)
            totals.add(loss, batch, self.engine.model)
        totals.reduce()
        return totals

    def handle_fault(self, fault: Fault, batches: list[PackedBatch]) -> bool:
        """Keep the batch of a skipped update, and follow the policy; gives whether an older checkpoint was loaded.

        Raises:
            NonFiniteError: the policy is to halt, or became so after too many in a row.
        """
        if fault.policy == "known":
            return False
        saved = finished_steps(self.config.run_dir)
        fault = replace(fault, checkpoint=saved[-1] if saved else None)
        keep_fault(self.config.run_dir, fault, batches)
        kept = fault_folder(self.config.run_dir, fault.step)
        if fault.policy == "halt":
            self.checkpointer.finish()  # which may publish a newer one
            saved = finished_steps(self.config.run_dir)
            place = (
                f"The newest checkpoint is of step {saved[-1]}: resume from it" if saved else "Start again"
            )
            raise NonFiniteError(
                f"{fault}. {place} with a lower optimizer.lr, or look at the batch, kept in {kept}"
            )
        logger.warning("%s: update skipped, batch kept in %s", fault, kept)
        return fault.policy != "skip" and self.roll_back()

    def roll_back(self) -> bool:
        """Load the newest checkpoint into the engine; gives False where there is none, and does nothing then."""
        bad = self.step
        self.checkpointer.finish()
        if not agreed_steps(self.config.run_dir):
            logger.warning("no checkpoint to go back to: the update is skipped, and that is all")
            return False
        with self.reporter.meter.paused():
            self.resume()
        self.reporter.open(self.step)
        logger.warning("back from step %d to the checkpoint of step %d", bad, self.step)
        return True

    def maybe_validate(self) -> Validation:
        """Validate and score tasks, if this step is to; collective."""
        with self.reporter.meter.paused():
            return self.validator.run(self.engine, self.step, self.watchdog.beat)

    def maybe_save(self) -> None:
        """Publish what has been written since the last step; save every `checkpoint.every` steps and at the end; collective."""
        self.checkpointer.poll()
        every = self.config.checkpoint.every
        last = self.stopping or self.step == self.config.training.steps
        if not last and not (every and self.step % every == 0):
            return
        with self.reporter.meter.paused():
            row = {name: tensor.clone() for name, tensor in self.train_source.dataset[0].items()}
            loss = probe_loss(self.engine, self.train_source, row, self.device)
            self.checkpointer.save(self.step, self.state_dict(), row, loss)
            if last:
                self.checkpointer.finish()

    def resume(self) -> None:
        """Restore weights, optimizer, random state, step and data position from the newest checkpoint, if there is one."""
        stored = load_newest(self.engine, self.config)
        if stored is None:
            return
        stored.check_tokenizer(self.tokenizer)
        self.load_state_dict(stored.facts["trainer"])
        moved = bool(stored.facts["trainer"].get("density"))
        if told := describe_changes(stored.facts["config"], self.config, self.step, moved):
            logger.warning("%s", told)
        if stored.facts.get("about", {}).get("data", self.about["data"]) != self.about["data"]:
            logger.warning(
                "data.train=%s holds other data than when %s was saved: the run goes on at its sample number in another order, "
                "so that some samples are read twice, others never",
                list(self.config.data.train),
                stored.folder.name,
            )
        if self.config.checkpoint.check_loss:
            loss = probe_loss(self.engine, self.train_source, stored.probe(), self.device)
            check_probe(loss, stored.facts["probe_loss"], self.config.training.precision, str(stored.folder))

    def open_rows_left(self) -> None:
        """Open as many rows as are left to read, where earlier steps had larger batches than this start counted with; collective."""
        source, training = self.train_source, self.config.training
        num_samples = source.consumed_samples + (training.steps - self.step) * training.global_batch
        if num_samples > len(source.dataset):
            source.dataset = open_rows(self.config, "train", num_samples, self.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, optimizer and random state; the same on every process."""
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
        self.open_rows_left()
        self.guard.load_state_dict(state["faults"])
        self.density.load_state_dict(state.get("density", {}))
