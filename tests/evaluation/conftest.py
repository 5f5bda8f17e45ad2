"""Exports to evaluate; imported first, since it says where transformers keeps its files before that is imported."""

from tests.hf.conftest import write_run  # noqa: F401
