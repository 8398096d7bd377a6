"""How fast a processor multiplies matrices in float32 and in bf16, and when bf16 is too slow to train in.

A processor without bf16 arithmetic (AVX2) emulates it one number at a time: a product was measured 168 times slower than in
float32. No list of processors knows that for PyTorch's every version, so a product of each is timed (parallel/product_timing.py).
"""

from __future__ import annotations

from dataclasses import dataclass

# Beyond this, a training in bf16 takes so much longer than one in float32 that nobody can have meant it.
MAX_SLOWDOWN = 3.0


@dataclass(frozen=True)
class ProductRates:
    """What a matrix product on one thread reaches, in operations a second.

    Attributes:
        float32, bf16: of matrices in that precision.
    """

    float32: float
    bf16: float

    @property
    def slowdown(self) -> float:
        """How many times longer a product takes in bf16 than in float32; below 1 where bf16 is faster."""
        return self.float32 / self.bf16

    @property
    def is_too_slow(self) -> bool:
        """Whether bf16 is beyond `MAX_SLOWDOWN`."""
        return self.slowdown > MAX_SLOWDOWN

    def describe(self) -> str:
        """The ratio in words, with both rates."""
        ratio, word = (self.slowdown, "slower than") if self.slowdown > 1 else (1 / self.slowdown, "as fast as")
        shown = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
        return (
            f"a matrix product in bf16 is {shown} times {word} in float32 on this processor "
            f"({self.bf16 / 1e9:,.3g} and {self.float32 / 1e9:,.3g} GFLOP/s a thread)"
        )

    def find_problem(self) -> str | None:
        """Why `mixed_precision: bf16` must not be trained in here; None if it may."""
        if not self.is_too_slow:
            return None
        return (
            f"mixed_precision: {self.describe()}; use no, or allow it with allow_slow_bf16: true (onecurve run --yes)"
        )
