"""A short run on the GPUs at hand, measured, against what the model of step times says of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from dash_megatron.config import load_config
from dash_megatron.planning.layout import Hardware
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.search import estimate_configured

# The first logged line has compilation in it.
MIN_LINES = 3


@dataclass(frozen=True)
class Profile:
    """Seconds of a step and GiB of a GPU, measured and modelled."""

    run_dir: str
    processes: int
    density: float | None
    seconds: float
    modelled_seconds: float
    memory_gib: float
    modelled_memory_gib: float
    modelled_states_gib: float
    """The part of `modelled_memory_gib` whose bytes are known: weights, gradients, optimizer and buffers."""

    @property
    def factor(self) -> float:
        """How many times longer a step took than modelled."""
        return self.seconds / self.modelled_seconds

    @property
    def activation_factor(self) -> float:
        """Memory beyond `modelled_states_gib`, measured over modelled."""
        kept = self.memory_gib - self.modelled_states_gib
        # less than the states themselves was not measured on the layout that the config says
        return max(0.1, kept / (self.modelled_memory_gib - self.modelled_states_gib))

    def __str__(self) -> str:
        density = "" if self.density is None else f" at density {self.density:.0%}"
        return (
            f"{self.run_dir} on {self.processes} GPUs{density}: {self.seconds:.3f} s a step, modelled "
            f"{self.modelled_seconds:.3f}, so that compute counts {self.factor:.2f} times as long; memory {self.memory_gib:.1f} "
            f"GiB, modelled {self.modelled_memory_gib:.1f}, so that activations count {self.activation_factor:.2f} times"
        )


def read_profile(run_dir: str | Path, hardware: Hardware) -> Profile:
    """Compare a run with its model.

    Time is the median over the logged lines but the first; density their mean; the rest of routing as `AssumedRouting` assumes.

    Args:
        run_dir: a run of `train.py` that has logged some lines, with `model.vocab_size` in its config.
        hardware: as it is modelled.

    Raises:
        FileNotFoundError: the folder has no run.
        ValueError: it has logged too little, or by an older release, or trained on CPUs.
    """
    # imports torch, which nothing else of a plan needs
    from dash_megatron.training.metrics import read_metrics

    lines = read_metrics(run_dir)
    if len(lines) < MIN_LINES or "processes" not in lines[-1]:
        raise ValueError(
            f"--profile {run_dir} has {len(lines)} logged lines and must have {MIN_LINES} or more of this release; train "
            "anew with training.steps=20 logging.every=5 schedule.warmup_steps=0"
        )
    config = load_config(Path(run_dir) / "config.yaml")
    processes, lines = lines[-1]["processes"], lines[1:]
    densities = [line["density"] for line in lines if line["density"] is not None]
    density = statistics.fmean(densities) if densities else None
    routing = AssumedRouting() if density is None else AssumedRouting(density=density, peak_density=density)
    estimate = estimate_configured(config, processes, routing, hardware)
    tokens = config.training.global_batch * config.data.seq_length
    use = estimate.memory
    memory = [line["gpu_memory_gib"] for line in lines if line["gpu_memory_gib"] is not None]
    if not memory:
        raise ValueError(
            f"--profile {run_dir} trained on CPUs and must be a run on GPUs, whose speed it is to tell"
        )
    return Profile(
        run_dir=str(run_dir),
        processes=processes,
        density=density,
        seconds=tokens / statistics.median(line["tokens_per_second"] for line in lines),
        modelled_seconds=estimate.seconds,
        memory_gib=max(memory),
        modelled_memory_gib=use.total / 2**30 - hardware.reserved_gib,
        modelled_states_gib=use.states / 2**30,
    )
