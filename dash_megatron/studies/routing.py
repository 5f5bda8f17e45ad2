"""`study routing`: which chunks the routers of a checkpoint select in one long document."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dash_megatron.checkpoint.folder import tag_of
from dash_megatron.checkpoint.weights import load_weights, stored_tokenizer, whole_model
from dash_megatron.config import Config
from dash_megatron.data.blend import blend_prefixes
from dash_megatron.evaluation.text import LocalText
from dash_megatron.files import write_whole
from dash_megatron.layers import DashCoreAttention, DashGPTModel, dash_layers
from dash_megatron.ops.diagnostics import (
    MEASURES,
    NEAR_THRESHOLD,
    WEIGHT_BINS,
    RoutingSamples,
    SelectionMap,
    listed_share,
    sample_routing,
    selection_map,
)
from dash_megatron.ops.routing_rows import selected_chunks
from dash_megatron.planning.choices import tile_tokens
from dash_megatron.planning.table import table
from dash_megatron.training.routing import layer_record

# Queries measured in the document: the curves are smooth, and a model of 32 layers takes minutes on a GPU at 128K.
QUERIES = 1024

Observe = Callable[[int, DashCoreAttention, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]


@dataclass(frozen=True)
class OpenedRun:
    """A checkpoint's whole weights on one process, and the longest document of its validation data."""

    run: str
    """Name of its folder."""
    step: int
    config: Config
    model: DashGPTModel
    device: torch.device
    document: np.ndarray
    """int64 [tokens], cut to the length asked for."""
    whole_length: int
    """Tokens of the document before."""

    @property
    def name(self) -> str:
        """Name of the run and its step, for titles."""
        return f"{self.run} step {self.step}"

    @torch.no_grad()
    def observe(self, observe: Observe) -> None:
        """Run the document through the model, and show what each layer routes with.

        Args:
            observe: called with the layer's number from 0, its core attention, queries [1, N, Hq, D] and keys
                [1, N, Hkv, D] after RoPE, the summary query [Hkv, D], and the router's own queries and keys
                [1, N, Hkv, D], or None both.
        """
        cores = dash_layers(self.model)
        for layer, core in cores.items():
            core.observer = lambda q, k, w, _, *own, at=layer, core=core: observe(at, core, q, k, w, *own)
        tokens = torch.from_numpy(self.document)[None].to(self.device)
        try:
            self.model(tokens, torch.arange(tokens.shape[1], device=self.device)[None])
        finally:
            for core in cores.values():
                core.observer = None


@contextmanager
def open_run(
    run_dir: str | Path, step: int | None = None, length: int | None = None, device: str = "auto"
) -> Iterator[OpenedRun]:
    """Load a run whose layers have routers, of any layout, on one process.

    Args:
        run_dir: the run's folder.
        step: which checkpoint; None: the newest.
        length: most tokens of the document; None: `data.seq_length`.
        device: `auto` (the GPU where there is one), `cpu` or `cuda`.

    Raises:
        FileNotFoundError: the run has no such checkpoint, or its data is gone.
        ValueError: it has no router or no validation data, or an argument breaks a rule.
    """
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"--device {device} must be auto, cpu, or cuda where there is a GPU; leave it out to take what is there"
        )
    if length is not None and length < 1:
        raise ValueError(f"--length {length} must be at least 1; leave it out to take data.seq_length")
    config, step, weights = load_weights(run_dir, step)
    _check_routes(run_dir, config)
    document, whole_length = _longest_document(run_dir, config, step, length or config.data.seq_length)
    with whole_model(config, weights, on_cpu=device == "cpu") as (model, place):
        model.post_process = False  # hidden states are enough: nobody asks for logits
        yield OpenedRun(Path(run_dir).resolve().name, step, config, model, place, document, whole_length)


def _check_routes(run_dir: str | Path, config: Config) -> None:
    kind, full = config.attention.kind, config.attention.full_layers
    if kind != "dash" or not config.attention.sparse_layers(config.model.layers):
        raise ValueError(
            f"{run_dir} has no router: attention.kind={kind}, attention.full_layers={list(full)}; give a run with "
            "DashAttention in some layer"
        )


def _longest_document(run_dir: str | Path, config: Config, step: int, length: int) -> tuple[np.ndarray, int]:
    prefixes = blend_prefixes(config.data.valid)
    if not prefixes:
        raise ValueError(f"{run_dir} has no validation data (data.valid is empty); set it in a run's config")
    text = LocalText.from_data(prefixes, stored_tokenizer(config, step), length)
    longest = max(text.documents, key=len)
    document, least = longest[:length], 2 * config.attention.chunk_size + 1
    if len(document) < least:
        raise ValueError(
            f"the longest document of {text.name} has {len(longest)} tokens and --length is {length}; routing begins with "
            f"the third chunk of {config.attention.chunk_size} tokens, so both must be at least {least}"
        )
    return np.asarray(document, dtype=np.int64), len(longest)


