"""Batches that depend only on (seed, step), so a resumed run sees exactly what an uninterrupted one sees.

The data is read as one endless stream: permutation 0 of all samples, then permutation 1, and so on. Step s
takes samples s*B to (s+1)*B of it. Every sample occurs once per epoch; a batch may span two epochs, and
nothing is dropped.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .ahead import read_ahead
from .images import ImageSet

CHUNK = 32  # most rows per thread task: reading a row of latents costs less than dispatching a task
# The purpose of a random stream is part of its seed, so that no two streams are the same.
ORDER, FLIP, CROP = 1, 2, 3

Batch = tuple[Tensor, Tensor]
"""x [b, ...] float32 and y [b] int64."""


class Loader:
    """``loader.batches(first, last)`` yields x [b, ...] float32 as returned by the set's ``load``, and y [b]
    int64 (CPU): this process's ``rows`` (default: all) of each batch of ``batch_size`` samples. ``pinned``:
    in pinned memory, so that copies to a GPU do not block the host.

    Raises ``UserError`` for a ``batch_size`` or number of workers below 1.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        rows: slice | None = None,
        pinned: bool = False,
    ):
        if batch_size < 1:
            raise UserError(f"train.batch_size: got {batch_size}, expected 1 or more")
        if config.workers < 1:
            raise UserError(f"data.workers: got {config.workers}, expected 1 or more")
        self.images, self.config, self.batch_size, self.seed = images, config, batch_size, seed
        self.rows = slice(0, batch_size) if rows is None else rows
        self.pinned = pinned
        self.unreadable: dict[int, str] = {}
        """The errors of the samples skipped so far (``on_unreadable="skip"``)."""
        self._order: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> list[int]:
        """The samples of this process's rows of batch ``step``."""
        first = step * self.batch_size
        return [self._sample(first + row) for row in range(self.batch_size)[self.rows]]

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps ``first`` to ``last - 1``; a bad file raises ``UserError`` when it is due."""
        if self.images.in_memory:
            for step in range(first, last):
                batch, samples = self._empty(), self._samples(step)
                self._fill(*batch, 0, samples)
                yield batch
            return
        yield from read_ahead(range(first, last), self._begin, self.config.workers)

    def _begin(self, step: int, pool: Executor) -> Callable[[], Batch]:
        """Start filling batch ``step`` in ``pool``; returns a callable that waits for it."""
        batch, samples = self._empty(), self._samples(step)
        chunk = min(CHUNK, -(-len(samples) // self.config.workers))
        starts = range(0, len(samples), chunk)
        chunks = [pool.submit(self._fill, *batch, at, samples[at : at + chunk]) for at in starts]

        def filled() -> Batch:
            for done in chunks:
                done.result()
            return batch

        return filled

    def _empty(self) -> Batch:
        rows = len(range(self.batch_size)[self.rows])
        x = torch.empty(rows, *self.images.shape, pin_memory=self.pinned)
        return x, torch.empty(rows, dtype=torch.int64, pin_memory=self.pinned)

    def _fill(self, x: Tensor, y: Tensor, first: int, samples: list[tuple[int, int, bool]]) -> None:
        """Load samples into consecutive rows of a batch, starting at ``first``."""
        values, labels = x.numpy(), y.numpy()
        for row, sample in enumerate(samples, first):
            values[row], labels[row] = self._load(*sample)

    def _sample(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.images.labels))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._order = epoch, rng.permutation(len(self.images.labels))
        return int(self._order[1][offset])

    def _samples(self, step: int) -> list[tuple[int, int, bool]]:
        """(sample, seed of its random crop, whether it is mirrored) for each own row of batch ``step``.

        Drawn for the whole batch, so it does not matter which process has a row.
        """
        crops = np.random.SeedSequence([self.seed, CROP, step]).generate_state(self.batch_size, np.uint64)
        mirrored = np.zeros(self.batch_size, dtype=bool)
        if self.config.flip:
            mirrored = np.random.default_rng([self.seed, FLIP, step]).random(self.batch_size) < 0.5
        own = self.rows
        return list(zip(self.indices(step), map(int, crops[own]), map(bool, mirrored[own])))

    def _load(self, index: int, crop_seed: int, mirror: bool) -> tuple[np.ndarray, int]:
        """Values and label. With ``on_unreadable="skip"`` a bad file is replaced by the first good one from a
        random position on, so that no single file replaces many adjacent bad ones."""
        total, start = len(self.images.labels), index
        attempts = 1 if self.config.on_unreadable == "stop" else total + 1
        for attempt in range(attempts):
            current = (start + attempt) % total
            try:
                label = int(self.images.labels[current])
                return self.images.load(current, random.Random(crop_seed), mirror), label
            except UserError as error:
                if attempt + 1 == attempts:
                    raise
                self.unreadable[current] = str(error)
                if not attempt:
                    start = random.Random(crop_seed).randrange(total)
        raise AssertionError("unreachable: the last attempt returns or raises")
