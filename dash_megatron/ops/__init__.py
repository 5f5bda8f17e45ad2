"""The attention method on plain tensors: torch and Triton only."""

from dash_megatron.ops.attention import Routing, dash_attention
from dash_megatron.ops.entmax import entmax

__all__ = ["Routing", "dash_attention", "entmax"]
