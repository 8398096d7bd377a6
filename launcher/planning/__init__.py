"""Arithmetic on the facts: memory, steps, time, and the topology that follows."""
