"""DashAttention pretraining: Megatron-core models with adaptive sparse attention, trained under DeepSpeed ZeRO."""

import warnings

__version__ = "0.1.0"

# Megatron-core tells of every accelerator library it does without; none of them is needed here
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# DeepSpeed calls collectives by names that recent torch wants to retire
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
