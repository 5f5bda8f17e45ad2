"""A Llama-shaped decoder with DashAttention (arXiv 2605.18753), for transformers.

This file travels in the folder of exported weights and needs torch and transformers only. Where the package
dash_megatron can be imported, DashAttention on CUDA goes through its kernels, with a cache of its own.

It stays one file: transformers 5.5 knows what a model file imports by the folder's name alone, so that a process that
loads two folders of one name would run the second model with parts of the first.

Letters: B batch, H key/value heads, G query heads per key/value head, T queries (the last T of S columns),
S cached columns, c chunks, C tokens per chunk, D head dim. Rows may start with padding: chunks are counted from each
row's first token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

# Caches of releases before it count their columns otherwise, and a model would go on from the wrong ones; earlier ones lack what
# is imported below.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 5):
    raise ImportError(
        f"transformers {transformers.__version__} must be 5.5 or newer for this model's caches; "
        "pip install --upgrade 'transformers>=5.5,<6'"
    )

from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

# Scores alive at once, in elements: prompts are attended block by block to stay below.
MAX_BLOCK_SCORES = 2**24
# Of the cache in outputs: transformers 5.24 has renamed it, and warns of the name before.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
MAX_NEWTON_STEPS = 100
# Ways of scaling rotary frequencies that training knows; none changes as a text grows.
ROPE_TYPES = ("linear", "llama3", "yarn", "longrope")
# Columns whose queries, or keys of the router, a cache keeps beside those that the next token's router sees: so many can be
# dropped again.
SPARE_QUERIES = 64
TOO_MANY_CROPPED = (
    f"no more than {SPARE_QUERIES} columns can be cropped from a cache; begin with an empty one, or take shorter drafts "
    "(prompt_lookup_num_tokens, num_assistant_tokens)"
)


class Router(NamedTuple):
    """Constants of one layer's attention."""

    chunk_size: int
    scaling_factor: float | Tensor
    """A tensor has one for each key/value head, [H]."""
    sigma: float
    estimate_diagonal: bool
    alpha: float
    local_chunks: int = 0
    """Chunks before a query's own that it attends to whatever the router says; the router selects among those before."""
    query_pool: int = 1
    """The router sees the mean of the last so many queries of the row."""
    pool_heads: bool = False
    """The router sees the mean of the queries of a group of heads."""


def entmax(z: Tensor, alpha: float) -> Tensor:
    """Probabilities over the last dimension, exactly zero below a threshold; rows of only -inf give zeros."""
    x = ((z - z.amax(-1, keepdim=True)) * (alpha - 1)).clamp_min(-2)
    exponent = 1 / (alpha - 1)
    if alpha in (1.5, 2):
        ordered = x.sort(dim=-1, descending=True).values
        size = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        mean = ordered.cumsum(-1) / size
        if alpha == 2:
            tau = mean - 1 / size
        else:
            spread = ordered.square().cumsum(-1) - size * mean.square()
            tau = mean - ((1 - spread) / size).clamp_min(0).sqrt()
        support = (tau <= ordered).sum(-1, keepdim=True).clamp_min(1)
        tau = tau.gather(-1, support - 1)
        # prefix sums round; one Newton step on the scores themselves takes the rounding out again
        tau = tau + _newton_step(x, tau, exponent)
        p = (x - tau).clamp_min(0).pow(exponent)
    else:
        # 1 / (alpha - 1) magnifies rounding
        x = x.double()
        tau = torch.full_like(x[..., :1], -1)
        settled = torch.zeros_like(tau, dtype=torch.bool)
        for _ in range(MAX_NEWTON_STEPS):
            step = _newton_step(x, tau, exponent).masked_fill(settled, 0)
            tau = tau + step
            settled = ~(step.abs() > 4 * torch.finfo(x.dtype).eps)
            if bool(settled.all()):
                break
        p = (x - tau).clamp_min(0).pow(exponent)
        p = (p / p.sum(-1, keepdim=True)).to(z.dtype)
    return p.masked_fill(z == -math.inf, 0)


