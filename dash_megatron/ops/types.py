"""The values that travel through `ops`: the router's constants, and what routing gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Router(NamedTuple):
    """The constants of a DashAttention router, immutable; names and meaning are those of the published models' config."""

    chunk_size: int = 64
    """Tokens per chunk."""
    scaling_factor: float | Tensor = 1.0
    """Factor on the routing scores, above 0: a larger one selects fewer chunks. A tensor [Hkv] has one for each key/value
    head."""
    sigma: float = 2.0
    """Temperature of the log prior, above 0; not used where `estimate_diagonal` is False."""
    estimate_diagonal: bool = True
    """Whether the log prior of past chunks is centred around that of the token's own chunk."""
    alpha: float = 1.5
    """The α of α-entmax, in (1, 2]: softmax is the limit 1, sparsemax is 2."""
    local_chunks: int = 0
    """Chunks just before a token's own one that it always attends to, with the own chunk's prior, 0. Entmax and the
    prior's mean are over the routed chunks alone: the past chunks before the local ones."""
    query_pool: int = 1
    """The router sees the mean of a token's last `query_pool` queries in its document, its own among them; attention sees
    the own one."""
    pool_heads: bool = False
    """The router sees the mean over the query heads of a group, so that there is one entmax a key/value head."""

    def group_means(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """With `pool_heads` the means [..., Hkv, D] of x [..., Hq, D] over the query heads of each group; otherwise x itself.

        They are taken in float32 or wider and rounded to x's dtype. Groups of one query are x itself too.
        """
        if not self.pool_heads or x.shape[-2] == num_kv_heads:
            return x
        groups = x.unflatten(-2, (num_kv_heads, -1))
        return groups.mean(-2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

    def group_means_backward(self, d_means: Tensor, num_heads: int) -> Tensor:
        """Gradient of the input of `group_means` [..., num_heads, D], from that of its output [..., Hkv, D]."""
        group = num_heads // d_means.shape[-2]
        if group == 1:
            return d_means
        return (d_means / group).repeat_interleave(group, dim=-2)

    def of_heads(self, heads: slice) -> Router:
        """The same router for some of the key/value heads."""
        if not isinstance(self.scaling_factor, Tensor):
            return self
        return self._replace(scaling_factor=self.scaling_factor[heads])

    def split(self) -> tuple[Tensor | None, Router]:
        """Plain numbers and a tensor, as custom ops take them.

        Returns:
            The factor of each key/value head [Hkv], contiguous, or None where all heads have the same, and a router whose
            `scaling_factor` is a number: 1 beside a tensor, so that the two multiply to this router's factor.
        """
        given = self.scaling_factor
        head_scaling = given.contiguous() if isinstance(given, Tensor) else None
        number = 1.0 if isinstance(given, Tensor) else float(given)
        return head_scaling, self._replace(
            scaling_factor=number, sigma=float(self.sigma), alpha=float(self.alpha)
        )

    def factors(self, dtype: torch.dtype) -> float | Tensor:
        """The scaling factor in a shape that multiplies scores [..., Hkv, G, N, chunks]: a number, or a tensor of `dtype`."""
        given = self.scaling_factor
        return given.to(dtype)[:, None, None, None] if isinstance(given, Tensor) else given

    @property
    def exponent(self) -> float:
        """The exponent in entmax's p = [(alpha - 1) z - tau]_+ ** exponent: 1 / (alpha - 1)."""
        return 1 / (self.alpha - 1)

    @property
    def inv_sigma(self) -> float:
        """What the log prior is multiplied by: 1 / sigma, or 1 where sigma is not used."""
        return 1 / self.sigma if self.estimate_diagonal else 1.0


@dataclass(frozen=True)
class Routing:
    """What a router selected, for logging and for density control; carries no gradient."""

    chunks_selected: Tensor
    """int32 [B, N, Hkv]: chunks each token attends to, its own included."""
    chunks_available: Tensor
    """float32 scalar: mean over tokens of the causally available chunks, the token's own included."""

    @property
    def density(self) -> Tensor:
        """float32 scalar: selected chunks of all tokens, key/value heads and batch over available ones.

        This is the share of the query-key pairs of full attention that is attended to, up to the causal mask inside the
        own chunk. Every token weighs as much as it has chunks available: the mean of the tokens' own shares would be near
        1 wherever documents are short.
        """
        return self.chunks_selected.float().mean() / self.chunks_available
