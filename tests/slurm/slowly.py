"""Words before `python train.py ...`, as a container's are: train, with a pause after each step of a job's first starts.

Steps of the small model are too short to be interrupted on purpose. What a step computes stays as it is.
"""

import os
import runpy
import sys
import time


def main() -> None:
    """Run the script that follows the Python on the command line."""
    del sys.argv[:2]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    start, seconds = int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["STEP_SECONDS"].split()
    if start < len(seconds):
        from dash_megatron.training.trainer import Trainer

        step = Trainer.train_step

        def slow_step(trainer: Trainer) -> object:
            time.sleep(float(seconds[start]))
            return step(trainer)

        Trainer.train_step = slow_step  # type: ignore[method-assign, assignment]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
