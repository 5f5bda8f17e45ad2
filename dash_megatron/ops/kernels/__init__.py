"""Triton kernels of DashAttention; `dash.py` holds the entry point, `sharded.py` the stages."""

from dash_megatron.ops.kernels.interpreter import repair_interpreter

repair_interpreter()
