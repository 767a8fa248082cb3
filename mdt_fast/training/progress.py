"""A run's progress output: a live display on a terminal, plain lines elsewhere, a table at the end."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..data.progress import clock

LINES = 20  # plain lines per run, approximately
QUIET_SECONDS = 600  # a long run prints more: at least one line every ten minutes, if there are new numbers
RECENT_STEPS = 1000
NARROWEST_BAR = 10


class TrainingProgress:
    """``with TrainingProgress(...) as bar: bar.update(step, row)``; ``bar.say(text)`` prints above it.

    ``first``: updates already done at the start; ``last``: updates done when the run is complete. ``quiet``:
    print nothing (ranks other than 0). When the output is closed (a pipe or terminal), it goes quiet and
    training continues. ``peak_memory_gib``: the maximum of all rows so far.
    """

    def __init__(self, first: int, last: int, console: Console | None = None, *, quiet: bool = False):
        if quiet:
            console = Console(quiet=True)
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.first, self.last, self.quiet = first, last, quiet
        self.peak_memory_gib: float | None = None
        self._next_line, self._line_at = first, time.monotonic()
        self._status = _Status(first, last)
        self._live: Live | None = None
        if self.console.is_interactive and not quiet:
            self._live = Live(get_renderable=lambda: self._status, console=self.console, refresh_per_second=4)

    def __enter__(self) -> "TrainingProgress":
        self._status.began = self._line_at = time.monotonic()
        if self._live:
            with self._or_quiet():
                self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            with self._or_quiet():
                self._live.stop()

    def say(self, text: str) -> None:
        with self._or_quiet():
            self.console.print(text, markup=False)

    def update(self, step: int, row: dict[str, Any] | None = None) -> None:
        """Report that ``step`` updates are done; ``row``: the latest row of metrics, if it is new."""
        now = time.monotonic()
        self._status.add(step, now)
        if not row:
            return
        self._status.row = row
        if (memory := row.get("memory_gib")) is not None:
            self.peak_memory_gib = max(memory, self.peak_memory_gib or 0.0)
        if self._live or self.quiet:
            return
        if step >= self._next_line or step == self.last or now - self._line_at >= QUIET_SECONDS:
            self._next_line = step + max(1, (self.last - self.first) // LINES)
            self._line_at = now
            parts = (f"step {step}/{self.last}", describe_loss(row), describe_speed(row))
            self.say("  ".join((*filter(None, parts), f"{self._status.left()} left")))

    @contextmanager
    def _or_quiet(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SystemExit):  # rich turns a broken pipe into SystemExit
            self.console.quiet = True


class Rate:
    """Seconds per step, estimated from the later half of the steps seen (at most the last 500).

    One-off costs at the start, such as compilation, thus drop out soon.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def add(self, step: int, now: float) -> None:
        """Record that ``step`` updates were done at the time ``now``, in seconds."""
        if self._seen and step < self._seen[-1][0]:  # the run went back
            self._seen.clear()
        if not self._seen or step > self._seen[-1][0]:
            self._seen.append((step, now))

    def seconds_per_step(self) -> float | None:
        """The estimate; None until it has seen a step."""
        if len(self._seen) < 2:
            return None
        (step, at), (newest, now) = self._seen[(len(self._seen) - 1) // 2], self._seen[-1]
        return (now - at) / (newest - step)


class _Status:
    """The live display: bar, steps and times, then the newest row's numbers. It uses two lines if one is too
    narrow, and drops the least important numbers if even that is not enough."""

    def __init__(self, first: int, last: int):
        self.step, self.last, self.row = first, last, dict[str, Any]()
        self.began = time.monotonic()
        self._rate = Rate()
        self._rate.add(first, self.began)

    def add(self, step: int, now: float) -> None:
        self.step = step
        self._rate.add(step, now)

    def left(self) -> str:
        """The time left as a clock; ``?`` before the speed is known."""
        seconds = self._rate.seconds_per_step()
        return "?" if seconds is None else clock(seconds * (self.last - self.step))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        times = f"{self.step}/{self.last}  {clock(time.monotonic() - self.began)} < {self.left()}"
        numbers = _fitting(self._numbers(), width)
        if NARROWEST_BAR + cell_len(times) + cell_len(numbers) + 4 <= width:
            times, numbers = "  ".join(filter(None, (times, numbers))), ""
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self.last, 1), completed=self.step)
        line.add_row(bar, Text(times, no_wrap=True))
        yield line
        if numbers:
            yield Text(numbers, no_wrap=True, overflow="ellipsis")

    def _numbers(self) -> list[str]:
        """The newest row's numbers, most important first."""
        if not self.row:
            return []
        lr = [f"lr {self.row['lr']:.3g}"] if "lr" in self.row else []
        return [describe_loss(self.row), *speed_parts(self.row), *lr]