def _newton_step(x: Tensor, tau: Tensor, exponent: float) -> Tensor:
    """How far `tau` is from where `([x - tau]_+ ** exponent).sum()` is one, to first order of its `exponent`-th root."""
    u = (x - tau).clamp_min(0)
    norm = u.pow(exponent).sum(-1, keepdim=True).pow(1 / exponent)
    slope = torch.where(u > 0, u.pow(exponent - 1), 0).sum(-1, keepdim=True) * norm.pow(1 - exponent)
    return (norm - 1) / slope


def summarize(k: Tensor, indexer_q: Tensor, column: Tensor) -> Tensor:
    """Summaries [B, H, c, D] of chunks whose columns of k [B, H, S, D] are `column` int64 [B, c, C]; indexer_q is [H, D].

    A chunk that a row has not filled gets a summary that no query may use.
    """
    (B, H, S, D), (c, C) = k.shape, column.shape[1:]
    column_BS = column.flatten(1).clamp(0, S - 1)
    k_BHcCD = k.gather(2, column_BS[:, None, :, None].expand(B, H, -1, D)).view(B, H, c, C, D)
    score_BHcC = torch.einsum("bhctd,hd->bhct", k_BHcCD, indexer_q * D**-0.5)
    return (score_BHcC.softmax(-1).unsqueeze(-2) @ k_BHcCD).squeeze(-2)


def pool_queries(q: Tensor, past: Tensor | None, first: int, start: Tensor, query_pool: int) -> Tensor:
    """Mean of each query and the `query_pool` - 1 before it in its row, or as many as there are.

    Args:
        q: [B, heads, T, D], float32 or float64.
        past: those of the columns before, as many as are known, [B, heads, t, D].
        first: column of the first query in q.
        start: column of each row's first token, int64 [B].

    Raises:
        ValueError: the queries before are not known.
    """
    T, known = q.shape[2], 0 if past is None else min(past.shape[2], query_pool - 1)
    if known < min(first, query_pool - 1):
        raise ValueError(
            f"the cache has {known} queries before column {first}, but the router of query_pool={query_pool} sees "
            f"{min(first, query_pool - 1)}: {TOO_MANY_CROPPED}"
        )
    if past is not None and known:
        q = torch.cat([past[:, :, -known:].to(q.dtype), q], dim=2)
    column = torch.arange(first - known, first + T, device=q.device)
    q = q.masked_fill((column < start[:, None])[:, None, :, None], 0)
    q = F.pad(q, (0, 0, query_pool - 1 - known, 0))
    number_BT = (column[known:] - start[:, None] + 1).clamp(1, query_pool)
    return q.unfold(2, query_pool, 1).sum(-1) / number_BT[:, None, :, None]


def log_prior(q: Tensor, summary: Tensor, chunk: Tensor, router: Router) -> Tensor:
    """Bias on the scores of every chunk, [B, H, T, c]: 0 for those always on, -inf for those not selected.

    Args:
        q: the router's queries divided by sqrt(D), [B, H, G, T, D].
        summary: [B, H, c, D]; what stands at a query's own chunk or later is not used.
        chunk: each query's own chunk, int64 [B, T].
    """
    number_c = torch.arange(summary.shape[2], device=q.device)
    # the router selects among the chunks before those that are always on
    routed_BTc = number_c < chunk[..., None] - router.local_chunks
    always_BTc = ~routed_BTc & (number_c <= chunk[..., None])
    factor = router.scaling_factor
    if isinstance(factor, Tensor):
        factor = factor.to(q.dtype)[:, None, None, None]
    z_BHGTc = factor * (q @ summary[:, :, None].mT)
    if router.pool_heads:
        z_BHGTc = z_BHGTc.mean(2, keepdim=True)
    p_BHTc = entmax(z_BHGTc.masked_fill(~routed_BTc[:, None, None], -math.inf), router.alpha).mean(2)
    selected = p_BHTc > 0
    log_p = torch.where(selected, p_BHTc, 1).log()
    if router.estimate_diagonal:
        mean = log_p.detach().sum(-1, keepdim=True) / selected.sum(-1, keepdim=True).clamp_min(1)
        log_p = (log_p - mean) / router.sigma
    return log_p.masked_fill(~selected, -math.inf).masked_fill(always_BTc[:, None], 0)


