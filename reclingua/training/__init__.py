"""Training: arguments, Trainer, callbacks, checkpoints, DeepSpeed, throughput."""
