"""A run to examine."""

from collections.abc import Iterator
from typing import Any

import pytest

from dash_megatron.config import Config, config_from_dict
from dash_megatron.doctor.session import Session
from dash_megatron.parallel import Launch, destroy_process_groups


@pytest.fixture
def config(tiny_config: dict[str, Any]) -> Config:
    return config_from_dict(tiny_config)


@pytest.fixture
def session(config: Config) -> Iterator[Session]:
    """The test's own process, alone."""
    yield Session(config, Launch(rank=0, world_size=1, local_rank=0))
    destroy_process_groups()
