"""The GPT model: a Megatron-core `GPTModel` from a layer spec whose core attention is ours."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dash_megatron.config import Config
from dash_megatron.layers.baselines import ZERO_INITIALIZED, InfLLMv2CoreAttention, NSACoreAttention
from dash_megatron.layers.core_attention import (
    CoreAttention,
    DashCoreAttention,
    FullCoreAttention,
    PackedDocuments,
    RoutingMeans,
)
from dash_megatron.layers.feed_forward import FeedForward
from dash_megatron.layers.norm import RMSNorm
from dash_megatron.layers.recompute import (
    RecomputedTransformerLayer,
    SelectiveTransformerLayer,
    TransformerLayer,
)
from dash_megatron.layers.rotary import PackedRotaryEmbedding
from dash_megatron.layers.router_projections import RoutedSelfAttention, qkv_and_routing
from dash_megatron.layers.self_attention import SelfAttention
from dash_megatron.layers.sharding import mark_splits, shard, split_of, whole_shape
from dash_megatron.layers.vocabulary_loss import OutputLayer, VocabularyLoss
from dash_megatron.ops.backend import keep_triton_cache
from dash_megatron.parallel.context.layout import ContextShard

CORE_ATTENTION: dict[str, type[CoreAttention]] = {
    "dash": DashCoreAttention,
    "full": FullCoreAttention,
    "infllmv2": InfLLMv2CoreAttention,
    "nsa": NSACoreAttention,
}
# The layer for each value of `training.recompute`; for others it is Megatron's own.
TRANSFORMER_LAYERS = {"full": RecomputedTransformerLayer, "selective": SelectiveTransformerLayer}


class DashGPTModel(GPTModel):
    """Megatron-core's `GPTModel` on packed documents, on any device."""

    scored_vocab_size: int | None = None
    """While labels are scored, rows of the embedding table that are tokens; see `scoring`."""

    def __init__(self, *args: Any, rotary: PackedRotaryEmbedding, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        # Megatron's layer specs cannot name the output layer's class
        self.output_layer.__class__ = OutputLayer
        for layer in self.decoder.layers:
            # if a spec named it, Megatron would warn of it in every layer, and not hand it its process group
            layer.mlp.__class__ = FeedForward
        self.rotary = rotary

    def _preprocess(self, *args: Any, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        # Megatron's own rotary embedding needs CUDA and one position per row index; ours reads position_ids
        decoder_input, _, *rest = super()._preprocess(*args, position_ids=position_ids, **kwargs)
        return (decoder_input, self.rotary(position_ids), *rest)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if labels is None:
            return gather_from_tensor_model_parallel_region(
                super()._postprocess(hidden_states, *args, labels=None, **kwargs)
            )
        vocab_size = self.scored_vocab_size
        if loss_mask is not None and vocab_size is not None:
            raise ValueError(
                "loss_weight must not be given within `scoring`, which is of every label: leave one out"
            )
        if loss_mask is None and vocab_size is None and torch.is_grad_enabled():
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        return self.output_layer(hidden_states, weight, loss=VocabularyLoss(labels, loss_mask, vocab_size))

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: ContextShard | None = None,
        max_seqlen: int | None = None,
        loss_weight: Tensor | None = None,
    ) -> Tensor:
        """Predict the next token.

        Args:
            tokens: int64 [B, N].
            position_ids: int64 [B, N], restarting at every document.
            labels: int64 [B, N]; given, the result is the loss of every token.
            cu_seqlens: int32 [documents + 1], where documents start; needs B == 1. None: one document a row.
            context: under context parallelism, which tokens of the sequence these N are; `cu_seqlens` is then that of
                the whole sequence.
            max_seqlen: tokens of the longest document, or a bound on them; None: all tokens, because asking the device
                would stall it.
            loss_weight: float32 [B, N], of each label's loss.

        Returns:
            Logits [B, N, vocabulary] where labels is None. Cross entropy in nats: with `loss_weight` the weighted sum over
            labels, a float32 scalar, whose backward keeps no logits; without, of every label, float32 [B, N], whose backward
            keeps those of all tokens. Within `scoring`, float32 [B, N, 2] without a gradient: cross entropy, and 1 or 0 for
            labels that are the argmax or not.
        """
        packed = None
        if cu_seqlens is not None:
            if max_seqlen is None:
                max_seqlen = tokens.shape[1] if context is None else context.num_tokens
            # sbhd: documents are marked, yet tensors keep [N, B, H, D] and RoPE takes its angles as they are
            packed = PackedDocuments(
                qkv_format="sbhd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=max_seqlen,
                max_seqlen_kv=max_seqlen,
                context=context,
            )
        return super().forward(
            tokens, position_ids, None, labels=labels, packed_seq_params=packed, loss_mask=loss_weight
        )


@contextlib.contextmanager
def scoring(model: torch.nn.Module, vocab_size: int) -> Iterator[None]:
    """Let a `DashGPTModel` also say of each label whether it is the argmax of the first `vocab_size` logits."""
    scorer = cast(DashGPTModel, model)
    scorer.scored_vocab_size = vocab_size
    try:
        yield
    finally:
        scorer.scored_vocab_size = None


def _transformer_config(config: Config) -> TransformerConfig:
    model = config.model
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.channels_per_head,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        context_parallel_size=config.parallel.context,
        params_dtype=torch.float32,
        # weights are placed by torch's default device and filled by init_weights
        use_cpu_initialization=True,
        perform_initialization=False,
        init_method_std=model.init_std,
    )


