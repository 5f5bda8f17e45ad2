"""The run's configuration: typed sections, the rules between them, and how YAML and overrides are read."""

from dash_megatron.config.attention import AttentionConfig
from dash_megatron.config.data import DataConfig
from dash_megatron.config.evaluation import TASK_NAMES, EvaluationConfig
from dash_megatron.config.loading import (
    ConfigError,
    config_from_dict,
    config_of_stored_run,
    load_config,
    read_rope_scaling,
)
from dash_megatron.config.model import ModelConfig, RopeScaling
from dash_megatron.config.operation import CheckpointConfig, FaultsConfig, LoggingConfig, WandbConfig
from dash_megatron.config.parallel import ParallelConfig, ZeroConfig
from dash_megatron.config.run import Config
from dash_megatron.config.section import Section, differences
from dash_megatron.config.topk import InfLLMv2Config, NSAConfig
from dash_megatron.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig

__all__ = [
    "TASK_NAMES",
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "InfLLMv2Config",
    "LoggingConfig",
    "ModelConfig",
    "NSAConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScaling",
    "ScheduleConfig",
    "Section",
    "TrainingConfig",
    "WandbConfig",
    "ZeroConfig",
    "config_from_dict",
    "config_of_stored_run",
    "differences",
    "load_config",
    "read_rope_scaling",
]
