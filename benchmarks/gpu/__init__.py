"""What holds on a machine with GPUs: the invariants, exact resume, waits, speed, memory and checkpoints, measured at once."""
