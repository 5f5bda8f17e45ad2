"""DashAttention (arXiv 2605.18753) in plain torch, as three functions: what every faster implementation must equal.

`summarize` makes a routing key of every chunk, `route` selects chunks for every query and gives them a prior, `attend` is
softmax attention to the selected chunks under that prior. They work on one packed row of tokens, whose keys lie on a grid of
chunks and slots, and know nothing of documents: masks say what precedes a query. Whole sequences (`sequence_reference.py`),
shards of a sequence (`sharded_reference.py`), decoding (`decode_reference.py`) and measurements (`diagnostics.py`) are
compositions of them.

Letters: H key/value heads, G query heads per key/value head, T queries, c chunks, C slots per chunk, D head dim. Tensors may
have a batch before these dimensions, of rows that are laid out alike.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dash_megatron.ops.entmax import entmax
from dash_megatron.ops.types import Router

# Scores alive at once, in elements: whoever calls with many queries cuts them into blocks that stay below.
MAX_BLOCK_SCORES = 2**24
LOG2_E = math.log2(math.e)


def upcast(*tensors: Tensor) -> list[Tensor]:
    """In float64 if float64, otherwise in float32."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


class QueryPositions(NamedTuple):
    """Where T queries stand; chunks are numbered through the whole packed sequence."""

    chunk_T: Tensor
    """int64: number of the query's own chunk."""
    slot_T: Tensor
    """int64: the query's place inside it."""
    first_chunk_T: Tensor
    """int64: number of the first chunk of the query's document."""

    def past(self, chunk_c: Tensor) -> Tensor:
        """Bool [T, c]: which of the chunks with these numbers precede the query's own in its document."""
        return (chunk_c >= self.first_chunk_T[:, None]) & (chunk_c < self.chunk_T[:, None])

    def masks(self, chunk_c: Tensor, local_chunks: int) -> tuple[Tensor, Tensor]:
        """Bool [T, c] each: which of the chunks with these numbers the router may select, and which are always attended to.

        The latter are the query's own chunk and as many as `local_chunks` just before it in its document; the former are
        the past chunks before these.
        """
        routed_Tc = self.past(chunk_c) & (chunk_c < self.chunk_T[:, None] - local_chunks)
        return routed_Tc, (self.past(chunk_c) | self.own(chunk_c)) & ~routed_Tc

    def own(self, chunk_c: Tensor) -> Tensor:
        """Bool [T, c]: which of the chunks with these numbers is the query's own."""
        return chunk_c == self.chunk_T[:, None]

    def hidden(self, chunk_c: Tensor, num_slots: int) -> Tensor:
        """Bool [T, c, C]: the slots of the own chunk that come after the query, which causality hides."""
        late_TC = torch.arange(num_slots, device=chunk_c.device) > self.slot_T[:, None]
        return self.own(chunk_c)[..., None] & late_TC[:, None]


def products(q_HGTD: Tensor, x_HSD: Tensor) -> Tensor:
    """Inner products [..., H, G, T, S] of queries with S vectors of their key/value head."""
    # the heads of a group stand as rows of one matrix, so the vectors are never repeated
    return (q_HGTD.flatten(-3, -2) @ x_HSD.mT).unflatten(-2, q_HGTD.shape[-3:-1])


def summarize(k_HcCD: Tensor, filled_cC: Tensor, summary_query_HD: Tensor) -> Tensor:
    """Summaries [..., H, c, D] of chunks: the mean of the keys under softmax weights from the learned query.

    `filled_cC` (bool) tells which slots hold a token; what the others hold must be finite.
    """
    score_HcC = torch.einsum("...hcwd,hd->...hcw", k_HcCD, summary_query_HD * k_HcCD.shape[-1] ** -0.5)
    # the least number rather than -inf: a chunk without tokens has equal weights, not NaN
    score_HcC = torch.where(filled_cC, score_HcC, torch.finfo(k_HcCD.dtype).min)
    return (score_HcC.softmax(-1).unsqueeze(-2) @ k_HcCD).squeeze(-2)


