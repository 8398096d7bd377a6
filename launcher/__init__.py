"""Where a recipe runs: detects the machine, chooses a topology, starts `accelerate launch` and supervises it.

Never imports torch, transformers, accelerate or datasets, so its help answers in less than 0.2 s.
"""
