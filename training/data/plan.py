"""The plan: which examples make up each step, and how a step is dealt to processes.

Global batches are a pure function of (number of examples, their lengths, seed, epoch, train_batch_size): the number of
processes is not among its arguments, so no topology can change what is learned. A second pure function cuts one global
batch into micro-batches for the processes at hand. Nothing here knows torch; everything is numbers.

Order of an epoch: a keyed permutation (a Feistel network, O(1) memory) shuffles the examples; inside a window of
`length_window` global batches, the shuffled examples are sorted by length and cut, so that a global batch holds texts of
near-equal length; the batches of the window are then shuffled. Any step is found without visiting those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecurve.training.data.identity import digest_step
from onecurve.training.data.permutation import Indices, derive_key, permute

_MAX_EXAMPLES_PER_WINDOW = 2**20


@dataclass(frozen=True)
class Order:
    """The global batches of every epoch.

    Attributes:
        num_examples: examples in the training data.
        train_batch_size: examples in one step, over all processes.
        seed: of the shuffle.
        lengths: [num_examples] tokens of each example, possibly memory-mapped; None leaves the order purely random.
        length_window: global batches among which examples of near-equal length meet; fewer where the batches are so
            large that a window would hold more than a million examples, which bounds what a process keeps in memory.
    """

    num_examples: int
    train_batch_size: int
    seed: int
    lengths: NDArray[Any] | None = None
    length_window: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit each example once; the last may hold fewer than `train_batch_size`."""
        return -(-self.num_examples // self.train_batch_size)

    @property
    def _batches_per_window(self) -> int:
        return min(self.length_window, max(1, _MAX_EXAMPLES_PER_WINDOW // self.train_batch_size))

    def global_batch(self, step: int) -> Indices:
        """The examples of one step, shortest first. Costs the same for every step.

        Args:
            step: 0-based, counted through all epochs.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        window, batch_of_window = divmod(step_of_epoch, self._batches_per_window)
        return self._window(epoch, window)[batch_of_window]

    # Steps come in order, so the window of the last one is nearly always the window of the next.
    @lru_cache(maxsize=1)  # noqa: B019 - an Order lives as long as its training
    def _window(self, epoch: int, window: int) -> list[Indices]:
        size = self._batches_per_window * self.train_batch_size
        start, stop = window * size, min((window + 1) * size, self.num_examples)
        examples = permute(np.arange(start, stop), self.num_examples, derive_key(self.seed, epoch))
        generator = np.random.Generator(np.random.PCG64(derive_key(self.seed, epoch, window)))
        num_full, num_left = divmod(len(examples), self.train_batch_size)
        if self.lengths is not None:
            examples = examples[np.argsort(self.lengths[examples], kind="stable")]
        # The short batch is cut from a random place, or the epoch's last step would always see the longest texts.
        sizes = np.full(num_full, self.train_batch_size)
        short = int(generator.integers(num_full + 1))
        if num_left:
            sizes = np.insert(sizes, short, num_left)
        batches = np.split(examples, np.cumsum(sizes)[:-1])
        last = [batches.pop(short)] if num_left else []
        return [batches[number] for number in generator.permutation(num_full)] + last

    def __hash__(self) -> int:
        return id(self)


def cut(sorted_lengths: NDArray[Any], num_pieces: int, max_examples: int) -> NDArray[np.int64]:
    """Offsets that cut length-sorted examples into pieces of near-equal tokens.

    Args:
        sorted_lengths: [num_examples] tokens, ascending.
        num_pieces: pieces wanted; num_examples / max_examples <= num_pieces <= num_examples.
        max_examples: most examples in one piece.

    Returns:
        [num_pieces + 1] offsets, each piece with at least one example and at most `max_examples`.
    """
    num_examples = len(sorted_lengths)
    pieces = np.arange(num_pieces + 1)
    tokens = np.concatenate([[0], np.cumsum(sorted_lengths, dtype=np.int64)])
    targets = tokens[-1] * pieces / num_pieces
    offsets = np.searchsorted((tokens[1:] + tokens[:-1]) / 2, targets)  # An example goes where its middle lies.
    left_over = num_pieces - pieces
    lowest = np.maximum(pieces, num_examples - left_over * max_examples)
    highest = np.minimum(num_examples - left_over, pieces * max_examples)
    offsets = np.clip(offsets, lowest, highest)
    # Steps between offsets are now brought to 1 or more, then to max_examples or fewer; the clip keeps both possible.
    offsets = np.maximum.accumulate(offsets - pieces) + pieces
    return np.minimum.accumulate(offsets - pieces * max_examples) + pieces * max_examples


def cut_micro_batches(
    examples: Indices,
    lengths: NDArray[Any] | None,
    num_processes: int,
    max_examples: int,
    max_tokens: int | None = None,
    is_packed: bool = False,
) -> list[Indices]:
    """Cut one global batch into micro-batches, in the order in which they are dealt to processes 0, 1, ..., 0, 1, ...

    Every process gets the same number of them: DDP, FSDP and ZeRO-3 need the same number of forwards everywhere. With
    more processes than examples, some are empty.

    Args:
        examples: a global batch, shortest first.
        lengths: tokens of every example of the data; None counts each as one.
        num_processes: processes that share the batch.
        max_examples: most examples in a micro-batch.
        max_tokens: most tokens in a micro-batch, padding included.
        is_packed: whether its sequences lie one behind the other, so that there is no padding.

    Raises:
        ValueError: when one example alone is longer than `max_tokens`.
    """
    sorted_lengths = np.ones(len(examples), dtype=np.int64) if lengths is None else np.asarray(lengths[examples])
    if max_tokens is not None and sorted_lengths[-1] > max_tokens:
        raise ValueError(f"example {examples[-1]} has {sorted_lengths[-1]} tokens, more than {max_tokens}")
    at_least = -(-len(examples) // max_examples)
    if max_tokens is not None:
        at_least = max(at_least, -(-int(sorted_lengths.sum()) // max_tokens))
    num_pieces = -(-at_least // num_processes) * num_processes
    while num_pieces < len(examples):
        offsets = cut(sorted_lengths, num_pieces, max_examples)
        if max_tokens is None or count_tokens(sorted_lengths, offsets, is_packed).max() <= max_tokens:
            break
        num_pieces += num_processes
    else:  # One example each, and nothing for the processes that are left.
        num_pieces = -(-len(examples) // num_processes) * num_processes
        offsets = np.minimum(np.arange(num_pieces + 1), len(examples))
    pieces = np.split(examples, offsets[1:-1])
    # Every second round is dealt backwards, so that the longest texts don't always fall to the last process.
    rounds = [pieces[start : start + num_processes] for start in range(0, num_pieces, num_processes)]
    return [piece for number, dealt in enumerate(rounds) for piece in (dealt[::-1] if number % 2 else dealt)]


def count_tokens(sorted_lengths: NDArray[Any], offsets: NDArray[np.int64], is_packed: bool) -> NDArray[np.int64]:
    """[pieces] tokens that each piece takes in memory: those of its examples, or examples x longest in padded rows."""
    if is_packed:
        return np.diff(np.concatenate([[0], np.cumsum(sorted_lengths, dtype=np.int64)])[offsets])
    counts: NDArray[np.int64] = np.diff(offsets) * sorted_lengths[offsets[1:] - 1]
    return counts


@dataclass(frozen=True)
class Placement:
    """Where the examples of a micro-batch lie in its tensors, in numbers of the host.

    Attributes:
        lengths: [examples] tokens of the longest sequence of each, or [rows] where examples have different numbers of rows;
            None where they have none.
        sizes: padded lengths of their sequences.
        rows_per_example: rows of the model's tensors that belong to one example: several where there are choices. Where
            examples have different numbers of them, [examples].
        is_packed: sequences lie one behind the other in one row.
        pads_left: padding comes before the tokens.
    """

    lengths: NDArray[np.int64] | None = None
    sizes: frozenset[int] = frozenset()
    rows_per_example: int | NDArray[np.int64] = 1
    is_packed: bool = False
    pads_left: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once on one process, and what the loop must know of its step.

    Attributes:
        indices: examples to load. An empty micro-batch loads one stand-in, so that every process runs a forward.
        is_empty: the stand-in's loss counts as zero.
        step: 0-based step that this belongs to; -1 in an evaluation.
        epoch: 0-based epoch of that step; -1 in an evaluation.
        position: 0-based place among the micro-batches of its step on this process.
        num_micro_batches: how many of them there are.
        global_count: what the step's sum of losses is divided by: examples, or their weights, over all processes.
        num_examples: of the whole step, over all processes.
        num_tokens: of the whole step, without padding.
        num_padded_tokens: of the whole step, with padding.
        examples_digest: of the examples of the whole step (identity.py).
        placement: where its examples lie; the loader knows when it has collated them.
    """

    indices: Indices
    is_empty: bool = False
    step: int = -1
    epoch: int = -1
    position: int = 0
    num_micro_batches: int = 1
    global_count: float = 1.0
    num_examples: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    examples_digest: str = ""
    placement: Placement = Placement()

    @property
    def weight(self) -> float:
        """What the loss counts: a stand-in is run, because every process must, but teaches nothing."""
        return 0.0 if self.is_empty else 1.0

    @property
    def is_last(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return self.position + 1 == self.num_micro_batches


@dataclass(frozen=True)
class TrainingPlan:
    """All micro-batches from one step to another, in process order: number i is for process i mod `num_processes`.

    Attributes:
        order: the global batches.
        start_step: 0-based first step; a resumed run starts where its checkpoint ended.
        stop_step: 0-based step to end before.
        counts: [num_examples] what each example adds to its step's count (its class weight); None counts each as 1.
        draw_counts: of (examples, epoch) the counts of these [examples] in the epoch; None where they are `counts`.
        is_packed: whether the sequences of a micro-batch lie one behind the other, without padding.
        identities: [num_examples] digests of the examples' contents (identity.py); None knows examples by their numbers.
    """

    order: Order
    stop_step: int
    num_processes: int
    max_examples: int
    max_tokens: int | None = None
    counts: NDArray[Any] | None = None
    start_step: int = 0
    is_packed: bool = False
    draw_counts: Callable[[Indices, int], NDArray[Any] | None] = lambda examples, epoch: None
    identities: NDArray[Any] | None = None

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self.start_step, self.stop_step):
            yield from self.micro_batches(step)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step on all processes, in process order."""
        lengths = self.order.lengths
        examples = self.order.global_batch(step)
        pieces = cut_micro_batches(
            examples, lengths, self.num_processes, self.max_examples, self.max_tokens, self.is_packed
        )
        epoch = step // self.order.steps_per_epoch
        counts = self.draw_counts(examples, epoch)
        if counts is None and self.counts is not None:
            counts = self.counts[examples]
        count = float(len(examples) if counts is None else np.sum(counts, dtype=np.float64))
        digest = digest_step(examples, self.identities)
        num_tokens = num_padded_tokens = len(examples)
        if lengths is not None:
            num_tokens = num_padded_tokens = int(lengths[examples].sum())
            if not self.is_packed:
                num_padded_tokens = sum(len(piece) * int(lengths[piece[-1]]) for piece in pieces if len(piece))
        return [
            MicroBatch(
                indices=piece if len(piece) else examples[:1],
                is_empty=not len(piece),
                step=step,
                epoch=epoch,
                position=number // self.num_processes,
                num_micro_batches=len(pieces) // self.num_processes,
                global_count=count,
                num_examples=len(examples),
                num_tokens=num_tokens,
                num_padded_tokens=num_padded_tokens,
                examples_digest=digest,
            )
            for number, piece in enumerate(pieces)
        ]


@dataclass(frozen=True)
class EvaluationPlan:
    """Each example once, in micro-batches that do not depend on the number of processes, dealt whole.

    The same micro-batch gives the same bits wherever it is computed, so metrics are the same on any topology. Stand-ins
    fill the last round, so that every process runs the same number of forwards.
    """

    lengths: NDArray[Any]
    num_processes: int
    max_examples: int
    max_tokens: int | None = None
    is_packed: bool = False

    def __iter__(self) -> Iterator[MicroBatch]:
        number = 0
        for piece in self._pieces():
            yield MicroBatch(indices=piece)
            number += 1
        for _ in range(-number % self.num_processes):
            yield MicroBatch(indices=np.zeros(1, dtype=np.int64), is_empty=True)

    def __len__(self) -> int:
        number = sum(1 for _ in self._pieces())
        return -(-number // self.num_processes) * self.num_processes

    def _pieces(self) -> Iterator[Indices]:
        examples = np.argsort(self.lengths, kind="stable")
        tokens = np.asarray(self.lengths)[examples]
        start = 0
        while start < len(examples):
            stop = min(start + self.max_examples, len(examples))
            if self.max_tokens is not None:
                sizes = np.cumsum(tokens[start:stop])
                if not self.is_packed:
                    sizes = np.arange(1, stop - start + 1) * tokens[start:stop]
                stop = start + max(1, int(np.searchsorted(sizes, self.max_tokens, side="right")))
            yield examples[start:stop]
            start = stop
