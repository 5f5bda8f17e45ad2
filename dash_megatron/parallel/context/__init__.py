"""Context parallelism: how one sequence is split over ranks, how ranks communicate, and how attention exchanges keys."""
