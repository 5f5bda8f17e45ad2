"""Training: the trainer, the DeepSpeed engine, the learning rate, faults, validation and metrics."""
