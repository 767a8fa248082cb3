"""Reads batches ahead in threads while earlier ones are processed."""

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
    """Yield each of ``batches``, read, in order. ``begin`` submits a batch's parts to ``workers`` threads and
    returns a callable that waits for them; it is called, and may raise, when the batch is due."""
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