def study_routing(
    run_dir: str | Path,
    *,
    step: int | None = None,
    output: str | Path | None = None,
    length: int | None = None,
    device: str = "auto",
    dump: str | Path | None = None,
) -> list[Path]:
    """Measure and draw a checkpoint's routers on the longest document of its validation data.

    Args:
        output: folder; None: `RUN_DIR/routing/step_...`.
        dump: a file that ends in .npz, for which chunks every token selected, in the format of `benchmarks/choices`; None: none.
        run_dir, step, length, device: as in `open_run`.

    Returns:
        The files written: routing.json, selected_chunks.npz, pictures, and the dump.

    Raises:
        FileNotFoundError, ValueError: as in `open_run`; a dump of another name.
    """
    if dump is not None and Path(dump).suffix != ".npz":
        raise ValueError(f"--dump {dump} must end in .npz; try {Path(dump).with_suffix('.npz')}")
    samples: dict[int, RoutingSamples] = {}
    maps: dict[int, SelectionMap] = {}
    listed: dict[int, dict[int, float]] = {}
    dumped: dict[str, np.ndarray] = {}

    def observe(
        layer: int, core: DashCoreAttention, q: Tensor, k: Tensor, w: Tensor,
        routing_q: Tensor | None, routing_k: Tensor | None,
    ) -> None:  # fmt: skip
        routed = q, k, w, core.router, routing_q, routing_k
        samples[layer] = sample_routing(*routed, max_queries=QUERIES)
        share, per_cell = selection_map(*routed)
        maps[layer] = SelectionMap(share.cpu(), per_cell)
        shares = listed_share(*routed)
        listed[layer] = {tile: round(float(share.mean()), 4) for tile, share in shares.items()}
        if dump is not None:
            dumped[f"layer_{layer}"] = pack_selected(selected_chunks(*routed), core.router.chunk_size)

    with open_run(run_dir, step, length, device) as run:
        run.observe(observe)
        report = _report(run, samples, maps, listed)
    folder = Path(output) if output else Path(run_dir) / "routing" / tag_of(run.step)
    write_whole(folder / "routing.json", json.dumps(report) + "\n", make_folder=True)
    shares: dict[str, Any] = {
        f"layer_{layer:02d}": found.share.half().numpy() for layer, found in maps.items()
    }
    np.savez_compressed(folder / "selected_chunks.npz", **shares)
    from dash_megatron.studies.routing_pictures import draw_routing

    drawn = draw_routing(report, {layer: found.share.numpy() for layer, found in maps.items()}, folder)
    written = [folder / "routing.json", folder / "selected_chunks.npz", *drawn]
    if dump is not None:
        Path(dump).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(dump, **dumped)  # type: ignore[arg-type]
        written.append(Path(dump))
    return written


def routing_table(report: dict[str, Any]) -> list[str]:
    """Lines for a terminal, one for each layer with a router and one of their means: the mean density of the kv heads, and how
    many times the pairs selected in past chunks the kernels' tiles visit.

    Args:
        report: as routing.json has it.
    """
    tile = report["tile_tokens"]
    rows: list[tuple[str, float, float]] = []
    for layer, record in enumerate(report["layers"]):
        if record is not None:
            selected, visited = record["listed"]["1"], record["listed"][str(tile)]
            ratio = visited / selected if selected else math.nan
            rows.append((str(layer), fmean(record["heads"]["density"]), ratio))
    rows.append(("mean", fmean(row[1] for row in rows), fmean(row[2] for row in rows)))
    columns = ("layer", "density", f"visited by tiles of {tile} tokens / selected")
    return table([(name, f"{density:.1%}", f"{ratio:.2f}") for name, density, ratio in rows], columns)


def pack_selected(selected_HNc: Tensor, chunk_size: int) -> np.ndarray:
    """Selected chunks in the format of `benchmarks/choices`, which has whole chunks only: a shorter last one is left out.

    Args:
        selected_HNc: of `selected_chunks`.
        chunk_size: tokens of a chunk.

    Returns:
        uint8 [heads, chunks, tokens / 8]: eight tokens to a byte, the earliest in the highest bit.
    """
    whole = selected_HNc.shape[1] // chunk_size
    return np.packbits(selected_HNc[:, : whole * chunk_size, :whole].transpose(1, 2).numpy(), axis=-1)


def _report(
    run: OpenedRun,
    samples: dict[int, RoutingSamples],
    maps: dict[int, SelectionMap],
    listed: dict[int, dict[int, float]],
) -> dict[str, Any]:
    attention, layers = run.config.attention, range(run.config.model.layers)
    some = next(iter(samples.values()))
    records: list[dict[str, Any] | None] = []
    for layer in layers:
        if layer in samples:
            shares = [[round(x, 5) for x in head] for head in samples[layer].weights.tolist()]
            records.append({**layer_record(samples[layer]), "weights": shares, "listed": listed[layer]})
        else:
            records.append(None)
    return {
        "run": run.name,
        "tokens": len(run.document),
        "document_tokens": run.whole_length,
        "trained_length": run.config.data.seq_length,
        "queries": len(some.token),
        "chunk_size": attention.chunk_size,
        "tile_tokens": tile_tokens(run.config.model.heads // run.config.model.kv_heads, attention.chunk_size),
        "sigma": attention.sigma,
        "alpha": attention.alpha,
        "local_chunks": attention.local_chunks,
        "query_pool": attention.query_pool,
        "pool_heads": attention.pool_heads,
        "router_projections": attention.router_projections,
        "scaling_factor": [attention.layer_scaling_factor(layer) for layer in layers],
        "measures": MEASURES,
        "near_threshold": NEAR_THRESHOLD,
        "edges": some.edges,
        "weight_bins": WEIGHT_BINS,
        "chunks_per_cell": next(iter(maps.values())).chunks_per_cell,
        "layers": records,
    }
