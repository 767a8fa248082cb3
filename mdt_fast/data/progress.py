"""Progress of encoding or sampling: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINES = 20  # plain lines per run, approximately


class ImageProgress:
    """``with ImageProgress(...) as bar: bar.update(done)``: this process's images, rate and time left.

    ``what``: the title. Silent without a console. When the output is closed (a pipe), it goes quiet and the
    work continues.
    """

    def __init__(self, total: int, world: int, console: Console | None, what: str = "encoding"):
        self.console = console or Console(quiet=True)
        self.total = total
        self.title = what if world == 1 else f"{what}, rank 0 of {world}"
        self._began = time.perf_counter()
        self._next_line = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn(self.title), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(what, total=total, numbers="")

    def __enter__(self) -> "ImageProgress":
        self._began = time.perf_counter()
        if self._bar and self.total:
            self._or_quiet(self._bar.start)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar and self.total:
            self._or_quiet(self._bar.stop)

    def update(self, done: float) -> None:
        """Report that ``done`` images are done; a fraction counts partly done ones."""
        seconds = time.perf_counter() - self._began
        numbers = f"{done / seconds:.1f} images/s  {clock(seconds / done * (self.total - done))} left"
        if self._bar:
            bar, task = self._bar, self._task
            self._or_quiet(lambda: bar.update(task, completed=int(done), numbers=numbers))
        elif done >= self._next_line or done == self.total:
            self._next_line = done + max(1, self.total // LINES)
            line = f"{self.title}: {int(done)}/{self.total}  {numbers}"
            self._or_quiet(lambda: self.console.print(line, markup=False))

    def _or_quiet(self, show: Callable[[], None]) -> None:
        try:
            show()
        except (OSError, SystemExit):  # rich turns a broken pipe into SystemExit
            self.console.quiet = True


def clock(seconds: float) -> str:
    """Format seconds as ``1:02:03`` or ``2:03``; from one day on as ``3d 01:02``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    if days:
        return f"{days}d {rest:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
