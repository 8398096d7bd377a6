"""Strategies (DDP, FSDP2, DeepSpeed), and the states that they hold."""
