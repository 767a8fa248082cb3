"""A progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20  # plain lines per run, about


class TrainingProgress:
    """``with TrainingProgress(...) as bar: bar.update(step, row)``; ``bar.say(text)`` prints above it.

    When nobody reads any more (a closed pipe or terminal), it goes quiet: training goes on.
    """

    def __init__(self, first: int, last: int, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.first, self.last = first, last
        self._began = time.perf_counter()
        self._next_line = first
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("training"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=last, completed=first, numbers="")

    def __enter__(self) -> "TrainingProgress":
        self._began = time.perf_counter()
        if self._bar:
            with self._or_quiet():
                self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            with self._or_quiet():
                self._bar.stop()

    def say(self, text: str) -> None:
        with self._or_quiet():
            self.console.print(text, markup=False)

    def update(self, step: int, row: dict[str, Any] | None = None) -> None:
        """``step`` updates are done; ``row`` is the latest of the metrics, if there is a new one."""
        numbers = f"{describe_loss(row)}  {row['img_per_s']:.0f} img/s" if row else None
        if self._bar:
            with self._or_quiet():
                self._bar.update(self._task, completed=step)
                if numbers:
                    self._bar.update(self._task, numbers=numbers)
        elif numbers and (step >= self._next_line or step == self.last):
            self._next_line = step + max(1, (self.last - self.first) // LINES)
            left = (time.perf_counter() - self._began) / (step - self.first) * (self.last - step)
            self.say(f"step {step}/{self.last}  {numbers}  {_clock(left)} left")

    @contextmanager
    def _or_quiet(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SystemExit):  # rich makes SystemExit of a broken pipe
            self.console.quiet = True


def describe_loss(row: dict[str, Any]) -> str:
    """The mean loss over all tokens and, of a model with masks, that of the masked pass."""
    if "loss" not in row:
        return "no finite loss"
    masked = f" (masked {row['m_loss']:.4f})" if "m_loss" in row else ""
    return f"loss {row['loss']:.4f}{masked}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
