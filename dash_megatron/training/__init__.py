"""Training: the trainer, the DeepSpeed engine, schedules, checkpoints and metrics."""
