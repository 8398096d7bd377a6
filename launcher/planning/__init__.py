"""Arithmetic on the facts: memory, steps, time, and the choice of a topology."""
