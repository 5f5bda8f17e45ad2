"""Megatron's self-attention for training: projection, one pass that splits and rotates, core attention, projection."""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention
from torch import Tensor

from dash_megatron.ops.rotary import rotate, split_and_rotate


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
        query, key, value = self.rotated(self.linear_qkv(hidden_states)[0], rotary_pos_emb)
        out = self.core_attention(
            query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
        )
        return self.linear_proj(out)

    def rotated(self, mixed: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads as core attention takes them, [N, B, heads, D], of a projection."""
        groups, head_dim, keys = (
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
            self.keys_per_group,
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
