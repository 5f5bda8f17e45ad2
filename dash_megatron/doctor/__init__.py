"""Checks of a run's machines, data and layout before the run, and of a batch that broke it afterwards.

`examine.py` is what `python -m dash_megatron doctor` runs. `runner.py` runs checks with a time limit each and lets
processes agree on their outcome, `session.py` is a process among the others, `small.py` a model to compute with; every
other module is a check, and `replay.py` computes a kept batch again.
"""