def _block_spec(config: Config) -> TransformerBlockSubmodules:
    """One spec a layer: `attention.full_layers` may differ from the rest."""
    # Megatron's own norm without Transformer Engine refuses sequence parallel
    layer_norm = ModuleSpec(RMSNorm, params={"input_is_sharded": config.parallel.sequence})
    head_norm = ModuleSpec(RMSNorm, params={"input_is_sharded": config.parallel.tensor > 1})
    layers = []
    for index in range(config.model.layers):
        spec = get_gpt_layer_local_spec(qk_layernorm=config.model.qk_norm, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = layer_norm
        attention = spec.submodules.self_attention.submodules
        # None, where Megatron's own spec has a module that does nothing: self-attention splits and rotates in one pass then
        attention.q_layernorm = attention.k_layernorm = head_norm if config.model.qk_norm else None
        spec.submodules.self_attention.module = SelfAttention
        if config.attention.has_router_projections(index):
            spec.submodules.self_attention.module = RoutedSelfAttention
            attention.linear_qkv = qkv_and_routing
        attention.core_attention = functools.partial(
            CORE_ATTENTION[config.attention.kind_of(index)],
            attention=config.attention,
            context_comm=config.parallel.context_comm,
            recompute=config.training.recompute == "attention",
        )
        layer = TRANSFORMER_LAYERS.get(config.training.recompute, TransformerLayer)
        layers.append(ModuleSpec(module=layer, params=spec.params, submodules=spec.submodules))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=layer_norm)


def build_model(config: Config, vocab_size: int, device: torch.device | str = "cpu") -> DashGPTModel:
    """Build the model with its weights on `device`, float32; `init_weights` or a checkpoint fills them.

    Args:
        config: a checked run config.
        vocab_size: rows of the embedding table.
        device: "meta" builds shapes only.

    Raises:
        RuntimeError: Megatron's process groups do not exist yet; see `dash_megatron.parallel`.
    """
    if torch.device(device).type == "cuda":
        keep_triton_cache()
    with torch.device(device):
        model = DashGPTModel(
            config=_transformer_config(config),
            transformer_layer_spec=_block_spec(config),
            vocab_size=vocab_size,
            max_sequence_length=config.data.seq_length,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            rotary=PackedRotaryEmbedding(
                config.model.channels_per_head,
                config.model.rope_theta,
                config.model.rope_scaling,
                config.data.seq_length,
            ),
        )
    mark_splits(model)
    return model


@torch.no_grad()
def init_weights(model: DashGPTModel, seed: int, std: float) -> None:
    """Fill every weight: norms with 1, matrices from a normal distribution, the rest with 0.

    Each parameter draws from a generator seeded by `seed` and its own name, so that a weight depends neither on the
    other weights nor on the process that holds it: it draws the whole weight and keeps its tensor-parallel rank's shard.
    Projections into the residual stream use `std / sqrt(2 layers)`.
    """
    group = model.pg_collection.tp
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("linear_qkv.bias", "summary_query", "log_scaling", *ZERO_INITIALIZED)):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device=parameter.device).manual_seed(
                int.from_bytes(digest[:8], "big") >> 1
            )
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            split = split_of(parameter)
            whole = parameter.new_empty(whole_shape(parameter.shape, split, group.size()))
            whole.normal_(0.0, residual_std if into_residual else std, generator=generator)
            parameter.copy_(shard(whole, split, group.rank(), group.size()))


def dash_layers(model: torch.nn.Module) -> dict[int, DashCoreAttention]:
    """Core attentions with a router by layer, counted from 0."""
    return {m.layer_number - 1: m for m in model.modules() if isinstance(m, DashCoreAttention)}


def routing_means(model: torch.nn.Module) -> dict[int, RoutingMeans]:
    """Routing of the last forward pass by layer, counted from 0; layers with full attention have none."""
    return {
        module.layer_number - 1: module.routing
        for module in model.modules()
        if isinstance(module, CoreAttention) and module.routing is not None
    }


def take_context_bytes(model: torch.nn.Module) -> dict[int, tuple[int, int]]:
    """Bytes that this context-parallel rank sent in each layer, forward and backward, since the last call."""
    return {
        module.layer_number - 1: module.context_group.take_bytes()
        for module in model.modules()
        if isinstance(module, CoreAttention) and module.context_group is not None
    }