def _visible(columns: int, queries: range, start: Tensor) -> Tensor:
    """Which columns each query sees, bool [B, T, S]: its row's tokens up to itself; padding sees itself."""
    column_S = torch.arange(columns, device=start.device)
    query_T1 = torch.arange(queries.start, queries.stop, device=start.device)[:, None]
    tokens = (column_S <= query_T1) & (column_S >= start[:, None, None])
    return tokens | (column_S == query_T1)


def dash_attention(
    q: Tensor, routing_q: Tensor, k: Tensor, v: Tensor, summary: Tensor, start: Tensor, router: Router
) -> tuple[Tensor, Tensor]:
    """DashAttention of the last T columns to all S, in plain torch.

    Args:
        q: [B, H, G, T, D], float32 or float64, as all others.
        routing_q: what the router sees, see `pool_queries`: the same shape, or one query a group, [B, H, 1, T, D].
        k, v: [B, H, S, D].
        summary: [B, H, c, D] with c above every query's own chunk; see `log_prior`.
        start: column of each row's first token, int64 [B].

    Returns:
        Output [B, H, G, T, D], and which chunks each query attends to, bool [B, H, T, c].
    """
    (B, H, G, T, D), S = q.shape, k.shape[2]
    q, routing_q = q * D**-0.5, routing_q * D**-0.5
    chunk_BS = ((torch.arange(S, device=q.device) - start[:, None]) // router.chunk_size).clamp_min(0)
    outputs, selections = [], []
    size = max(1, min(128, MAX_BLOCK_SCORES // (B * H * G * S)))
    for first in range(0, T, size):
        rows = slice(first, min(first + size, T))
        seen = S - T + rows.stop
        queries = range(S - T + first, seen)
        q_BHGTD = q[:, :, :, rows]
        chunk_BT = chunk_BS[:, queries.start : queries.stop]
        bias_BHTc = log_prior(routing_q[:, :, :, rows], summary, chunk_BT, router)
        index = chunk_BS[:, None, None, :seen].expand(*bias_BHTc.shape[:3], -1)
        bias_BHTS = bias_BHTc.gather(-1, index)
        bias_BHTS = bias_BHTS.masked_fill(~_visible(seen, queries, start)[:, None], -math.inf)
        scores = (q_BHGTD @ k[:, :, None, :seen].mT) + bias_BHTS[:, :, None]
        outputs.append(scores.softmax(-1) @ v[:, :, None, :seen])
        selections.append(bias_BHTc > -math.inf)
    return torch.cat(outputs, dim=3), torch.cat(selections, dim=2)


class _Summaries:
    """What DashAttention keeps beside keys and values: the summaries of chunks that rows have filled, and of the newest
    columns the router's queries where it sees more than a token's own, and its keys where it has its own."""

    summary: Tensor | None = None
    """[B, H, c, D], float32 or float64; of a chunk that a row has not filled, something finite."""
    queries: Tensor | None = None
    """[B, heads, t, D]"""
    routing_keys: Tensor | None = None
    """[B, H, t, D]"""
    start: Tensor | None = None
    """Column of each row's first token, int64 [B]."""
    latest_start = 0

    def _each_row(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in ("summary", "queries", "routing_keys", "start"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let rows continue other rows."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.summary = self.queries = self.routing_keys = self.start = None
        self.latest_start = 0

    def drop(self, columns: int) -> None:
        """Forget the newest; summaries are made again, of the router's own keys those that the columns were in."""
        if self.routing_keys is None:
            self.summary = None
        for name in ("queries", "routing_keys"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, kept[:, :, : max(0, kept.shape[2] - columns)])

    def keep_queries(self, q: Tensor, query_pool: int) -> None:
        """Add new columns' queries [B, heads, T, D] and drop the oldest."""
        most = query_pool - 1 + SPARE_QUERIES
        known = [] if self.queries is None else [self.queries]
        self.queries = torch.cat([*known, q[:, :, -most:]], dim=2)[:, :, -most:]

    def add_keys(
        self, k: Tensor, columns: int, new: int, indexer_q: Tensor, start: Tensor, chunk_size: int, own: bool
    ) -> Tensor:
        """Summarize the chunks that new columns complete; gives the summaries of all, [B, H, c, D], c above every own chunk.

        Args:
            k: keys of all columns; or, if the router has its `own`, its keys of new columns, [B, H, new, D].
            columns: how many there are.
            new: how many of them are.
            indexer_q: [H, D].
            start: column of each row's first token, int64 [B].
            chunk_size: of the router.
            own: whether k are the router's own keys.

        Raises:
            ValueError: keys of the router before the new columns are not known.
        """
        if own:
            k = k if self.routing_keys is None else torch.cat([self.routing_keys.to(k.dtype), k], dim=2)
            self.routing_keys = k[:, :, 1 - chunk_size - SPARE_QUERIES :]
        past, known = columns - new, k.shape[2] - new
        if known < (past if self.summary is None else min(past, chunk_size - 1)):
            raise ValueError(
                f"the cache has {known} keys of the router before column {past}, but a chunk has {chunk_size} tokens: "
                f"{TOO_MANY_CROPPED}"
            )
        if self.summary is None:
            past = 0
        # of each row, the chunk that the first column that is not summarized falls into, and those after it
        first_B1 = (past - start).clamp_min(0)[:, None] // chunk_size
        chunk_Bc = first_B1 + torch.arange((columns - past) // chunk_size + 1, device=k.device)
        place_BcC = chunk_Bc[..., None] * chunk_size + torch.arange(chunk_size, device=k.device)
        wide_k = k.to(torch.float64 if k.dtype == torch.float64 else torch.float32)
        column_BcC = start[:, None, None] + place_BcC - (columns - k.shape[2])
        summary = summarize(wide_k, indexer_q.to(wide_k.dtype), column_BcC)
        if self.summary is None:
            table = summary.new_zeros(*k.shape[:2], columns // chunk_size + 1, k.shape[3])
        else:
            whole = self.summary[:, :, : past // chunk_size]
            table = F.pad(whole, (0, 0, 0, columns // chunk_size + 1 - whole.shape[2]))
        table = table.scatter(2, chunk_Bc[:, None, :, None].expand_as(summary), summary)
        self.summary = table[:, :, : columns // chunk_size]
        return table


class DashDynamicLayer(_Summaries, DynamicLayer):
    """Keys and values that grow, with summaries."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._each_row(lambda x: x[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the newest columns."""
        columns = self.get_seq_length()
        super().crop(*args, **kwargs)
        self.drop(columns - self.get_seq_length())

    def reset(self) -> None:
        """Forget everything; transformers before 5.18 would keep as many columns of zeros."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()


class DashStaticLayer(_Summaries, StaticLayer):
    """Keys and values in their places of a table of fixed size, with summaries."""

    is_compileable = False  # shapes follow the columns filled
    filled = 0
    """`cumulative_length`, where nobody waits for a device to know it."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write columns, and give all that are filled."""
        keys, values = super().update(*args, **kwargs)
        self.filled += args[0].shape[2]
        return keys[:, :, : self.filled], values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Columns filled."""
        return self.filled

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest columns, whose number is given below zero; transformers does from 5.24 on."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must be below zero: how many columns to drop"
            )
        self.cumulative_length += tokens_to_remove
        self.filled += tokens_to_remove
        self.drop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.filled = 0


_LAYERS: dict[type, type] = {DynamicLayer: DashDynamicLayer, StaticLayer: DashStaticLayer}


def dash_layer(cache: Cache, index: int) -> Any:
    """The cache of one layer, which a plain dynamic or static cache first learns to keep summaries.

    Where the package's kernels filled it, it is theirs, with an `as_plain`.

    Raises:
        ValueError: the cache is of a kind that keeps its columns otherwise.
    """
    while len(cache.layers) <= index:
        cache.layers.append(DashDynamicLayer())
    layer: Any = cache.layers[index]
    if isinstance(layer, DashDynamicLayer | DashStaticLayer) or hasattr(layer, "as_plain"):
        return layer
    if type(layer) not in _LAYERS:
        raise ValueError(
            f"the cache's layers are {type(layer).__name__}, but DashAttention keeps chunk summaries beside a dynamic or "
            "static cache only; leave out cache_implementation, or pass use_cache=False"
        )
    ours: Any = object.__new__(_LAYERS[type(layer)])
    ours.__dict__.update(layer.__dict__)
    if isinstance(ours, DashStaticLayer):
        ours.filled = int(layer.get_seq_length())
    cache.layers[index] = ours
    return ours


@functools.cache
def _kernels() -> Callable[..., Tensor | None] | None:
    """The package's attention to a prompt or a cache, where it can be imported."""
    try:
        from dash_megatron.hf.fast_cache import attend
    except ImportError:
        return None
    return attend


class DashSelfAttention(nn.Module):
    """Grouped-query attention whose core is DashAttention or, in some layers, full causal attention."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim: int = config.head_dim or config.hidden_size // config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or config.num_attention_heads
        width, q_width = config.hidden_size, config.num_attention_heads * self.head_dim
        bias: bool = getattr(config, "qkv_bias", False)
        self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.q_norm = self.k_norm = None
        if getattr(config, "qk_norm", False):
            self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        # a plain Llama, which is compared with training by this file too, says nothing of chunks
        self.is_full = not hasattr(config, "chunk_size") or index in getattr(
            config, "full_attention_layers", ()
        )
        self.has_router_projections = getattr(config, "router_projections", False) and not self.is_full
        if not self.is_full:
            self.indexer_q = nn.Parameter(torch.zeros(self.kv_heads * self.head_dim))
            factors = getattr(config, "layer_scaling_factors", None)
            self.router = Router(
                config.chunk_size,
                factors[index] if factors else config.scaling_factor,
                config.sigma,
                config.estimate_diagonal,
                getattr(config, "alpha", 1.5),
                getattr(config, "local_chunks", 0),
                getattr(config, "query_pool", 1),
                getattr(config, "pool_heads", False),
            )
            if self.has_router_projections:
                self.indexer_q_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
                self.indexer_k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
            self.indexer_log_scaling: nn.Parameter | None = None
            # how fast the factors were learned; older exports say True for 1
            self.log_scaling_rate = float(getattr(config, "learned_scaling", None) or 0)
            if self.log_scaling_rate:
                self.indexer_log_scaling = nn.Parameter(torch.zeros(self.kv_heads))
        self.backend = "auto"
        """"auto": the package's kernels on CUDA; "torch": this file alone; else the package's backend of that name."""
        self.keep_selection = False
        self.selection: Tensor | None = None
        """Chunks that each query of the last forward pass attended to, bool [B, H, T, c], if `keep_selection`; None where
        rows had several documents."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, latest_start: int, cache: Cache | None,
        documents: list[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, T, hidden_size]; cos and sin [B, T, D]; start: column of each row's first token, int64 [B]; documents as
        from `_documents`."""
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = self._query_and_key(x, self.q_proj, self.k_proj, cos, sin)
        own: tuple[Tensor, ...] = ()
        if self.has_router_projections:
            own = self._query_and_key(x, self.indexer_q_proj, self.indexer_k_proj, cos, sin)
        if documents is None:
            out = self._attend(q, k, v, start, latest_start, cache, *own)
        else:
            # one row after the other, cut into documents
            cut = (y.transpose(0, 1).flatten(1, 2)[None].split(documents, dim=2) for y in (q, k, v, *own))
            parts = [
                self._attend(part_q, part_k, part_v, start.new_zeros(1), 0, None, *part_own)
                for part_q, part_k, part_v, *part_own in zip(*cut, strict=True)
            ]
            out = torch.cat(parts, dim=2)[0].unflatten(1, x.shape[:2]).transpose(0, 1)
            self.selection = None
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _query_and_key(
        self, x: Tensor, q_proj: nn.Linear, k_proj: nn.Linear, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, heads, T, D] each, after norms and RoPE."""
        q, k = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (q_proj, k_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary_pos_emb(q, k, cos, sin)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        latest_start: int,
        cache: Cache | None,
        *own: Tensor,
    ) -> Tensor:
        """All [B, heads, T, D], the new columns, which a cache is given; `own` are the router's queries and keys, if it has such."""
        layer: Any = None if cache is None else dash_layer(cache, self.index)
        out = self._attend_with_kernels(q, k, v, start, latest_start, cache, *own)
        if out is not None:
            return out
        if cache is not None:
            if hasattr(layer, "as_plain"):
                layer = cache.layers[self.index] = layer.as_plain(start)
            k, v = cache.update(k, v, self.index)
        if self.is_full:
            return self._attend_fully(q, k, v, start, latest_start)
        return self._attend_by_chunks(q, k, v, start, layer, *own)

    def _attend_with_kernels(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        latest_start: int,
        cache: Cache | None,
        *own: Tensor,
    ) -> Tensor | None:
        """All [B, heads, T, D], the new columns; None where this file attends, and fills the cache, by itself."""
        kernels = _kernels()
        if kernels is None or self.is_full or self.keep_selection:
            return None
        indexer_q = self.indexer_q.view(self.kv_heads, self.head_dim)
        settings = self._router()._asdict() | dict(zip(("routing_q", "routing_k"), own, strict=False))
        places = (start, latest_start, cache, self.index, self.backend)
        return kernels(q, k, v, indexer_q, *places, **settings)

    def _router(self) -> Router:
        if self.indexer_log_scaling is None:
            return self.router
        log = self.indexer_log_scaling
        # in half precision, neighbouring factors would be a percent apart
        log_factor = self.log_scaling_rate * (log if log.dtype == torch.float64 else log.float())
        factor = self.router.scaling_factor * log_factor.exp()
        return self.router._replace(scaling_factor=factor)

    def _attend_fully(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, latest_start: int) -> Tensor:
        """All [B, heads, columns, D]."""
        T, S = q.shape[2], k.shape[2]
        plain = latest_start == 0 and T in (1, S)
        mask = None if plain else _visible(S, range(S - T, S), start)[:, None]
        if T == 1:
            # the heads of a group as queries read keys once
            rows = q.unflatten(1, (k.shape[1], -1))[:, :, :, 0]
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).flatten(1, 2)[:, :, None]
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, enable_gqa=grouped)

    def _attend_by_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        layer: DashDynamicLayer | DashStaticLayer | None,
        routing_q: Tensor | None = None,
        routing_k: Tensor | None = None,
    ) -> Tensor:
        """All [B, heads, columns, D]."""
        router, (T, S) = self._router(), (q.shape[2], k.shape[2])
        indexer_q = self.indexer_q.view(self.kv_heads, self.head_dim)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        kept = _Summaries() if layer is None else layer
        with torch.autocast(q.device.type, enabled=False):
            own = routing_k is not None
            wide_k = k.to(wide)
            given = wide_k if routing_k is None else routing_k
            table = kept.add_keys(given, S, T, indexer_q, start, router.chunk_size, own)
            routing_q = q if routing_q is None else routing_q
            pooled_q = routing_q.to(wide)
            if router.query_pool > 1:
                pooled_q = pool_queries(pooled_q, kept.queries, S - T, start, router.query_pool)
                kept.keep_queries(routing_q, router.query_pool)
            q_BHGTD, pooled_BHGTD = (x.unflatten(1, (self.kv_heads, -1)) for x in (q.to(wide), pooled_q))
            out, selection = dash_attention(q_BHGTD, pooled_BHGTD, wide_k, v.to(wide), table, start, router)
        self.selection = selection if self.keep_selection else None
        return out.flatten(1, 2).to(q.dtype)


class DashDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each behind a norm and beside the residual stream."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = DashSelfAttention(config, index)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *places: Any) -> Tensor:
        """x [B, T, hidden_size]; `places` as in `DashSelfAttention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), *places)
        return x + self.mlp(self.post_attention_layernorm(x))


class DashConfig(LlamaConfig):
    """A Llama's config, and what `DashSelfAttention` reads beside it."""

    model_type = "dash"
    # of a Llama's layers, which would split heads from their `indexer_q`
    base_model_tp_plan = None  # type: ignore[assignment]
    base_model_pp_plan = None  # type: ignore[assignment]


# pipeline("text-generation") would print an error and a list of all models that are named here
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dash"] = "DashForCausalLM"
# LoraConfig() of peft, and its like, take the model type's modules where they name none: a Llama's have the same names
try:
    from peft.utils import constants as peft_constants
except Exception:
    pass
else:
    for table in vars(peft_constants).values():
        if isinstance(table, dict) and "llama" in table:
            table.setdefault("dash", table["llama"])


class DashPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = DashConfig
    base_model_prefix = "model"
    _no_split_modules = ["DashDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": DashDecoderLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DashSelfAttention) and not module.is_full:
            nn.init.zeros_(module.indexer_q)  # a summary starts as the mean key
            if module.indexer_log_scaling is not None:
                nn.init.zeros_(module.indexer_log_scaling)


def rotary_frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """Radians per position of each pair of channels, float32 [D / 2] on CPU, and the factor on cosines and sines.

    longrope takes its long factors where `max_position_embeddings` exceeds the original positions, at every position,
    so that keys in a cache stay valid when a text grows past them.

    Raises:
        ValueError: `rope_type` is unknown, its frequencies change as a text grows, or there is no base.
    """
    rope: Any = config.rope_parameters
    if rope.get("rope_theta") is None:
        raise ValueError(f"rope_parameters={rope} must have rope_theta, the base; add the one of config.json")
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_TYPES:
        raise ValueError(
            f"config.json: rope_type={kind} must be default, {', '.join(ROPE_TYPES)}: keys in a cache keep their rotation"
        )
    # transformers builds models on the meta device, where there are no numbers
    with torch.device("cpu"):
        if kind == "default":
            D = config.head_dim or config.hidden_size // config.num_attention_heads
            return rope["rope_theta"] ** -(torch.arange(0, D, 2, dtype=torch.float32) / D), 1.0
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=config.max_position_embeddings)


class DashModel(DashPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.frequencies, self.attention_factor = rotary_frequencies(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DashDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, D] of angles in float32, as in training."""
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.float()[..., None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm, [B, T, hidden_size].

        Args:
            input_ids: int64 [B, T]; or `inputs_embeds` [B, T, hidden_size].
            attention_mask: [B, S], 0 for padding, which stands before or after a row's tokens.
            position_ids: [B, T]; None counts from each row's first token. Where they do not go on by one, another document
                begins, which sees nothing of those before it; no cache is made then.
            past_key_values: dynamic or static cache of the S - T columns before.
            cache: what transformers calls it from 5.24 on.
            kwargs: `output_hidden_states` and `return_dict` as in transformers; others have no effect.

        Raises:
            ValueError: arguments that contradict each other, or ask for what this model does not compute.
        """
        self._check_arguments(input_ids, inputs_embeds, position_ids, kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = cache = past_key_values if cache is None else cache
        recomputing = self.training and any(layer.gradient_checkpointing for layer in self.layers)
        if recomputing and cache is not None:
            raise ValueError(
                "past_key_values must be None while gradient checkpointing trains the model: layers that are computed twice "
                "would fill the cache twice"
            )
        if cache is None and not recomputing and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0
        start, latest_start = _row_starts(attention_mask, cache, x)
        documents = None
        if position_ids is None:
            column_T = torch.arange(past, past + x.shape[1], device=x.device)
            position_ids = (column_T - start[:, None]).clamp_min(0)
        else:
            position_ids = position_ids.expand(x.shape[0], -1)
            documents = _documents(position_ids, attention_mask, start - past)
        if documents is not None:
            if use_cache or given is not None:
                raise ValueError(
                    "position_ids begin several documents in one row, which a cache cannot hold; pass use_cache=False and no "
                    "past_key_values, or one document a row"
                )
            cache = None
        cos, sin = self.rotary(position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, start, latest_start, cache, documents)
        outputs: dict[str, Any] = {"last_hidden_state": self.norm(x), CACHE: cache}
        return BaseModelOutputWithPast(**outputs)

    def _check_arguments(
        self,
        input_ids: Tensor | None,
        embeds: Tensor | None,
        position_ids: Tensor | None,
        others: dict[str, Any],
    ) -> None:
        given = [each for each in (input_ids, embeds) if each is not None]
        if len(given) != 1:
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if given[0].shape[1] == 0:
            raise ValueError(
                f"the input has no tokens; an empty prompt begins with the token that documents begin with, input_ids="
                f"[[{self.config.bos_token_id}]]"
            )
        if others.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions must be False: no layer makes a matrix of attention weights")
        if position_ids is None and not {"cu_seq_lens_q", "seq_idx"}.isdisjoint(others):
            raise ValueError(
                "documents packed into one row are told apart by position_ids that begin again at each; pass them too"
            )


def _documents(position_ids: Tensor, mask: Tensor | None, start: Tensor) -> list[int] | None:
    """Columns of each document, row after row, where some row's positions do not go on by one; None if all do.

    Args:
        position_ids: [B, T].
        mask: [B, S], 0 for padding; it belongs to a document, or is one.
        start: column of each row's first token, int64 [B].
    """
    T = position_ids.shape[1]
    if T == 1:
        return None
    column_T = torch.arange(T, device=start.device)
    begins_BT = (position_ids.diff(dim=1) != 1) & (column_T[1:] > start[:, None])
    if mask is not None:
        begins_BT &= mask[:, 1 - T :].bool()
    if not bool(begins_BT.any()):
        return None
    begins_BT = F.pad(begins_BT, (1, 0), value=True) | (column_T == start[:, None])
    edges = F.pad(begins_BT.flatten(), (0, 1), value=True).nonzero()[:, 0]
    return edges.diff().tolist()


def _row_starts(mask: Tensor | None, cache: Any, x: Tensor) -> tuple[Tensor, int]:
    """Column of each row's first token, int64 [B], and the latest of them; a cache remembers both.

    Of a single token that goes on, masks on other devices than CPU are looked at only where rows ended with padding: the host
    would wait at every token.

    Raises:
        ValueError: the mask is not of shape [B, S], has padding between tokens, or moved a row's first token.
    """
    layer = dash_layer(cache, 0) if cache is not None else None
    known = layer.start if layer is not None and layer.get_seq_length() > 0 else None
    is_looked_at = x.device.type == "cpu" or x.shape[1] > 1 or getattr(cache, "ends_with_padding", False)
    if layer is not None and known is not None and (mask is None or not is_looked_at):
        return known, layer.latest_start
    if mask is None:
        start, latest = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 0
    else:
        if mask.ndim != 2:
            raise ValueError(
                f"attention_mask.shape={list(mask.shape)} must be [batch, columns], 0 for padding"
            )
        real = mask.bool()
        begins = real & ~F.pad(real[:, :-1], (1, 0))
        if not bool(real.any(1).all()):
            raise ValueError(
                "attention_mask must have tokens in every row; where a prompt comes in pieces (prefill_chunk_size), already in the "
                "first one: make pieces longer than the padding"
            )
        if bool((begins.sum(1) > 1).any()):
            raise ValueError(
                "attention_mask must have no padding between tokens; rows that are to go on are padded in front, as by a tokenizer of "
                "padding_side='left'"
            )
        start = begins.int().argmax(1)
        if known is not None and not torch.equal(start, known):
            raise ValueError("attention_mask must keep the padding that the cache was filled with")
        latest = int(start.max())
        if cache is not None:
            cache.ends_with_padding = not bool(real[:, -1].all())
    if layer is not None:
        layer.start, layer.latest_start = start, latest
    return start, latest


class DashForCausalLM(DashPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = DashModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **ignored: Any) -> Tensor | None:
        """For a static cache `generate` would write the mask out for all columns; ours says where rows start."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *ignored: Any) -> bool:
        # generate would compile for a static cache, but shapes follow the columns filled
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size], or of some columns; with labels also the loss.

        Args:
            logits_to_keep: how many of the last columns, 0 for all; or which, int64 [columns].

        Other arguments as in `DashModel.forward`.
        """
        places = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache)
        outputs = self.model(*places, return_dict=True, **kwargs)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        if isinstance(kept, Tensor) and kept.ndim != 1:
            raise ValueError(
                f"logits_to_keep of shape {list(kept.shape)} must be a number or have one dimension: the columns"
            )
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        found = {
            "loss": loss,
            "logits": logits,
            CACHE: getattr(outputs, CACHE),
            "hidden_states": outputs.hidden_states,
        }
        return CausalLMOutputWithPast(**found)