def _fitting(parts: Sequence[str], width: int) -> str:
    """``parts`` in one line of ``width`` cells: in full, shortened, or without the last ones."""
    if cell_len("  ".join(parts)) > width:
        parts = [part.replace(" of peak", "") for part in parts]
    text = parts[0] if parts else ""
    for part in islice(parts, 1, None):
        if cell_len(text) + 2 + cell_len(part) <= width:
            text += "  " + part
    return text


def describe_loss(row: dict[str, Any]) -> str:
    """The mean loss over all tokens and, for a model with masking, that of the masked pass."""
    if "loss" not in row:
        return "no finite loss"
    masked = f" (masked {row['m_loss']:.4f})" if "m_loss" in row else ""
    return f"loss {row['loss']:.4f}{masked}"


def describe_speed(row: dict[str, Any]) -> str:
    """The result of :func:`speed_parts` in one line."""
    return "  ".join(speed_parts(row))


def speed_parts(row: dict[str, Any]) -> list[str]:
    """Those of these that the row has: images per second over all processes; TFLOP/s of one GPU, with its
    share of the data-sheet peak; memory."""
    parts = []
    if (images := row.get("img_per_s")) is not None:
        parts.append(f"{_number(images, 10)} img/s")
    if (tflop := row.get("tflop_per_s")) is not None:
        share = row.get("share_of_peak")
        of_peak = "" if share is None else f" ({share:.0%} of peak)"
        rate = f"{_number(tflop)} TFLOP/s" if tflop >= 0.1 else f"{_number(tflop * 1000)} GFLOP/s"
        parts.append(rate + of_peak)
    if (memory := row.get("memory_gib")) is not None:
        parts.append(f"{memory:.1f} GiB")
    return parts


def summary(
    row: dict[str, Any],
    steps: int,
    seconds: float,
    *,
    batch_size: int,
    first: int = 0,
    num_images: int | None = None,
    world_size: int = 1,
    peak_memory_gib: float | None = None,
    files: Sequence[object] = (),
) -> list[str]:
    """The table at the end of a run, as lines.

    ``row``: the last row of metrics (may be empty). ``steps``: updates done, of ``batch_size`` images each
    (over all processes); ``first`` of them were done before this process began, ``seconds`` ago.
    ``num_images``: size of the training set, to count epochs. ``files``: paths of the results. The mean speed
    covers everything since the start, including compilation, checkpoints and pictures. Print the table after
    the progress display is closed.
    """
    images, here = steps * batch_size, (steps - first) * batch_size
    epochs = images / num_images if num_images else None
    table = [("steps", f"{steps:,}" + (f" ({steps - first:,} since resuming)" if first else ""))]
    seen = f"{images:,}" + ("" if epochs is None else f" ({epochs:.4g} epochs)")
    table += [("images seen", seen), ("time", clock(seconds))]
    if here and seconds > 0:
        mean = here / seconds
        speed = {"img_per_s": mean}
        if row.get("img_per_s"):  # a row's other speeds belong to its images per second
            for key in ("tflop_per_s", "share_of_peak"):
                if key in row:
                    speed[key] = row[key] * mean / row["img_per_s"]
        text = describe_speed(speed)
        each = " in each process" if world_size > 1 and "tflop_per_s" in speed else ""
        table.append(("mean speed", f"{text}{each}, including start, saving and pictures"))
    if peak_memory_gib is None:
        peak_memory_gib = row.get("memory_gib")
    if peak_memory_gib is not None:
        table.append(("peak memory", f"{peak_memory_gib:.1f} GiB"))
    if "loss" in row:
        table.append(("final loss", describe_loss(row).removeprefix("loss ")))
    if "skipped" in row:
        table.append(("skipped steps", f"{row['skipped']:,}"))
    table += [("files" if i == 0 else "", str(name)) for i, name in enumerate(files)]
    width = max(len(label) for label, _ in table)
    return [f"{label:<{width}}  {value}" for label, value in table]


def _number(value: float, whole_from: float = 100) -> str:
    """An integer from ``whole_from`` on, else three significant digits."""
    return f"{value:.0f}" if value >= whole_from else f"{value:.3g}"
