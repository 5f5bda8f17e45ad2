"""Checks of a run's machines, data and layout before the run, and of a batch that broke it afterwards.

`command.py` is what `python -m dash_megatron doctor` runs; `runner.py` runs checks and lets processes agree on their
outcome; every other module is a check, or what checks share.
"""
