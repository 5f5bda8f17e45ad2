"""Megatron's self-attention for training: projection, one pass that splits and rotates, core attention, projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention
from torch import Tensor

from dash_megatron.ops.rotary import rotate, split_and_rotate
from dash_megatron.parallel.context.heads import heads_for_rows, rows_for_heads


class SelfAttention(attention.SelfAttention):
    """Self-attention whose `rotary_pos_emb` is what `PackedRotaryEmbedding` gives."""

    keys_per_group = 1

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [N, B, hidden_size].
            attention_mask: None, because masks come from causality and `packed_seq_params`.
            rotary_pos_emb: cosines and sines, float32 [2, N, B, D / 2].
            packed_seq_params: where documents start.
            ignored: Megatron's arguments of inference.

        Returns:
            [N, B, hidden_size], and the bias of the last projection or None.
        """
        if self._projects_by_rank():
            return self._forward_by_rank(hidden_states, rotary_pos_emb, packed_seq_params), None
        query, key, value = self.rotated(self.linear_qkv(hidden_states)[0], rotary_pos_emb)
        out = self.core_attention(
            query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
        )
        projected, bias = self.linear_proj(out)
        return self.core_attention.backward_start.watch(projected), bias

    def _projects_by_rank(self) -> bool:
        """Whether context-parallel ranks exchange heads, and all of both projections is here: not split, nor partitioned by ZeRO 3."""
        core = self.core_attention
        whole = core.tensor_parallel_size == 1 and not hasattr(self.linear_qkv.weight, "ds_id")
        return core.context_group is not None and core.context_comm == "a2a" and whole

    def _forward_by_rank(self, x: Tensor, turns: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """As `forward`, projecting the heads of one context-parallel rank after the other, so that they travel meanwhile."""
        group = self.core_attention.context_group
        group.counts = self.training
        weights, bias = self.linear_qkv.weight.chunk(group.size), self.linear_qkv.bias
        biases = [None] * group.size if bias is None else bias.chunk(group.size)

        def rows_of(rank: int) -> list[Tensor]:
            return [part.squeeze(1) for part in self.rotated(F.linear(x, weights[rank], biases[rank]), turns)]

        out = self.core_attention.attend_heads(*heads_for_rows(group, rows_of), packed)
        columns = self.linear_proj.weight.chunk(group.size, dim=1)
        projected: Tensor | None = None
        for rank, rows in rows_for_heads(group, out):
            heads, weight = rows.flatten(1), columns[rank]
            projected = (
                F.linear(heads, weight) if projected is None else torch.addmm(projected, heads, weight.t())
            )
        assert projected is not None, "a rank's own heads come first"
        return projected.unsqueeze(1)

    def rotated(self, mixed: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as core attention takes them, [N, B, heads, D], of a projection, or of some groups' rows of it."""
        head_dim, keys = self.hidden_size_per_attention_head, self.keys_per_group
        groups = (
            self.num_query_groups_per_partition * mixed.shape[-1] // self.linear_qkv.output_size_per_partition
        )
        if self.q_layernorm is None:
            return split_and_rotate(mixed, turns, head_dim, groups, keys)
        heads = mixed.unflatten(-1, (groups, -1, head_dim))
        parts = heads.split([heads.shape[3] - keys - 1, keys, 1], dim=3)
        query, key, value = (x.flatten(2, 3) for x in parts)
        # values as a view would keep the whole projection
        return (
            rotate(self.q_layernorm(query), turns),
            rotate(self.k_layernorm(key), turns),
            value.contiguous(),
        )
