"""Where a recipe runs: finds the machine, chooses a topology, starts and minds `accelerate launch`.

Never imports torch, transformers, accelerate or datasets: its help answers at once.
"""
