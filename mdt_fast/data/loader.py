"""Batches that depend on (seed, step) alone, so that a resumed run sees exactly what the unbroken one saw.

The data is read as one endless stream: permutation 0 of all samples, then permutation 1, and so on. Step s
takes samples s*B to (s+1)*B of it. Every sample occurs once per epoch; a batch may straddle two epochs,
nothing is dropped.
"""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .images import ImageSet

AHEAD = 2  # batches decoded ahead of the one in use
# What a random stream is for: part of its seed, so that no two streams are the same.
ORDER, FLIP, CROP = 1, 2, 3


class Loader:
    """``loader.batches(first, last)`` yields x [b, ...] float32 as the set's ``load`` gives it, and y [b]
    int64 (CPU): of each batch of ``batch_size`` samples the ``rows`` of this process (default: all).

    Raises ``UserError`` for impossible numbers.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        rows: slice | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"train.batch_size: must be at least 1, got {batch_size}")
        if config.workers < 1:
            raise UserError(f"data.workers: must be at least 1, got {config.workers}")
        self.images, self.config, self.batch_size, self.seed = images, config, batch_size, seed
        self.rows = slice(0, batch_size) if rows is None else rows
        self._order: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> list[int]:
        """The samples of this process's rows of batch ``step``."""
        first = step * self.batch_size
        return [self._sample(first + row) for row in range(self.batch_size)[self.rows]]

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps ``first`` to ``last - 1``; a bad file raises ``UserError`` when it is due."""
        if self.images.in_memory:
            for step in range(first, last):
                yield _collate([self._load(*sample) for sample in self._samples(step)])
            return
        pool = ThreadPoolExecutor(self.config.workers, thread_name_prefix="decode")
        waiting: deque[list[Future]] = deque()
        try:
            for step in range(first, last + AHEAD):
                if step < last:
                    waiting.append([pool.submit(self._load, *sample) for sample in self._samples(step)])
                if step >= first + AHEAD and waiting:
                    yield _collate([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _sample(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.images.labels))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._order = epoch, rng.permutation(len(self.images.labels))
        return int(self._order[1][offset])

    def _samples(self, step: int) -> list[tuple[int, int, bool]]:
        """(sample, seed of its random crop, whether it is mirrored) of every row of batch ``step``.

        Drawn for the whole batch: which process has a row changes nothing.
        """
        crops = np.random.SeedSequence([self.seed, CROP, step]).generate_state(self.batch_size, np.uint64)
        mirrored = np.zeros(self.batch_size, dtype=bool)
        if self.config.flip:
            mirrored = np.random.default_rng([self.seed, FLIP, step]).random(self.batch_size) < 0.5
        own = self.rows
        return list(zip(self.indices(step), map(int, crops[own]), map(bool, mirrored[own])))

    def _load(self, index: int, crop_seed: int, mirror: bool) -> tuple[np.ndarray, int]:
        """Values and label; with ``on_unreadable="skip"`` a bad file is replaced by the next good one."""
        total = len(self.images.labels)
        attempts = 1 if self.config.on_unreadable == "stop" else total
        for attempt in range(attempts):
            current = (index + attempt) % total
            try:
                label = int(self.images.labels[current])
                return self.images.load(current, random.Random(crop_seed), mirror), label
            except UserError:
                if attempt + 1 == attempts:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")


def _collate(rows: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.stack([values for values, _ in rows]))
    return x, torch.tensor([label for _, label in rows])
