"""What a run reads, looked for before its job is queued: a job that misses it would say so only when its turn comes."""

from __future__ import annotations

from pathlib import Path

from status import newest_checkpoint

from dash_megatron.config import Config
from dash_megatron.data.blend import check_data_of
from dash_megatron.files import error_text, path_for_message

# of a folder of `convert from-hf`, whose module brings torch
MODEL_SECTIONS = "model.yaml"
LATER = "; with --inputs-later what the job reads need not be here when it is submitted"


def check_inputs(config: Config) -> None:
    """Check the tokenizer, the data and the initial weights of a run, as far as its start does without a model.

    Raises:
        ValueError: something is missing, or is not what the config says.
    """
    try:
        check_data_of(config)
    except (OSError, ValueError) as error:
        raise ValueError(error_text(error) + (LATER if isinstance(error, OSError) else "")) from error
    start = config.training.init_from
    # a run that resumes does not read it
    if start is None or newest_checkpoint(Path(config.run_dir)) or newest_checkpoint(Path(start)):
        return
    if not (Path(start) / MODEL_SECTIONS).is_file():
        raise ValueError(
            f"training.init_from={path_for_message(start)} must be the folder of a run that has saved, or one of `python -m "
            f"dash_megatron convert from-hf`; correct it, or wait for a job that makes it with --dependency afterok:JOB{LATER}"
        )
