"""Context parallelism: how one sequence is laid out over ranks, how ranks communicate, and how attention exchanges keys."""