def route(
    q_HGTD: Tensor,
    summary_HcD: Tensor,
    routed_Tc: Tensor,
    always_Tc: Tensor,
    router: Router,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Select chunks for every query, the same ones for the heads of a group.

    Args:
        q_HGTD: the router's queries (of `pool_queries`) divided by sqrt(D); or as they are, if `scale` is 1 / sqrt(D).
        summary_HcD: of `summarize`.
        routed_Tc, always_Tc: bool, of `QueryPositions.masks`: the chunks to select from, and the query's own and local ones.
        router: its constants.
        scale: factor on all scores.

    Returns:
        Bias [..., H, T, c] on the attention scores of every chunk: the log prior, 0 for the own chunk and the local
        ones, -inf where the chunk is not selected. And the number of chunks selected, these included, int32 [..., H, T].
    """
    z_HGTc = router.factors(q_HGTD.dtype) * scale * products(q_HGTD, summary_HcD)
    if router.pool_heads:
        # the scores of the mean query
        z_HGTc = z_HGTc.mean(-3, keepdim=True)
    return log_prior(probabilities(z_HGTc, routed_Tc, router.alpha), always_Tc, router)


def probabilities(z_HGTc: Tensor, routed_Tc: Tensor, alpha: float) -> Tensor:
    """Mean [..., H, T, c] over the heads of a group of alpha-entmax over the scores of routed chunks."""
    return entmax(z_HGTc.masked_fill(~routed_Tc, -math.inf), alpha).mean(-3)


def log_prior(p_HTc: Tensor, always_Tc: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """What `route` returns, from the `probabilities` of chunks."""
    selected_HTc = p_HTc > 0
    # mask before the logarithm: the gradient of log(0) would turn the masked zeros into NaN
    log_p_HTc = torch.where(selected_HTc, p_HTc, 1).log()
    num_routed_HT = selected_HTc.sum(-1)
    if router.estimate_diagonal:
        log_p_HTc = (log_p_HTc - mean_log_p(log_p_HTc, num_routed_HT)) / router.sigma
    bias_HTc = log_p_HTc.masked_fill(~selected_HTc, -math.inf).masked_fill(always_Tc, 0)
    return bias_HTc, (num_routed_HT + always_Tc.sum(-1)).int()


def mean_log_p(log_p_HTc: Tensor, num_routed_HT: Tensor) -> Tensor:
    """Mean [..., H, T, 1] over the routed chunks selected of a log probability that is zero for all others."""
    # no gradient through the mean: it is unbounded where a chunk is about to leave the support
    return log_p_HTc.detach().sum(-1, keepdim=True) / num_routed_HT.clamp_min(1).unsqueeze(-1)


def attention_scores(q_HGTD: Tensor, k_HcCD: Tensor, bias_HTc: Tensor, hidden_TcC: Tensor) -> Tensor:
    """Scores [..., H, G, T, c, C] of every slot, -inf where the query does not attend.

    `q_HGTD` is divided by sqrt(D) and `bias_HTc` is that of `route`. `hidden_TcC` (bool) hides slots of the last chunks: it
    may have fewer chunks than there are keys of, because all slots of past chunks are filled.
    """
    scores = products(q_HGTD, k_HcCD.flatten(-3, -2)).unflatten(-1, k_HcCD.shape[-3:-1])
    scores = scores + bias_HTc[..., None, :, :, None]
    # the gradient is zero by itself where the weight is zero, so autograd need not see the mask
    with torch.no_grad():
        scores[..., -hidden_TcC.shape[-2] :, :].masked_fill_(hidden_TcC, -math.inf)
    return scores


def attend(q_HGTD: Tensor, k_HcCD: Tensor, v_HcCD: Tensor, bias_HTc: Tensor, hidden_TcC: Tensor) -> Tensor:
    """Softmax attention [..., H, G, T, D] to the values; the other arguments are those of `attention_scores`."""
    scores = attention_scores(q_HGTD, k_HcCD, bias_HTc, hidden_TcC)
    weights = scores.flatten(-2).flatten(-3, -2).softmax(-1)
    return (weights @ v_HcCD.flatten(-3, -2)).unflatten(-2, q_HGTD.shape[-3:-1])
