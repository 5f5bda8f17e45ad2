"""The site file: what belongs to a cluster and to no run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from dash_megatron.config.loading import read_yaml

# options that submit.py has, or on which the batch script relies
_RESERVED = frozenset(
    "array chdir cpus-per-task dependency export gpus-per-node job-name nodes no-requeue ntasks "  # noqa: SIM905
    "ntasks-per-node open-mode output requeue signal time".split()
)


def _as_text(value: Any) -> Any:
    """Numbers of a YAML file are text to a shell; true and false are not the same to every program."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# what pydantic would say of Python, said of YAML
_RULES = {
    "tuple_type": "must be a list, such as [first, second]",
    "dict_type": "must be lines of NAME: value",
    "string_type": "must be text; put it in quotes",
}


class Site(BaseModel):
    """What belongs to a cluster; the comments of `slurm/site.yaml` explain the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sbatch: tuple[str, ...] = ()
    gpus: str = "--gpus-per-node={gpus}"
    cpus_per_process: int = Field(default=8, gt=0)
    warning_seconds: int = Field(default=300, gt=0, le=65535)
    modules: tuple[str, ...] = ()
    environment: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(default_factory=dict)
    setup: str = ""
    container: tuple[str, ...] = ()
    python: str | None = None
    srun: tuple[str, ...] = ()
    scratch: str = "/tmp"
    restarts: int = Field(default=3, ge=0)
    bad_node_days: int = Field(default=7, ge=0, le=36_500)

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            name = re.fullmatch(r"--([a-z][a-z-]*)(=\S+)?", option)
            if name is None:
                raise ValueError(f"{option!r} must be a long option without spaces, such as --partition=gpu")
            if name.group(1) in _RESERVED:
                raise ValueError(f"{option!r} must not be set here: submit.py sets --{name.group(1)}")
        return options

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, option: str) -> str:
        if "{gpus}" not in option or re.fullmatch(r"--[a-z-]+=\S+", option) is None:
            raise ValueError(f"{option!r} must be an option with {{gpus}} in it, such as --gres=gpu:{{gpus}}")
        return option

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, variables: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in variables if re.fullmatch(r"[A-Za-z_]\w*", name) is None]
        if wrong:
            raise ValueError(f"{wrong} must be names of variables: letters, digits and _")
        return variables


def load_site(path: Path) -> Site:
    """Read a site file.

    Raises:
        ValueError: unreadable, no YAML, an unknown key or a wrong value.
    """
    tree = read_yaml(path, f"--site {path}", "lines of key: value")
    try:
        return Site.model_validate(tree)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(f"{path}: {key} is not a known key; known are {', '.join(Site.model_fields)}")
            else:
                rule = _RULES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
                lines.append(f"{path}: {key}={problem['input']!r}: {rule}; slurm/site.yaml shows every key")
        raise ValueError("\n".join(lines)) from None
