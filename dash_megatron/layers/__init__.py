"""Megatron-core glue: core attention modules, layer specs and the GPT model."""

# before Megatron-core, which it imports faster
import dash_megatron.parallel  # noqa: F401
from dash_megatron.layers.baselines import InfLLMv2CoreAttention, NSACoreAttention
from dash_megatron.layers.core_attention import DashCoreAttention, FullCoreAttention, RoutingMeans
from dash_megatron.layers.model import (
    DashGPTModel,
    build_model,
    dash_layers,
    init_weights,
    routing_means,
    scoring,
    take_context_bytes,
)

__all__ = [
    "DashCoreAttention",
    "DashGPTModel",
    "FullCoreAttention",
    "InfLLMv2CoreAttention",
    "NSACoreAttention",
    "RoutingMeans",
    "build_model",
    "dash_layers",
    "init_weights",
    "routing_means",
    "scoring",
    "take_context_bytes",
]
