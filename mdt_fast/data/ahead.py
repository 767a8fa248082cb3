"""Batches that threads read while the ones before them are worked on."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 2  # batches read ahead of the one in use

Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(
    batches: Iterable[Item], begin: Callable[[Item, Executor], Callable[[], Read]], workers: int
) -> Generator[Read, None, None]:
    """Each of ``batches`` in turn, as it was read: ``begin`` hands its parts to ``workers`` threads and
    returns what waits for them, which is called, and may raise, when the batch is due."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    reading: deque[Callable[[], Read]] = deque()
    try:
        for batch in batches:
            reading.append(begin(batch, pool))
            if len(reading) > AHEAD:
                yield reading.popleft()()
        while reading:
            yield reading.popleft()()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
