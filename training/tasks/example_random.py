"""Random numbers of an example in an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# The epoch of every evaluation: what is drawn for it is always the same.
EVALUATION_EPOCH = -1


def build_generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    """Random numbers of one example in one epoch, whichever process, batch, worker or start draws them.

    A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): seed and epoch are its key,
    and each example has 2^192 blocks of its own.

    Args:
        epoch: from 0, or EVALUATION_EPOCH.
        number: of the example in its split.
    """
    import numpy as np

    key = np.array([seed, epoch % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=number << 192))
