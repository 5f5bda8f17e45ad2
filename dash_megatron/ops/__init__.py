"""The attention method on plain tensors: torch and Triton only."""

from dash_megatron.ops.attention import dash_attention
from dash_megatron.ops.cache import DashCache
from dash_megatron.ops.decode import dash_decode
from dash_megatron.ops.entmax import entmax
from dash_megatron.ops.types import Router, Routing

__all__ = ["DashCache", "Router", "Routing", "dash_attention", "dash_decode", "entmax"]
