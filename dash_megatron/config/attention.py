"""Section `attention`."""

from __future__ import annotations

import bisect
import math
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, model_validator

from dash_megatron.config.section import Section
from dash_megatron.config.topk import InfLLMv2Config, NSAConfig

Kind = Literal["dash", "full", "infllmv2", "nsa"]


class AttentionConfig(Section):
    """The core attention of every layer, and the constants of DashAttention (arXiv 2605.18753)."""

    kind: Kind = "dash"
    """`dash` is DashAttention; `full` trains the dense twin of the same config; `infllmv2` and `nsa` train twins that attend
    to a fixed number of chunks, without a Hugging Face export, and `nsa` without context parallelism."""
    chunk_size: Literal[16, 32, 64, 128] = 64
    """Tokens summarized into one routing key. Smaller chunks are selected more precisely and take attention longer. One
    token stands out from the mean of C tokens by about sqrt(head_dim / C)."""
    scaling_factor: float | tuple[float, ...] = Field(default=1.0, examples=["2.0", "[2.0, 3.0, ...]"])
    """Multiplies the routing scores before entmax and must be above 0; larger values select fewer chunks. A list has one
    factor for each layer."""
    learned_scaling: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Above 0, a factor on the routing scores is learned for each kv head of each layer. It is
    `exp(learned_scaling * parameter)`, starts at 1 and multiplies `scaling_factor`. The number says how fast it moves beside
    the other weights (1 is `true` of earlier releases); weight decay keeps it within about exp(-3.3) and exp(3.3). 20 was
    tried with learning rates from 3e-4 to 1e-3."""
    target_density: float | tuple[float, ...] | dict[int, float | tuple[float, ...]] | None = Field(
        default=None, examples=["0.25", "[0.25, 0.5, ...]", "{0: 1.0, 2000: 0.25}"]
    )
    """Share of the causally available chunks to be selected, over all tokens together, above 0 and up to 1: about the share
    of full attention's pairs that is attended to. The scaling factor of each layer is moved, starting from
    `scaling_factor`, until its router selects that share. A list has one target for each layer. A schedule, such as
    `{0: 1.0, 2000: 0.25}`, gives targets by step, with straight lines between them. Every query head of a group selects at
    least one past chunk, and all heads of the group attend to what any of them selects: a target near
    (1 + local_chunks + heads / kv_heads) chunks a token leaves the router no choice; with `pool_heads` the last term is 1."""
    density_budget: Literal["layer", "model"] = "layer"
    """Whose density `target_density` holds. With `layer` every layer selects its target. With `model` the mean over layers is
    held: the scaling factors of all layers move in proportion, and layers may share the budget as they train, most of all
    with `learned_scaling`."""
    local_chunks: int = Field(default=0, ge=0)
    """Chunks just before its own that every token attends to whatever the router says, with prior 0; the router selects
    among those before them. They count in the density. Chunks of 32 with 4 of them and `query_pool: 16` ended 0.9% above
    full attention's training loss at a density of 25%, the defaults 2.4% (62M parameters, 16K)."""
    query_pool: int = Field(default=1, ge=1, le=128)
    """The router sees the mean of so many queries: the token's own and those just before it in its document; 1 takes its
    own alone. Neighbours then select alike: with 16, kernels visited 1.5 times the chunks that tokens selected instead of
    2.9, and training loss was 0.6% lower (62M parameters, 16K)."""
    pool_heads: bool = False
    """The router sees one query a group, the mean of those of its heads: one entmax instead of one a head. With
    `query_pool: 16` tiles of 32 tokens visited 1.24 times the chunks that tokens selected instead of 1.36, at equal loss."""
    router_projections: bool = False
    """Give the router projections of its own, which make one query and one key for each kv head and token. Summaries are
    then made of these keys, `query_pool` averages these queries, and the router's gradient reaches the hidden states
    through them alone. Needs `pool_heads`. Turn it on in a run that starts from weights without such projections: there a
    key begins as attention's, and a query as the mean of its group's. From random weights, with `learned_scaling` and the
    shared budget, it costs 1.7 to 2% of training loss (62M parameters, 2K). Layers without DashAttention, by `kind` or
    `full_layers`, have no such projections."""
    sigma: float = Field(default=2.0, gt=0)
    """Temperature of the router's prior on the softmax: a larger one flattens the prior. The router's gradient is bounded
    up to 1 / (alpha - 1), which is 2 with an `alpha` of 1.5, and 1 with an `alpha` of 2."""
    estimate_diagonal: bool = True
    """Centre the log prior on its mean over the selected past chunks, so that the token's own chunk has prior 0."""
    alpha: float = Field(default=1.5, gt=1, le=2)
    """The α of α-entmax: near 1 it is close to softmax (dense), 2 is sparsemax; 1.5 has the fastest kernels."""
    full_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that use full attention although `kind` is another."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Implementation of sparse attention: pure torch (`reference`), Triton kernels (`triton`), or Triton on CUDA where it is
    installed and pure torch elsewhere (`auto`)."""
    infllmv2: InfLLMv2Config = Field(default_factory=InfLLMv2Config)
    """Which chunks `kind: infllmv2` selects. Its fields are below."""
    nsa: NSAConfig = Field(default_factory=NSAConfig)
    """Which chunks `kind: nsa` selects. Its fields are below."""

    @property
    def fixed_lists(self) -> InfLLMv2Config | None:
        """The section of a kind by which a token attends to a fixed number of chunks; None of other kinds."""
        return {"infllmv2": self.infllmv2, "nsa": self.nsa}.get(self.kind)

    def kind_of(self, layer: int) -> Kind:
        """What a layer, counted from 0, computes."""
        return "full" if layer in self.full_layers else self.kind

    def sparse_layers(self, layers: int) -> list[int]:
        """Those of `layers` layers that do not use full attention."""
        return [layer for layer in range(layers) if self.kind_of(layer) != "full"]

    def has_router_projections(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has the router's own projections."""
        return self.router_projections and self.kind_of(layer) == "dash"

    def learned(self, layer: int) -> tuple[str, ...]:
        """Settings that give attention of a layer, counted from 0, weights of its own: a run that starts from such weights needs them too."""
        kind = f"attention.kind={self.kind}"
        match self.kind_of(layer):
            case "full" | "infllmv2":
                return ()
            case "nsa":
                return kind, f"attention.nsa.kernel_size={self.nsa.kernel_size}"
            case "dash":
                scaling = ("attention.learned_scaling above 0",) if self.learned_scaling else ()
                projections = ("attention.router_projections=true",) if self.router_projections else ()
                return kind, *scaling, *projections

    def layer_scaling_factor(self, layer: int) -> float:
        """`scaling_factor` of a layer, counted from 0."""
        return self.scaling_factor[layer] if isinstance(self.scaling_factor, tuple) else self.scaling_factor

    def target_density_at(self, step: int, layer: int) -> float | None:
        """`target_density` of a layer, counted from 0, after `step` finished steps; None where there is no target."""
        if not isinstance(self.target_density, dict):
            return _of_layer(self.target_density, layer)
        steps = sorted(self.target_density)
        after = bisect.bisect_right(steps, step)
        before = steps[max(0, after - 1)]
        first = _of_layer(self.target_density[before], layer)
        if first is None or after in (0, len(steps)):
            return first
        second = _of_layer(self.target_density[steps[after]], layer)
        assert second is not None
        return first + (second - first) * (step - before) / (steps[after] - before)

    def final_density(self, layers: int) -> float | None:
        """The last `mean_target_density`."""
        last = max(self.target_density, default=0) if isinstance(self.target_density, dict) else 0
        return self.mean_target_density(last, layers)

    def mean_target_density(self, step: int, layers: int) -> float | None:
        """The mean of `target_density_at` a step over those of `layers` layers that route; None where there is no target."""
        targets = [self.target_density_at(step, layer) for layer in self.sparse_layers(layers)]
        known = [target for target in targets if target is not None]
        return fmean(known) if known else None

    def _check_target(self) -> None:
        target = self.target_density
        if isinstance(target, dict) and (not target or min(target) < 0):
            raise ValueError(
                f"attention.target_density={target} must name steps from 0 on, such as {{0: 1.0, 2000: 0.25}}"
            )
        if not all(0 < number <= 1 for numbers in self._targets() for number in numbers):
            raise ValueError(
                f"attention.target_density={target} must be above 0 and at most 1, such as 0.25; null leaves densities alone"
            )
        if target is not None and self.kind != "dash":
            raise ValueError(
                f"attention.target_density={target} needs a router: set attention.kind=dash, or "
                "attention.target_density=null"
            )

    @model_validator(mode="before")
    @classmethod
    def _accept_earlier_releases(cls, tree: Any) -> Any:
        """Accept what runs of earlier releases wrote: `length_scaling`, which was taken out, where it was off; `learned_scaling: true` as 1."""
        if not isinstance(tree, dict):
            return tree
        if tree.get("length_scaling"):
            raise ValueError(
                f"attention.length_scaling={tree['length_scaling']} was taken out, as it gained nothing "
                "(docs/results/quality.md); leave it out, or go on with a run that has it in the code whose commit its config.yaml names"
            )
        kept = {key: value for key, value in tree.items() if key != "length_scaling"}
        if isinstance(tree.get("learned_scaling"), bool):
            kept["learned_scaling"] = float(tree["learned_scaling"])
        return kept

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        self._check_target()
        factors = self.scaling_factor if isinstance(self.scaling_factor, tuple) else (self.scaling_factor,)
        if not all(0 < factor < math.inf for factor in factors):
            raise ValueError(f"attention.scaling_factor={self.scaling_factor} must be above 0, such as 1.0")
        if self.router_projections and not self.pool_heads:
            raise ValueError(
                "attention.pool_heads=False must be true with attention.router_projections=true, which make one query for the "
                "heads of a group; use attention.pool_heads=true"
            )
        if self.fixed_lists:
            self.fixed_lists.check_chunks(self.chunk_size, f"attention.{self.kind}.")
        return self

    def check_density(self, seq_length: int) -> None:
        """Refuse targets below what `local_chunks` leave: these, the own chunk, and one that the router always selects.

        Args:
            seq_length: tokens of the longest document; shorter ones have a larger share always on.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        # of a budget that layers share, the mean is held
        share = fmean if self.density_budget == "model" else min
        routing = [
            [
                target
                for layer, target in enumerate(targets)
                if len(targets) == 1 or layer not in self.full_layers
            ]
            for targets in self._targets()
        ]
        asked = min((share(targets) for targets in routing if targets), default=None)
        if asked is None or not self.local_chunks:
            return
        chunks = -(-seq_length // self.chunk_size)

        def least(local: int) -> float:
            # over the tokens' numbers of past chunks, 0 to chunks - 1, the sum of those that are on, and of the own ones
            most = min(chunks, local + 1)
            on = most * (most - 1) // 2 + (chunks - most) * (local + 1)
            return (on + chunks) / (chunks * (chunks + 1) / 2)

        if asked < least(self.local_chunks):
            fitting = bisect.bisect_right(range(min(self.local_chunks, chunks)), asked, key=least) - 1
            remedy = (
                f"ask for more, or use attention.local_chunks={fitting}" if fitting >= 0 else "ask for more"
            )
            # rounded up, as what a message names has to be accepted
            at_least = math.ceil(1e4 * least(self.local_chunks)) / 1e4
            raise ValueError(
                f"attention.target_density={self.target_density} must be at least {at_least} with "
                f"attention.local_chunks={self.local_chunks}: a document of data.seq_length={seq_length} tokens has {chunks} "
                f"chunks, and each token attends to its own, to those before it that are always on, and to one that is "
                f"selected; {remedy}"
            )

    def _targets(self) -> list[tuple[float, ...]]:
        """The numbers of each step that `target_density` names: one for all layers, or one for each."""
        values = [value for value in self._target_values() if value is not None]
        return [value if isinstance(value, tuple) else (value,) for value in values]

    def _target_values(self) -> list[float | tuple[float, ...] | None]:
        target = self.target_density
        return list(target.values()) if isinstance(target, dict) else [target]

    def check_layers(self, layers: int) -> None:
        """Refuse layers that the model does not have, and lists of another length than its number of layers.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        wrong = [index for index in self.full_layers if not 0 <= index < layers]
        if wrong:
            raise ValueError(
                f"attention.full_layers={list(self.full_layers)} names layer {wrong[0]}, but model.layers={layers}: layers "
                f"are counted from 0 to {layers - 1}"
            )
        targets = [("target_density", value) for value in self._target_values()]
        for name, values in [("scaling_factor", self.scaling_factor), *targets]:
            if isinstance(values, tuple) and len(values) != layers:
                raise ValueError(
                    f"attention.{name} lists {len(values)} numbers and must list model.layers={layers}, or be one number "
                    "for all layers"
                )


def _of_layer(value: float | tuple[float, ...] | None, layer: int) -> float | None:
    return value[layer] if isinstance(value, tuple) else value
