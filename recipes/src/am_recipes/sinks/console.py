"""The run on the terminal: a bar that moves, or where output is no terminal a line every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from am_recipes.sinks.sink import Row
from am_recipes.sinks.text import duration

# Of the bar, with a space around it.
_SHORTEST_BAR = 8


class Console:
    """Facts, steps and validations as text, each step on one line of the terminal however narrow that is.

    Args:
        total_steps: optimizer steps of the whole run, including those done before a resume.
        print_every: where output is no terminal, a line is printed each so many steps.
        console: where to print; standard output by default.
        clock: seconds from any fixed moment.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        print_every: int = 10,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._print_every = print_every
        self._console = console if console is not None else rich.console.Console(soft_wrap=True, highlight=False)
        self._display: tuple[Progress, TaskID] | None = None
        self._clock = clock
        # When the first step of this launch had ended, and how many were done then.
        self._first: tuple[float, int] | None = None

    def note(self, fact: str) -> None:
        self._console.print(fact, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: Row) -> None:
        step = int(row["step"])
        left = self._time_left(step)
        if self._console.is_terminal:
            numbers = _line(row, self._total_steps, left, self._console.width - _SHORTEST_BAR)
            if self._display is None:
                self._display = _start_display(self._console, numbers, self._total_steps)
            progress, task = self._display
            progress.update(task, completed=step, description=numbers)
        elif step % self._print_every == 0 or step in (1, self._total_steps):
            self.note(_line(row, self._total_steps, left, self._console.width))

    def validation(self, row: Row) -> None:
        losses = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
        self.note(f"step {row['step']}/{self._total_steps}  {losses}")

    def close(self, status: str) -> None:
        """End the bar. The status is printed by the log, which knows what comes next."""
        if self._display is not None:
            self._display[0].stop()
            self._display = None

    def _time_left(self, step: int) -> str | None:
        """As the steps of this launch went so far, with all that came between them; None while nobody knows."""
        now = self._clock()
        if self._first is None:
            self._first = now, step
        began, first = self._first
        return duration(round((now - began) / (step - first) * (self._total_steps - step))) if step > first else None


def _line(row: Row, total_steps: int, left: str | None, width: int) -> str:
    """A step in at most `width` characters: what matters least is left out first, the step and its loss never."""
    parts = {
        "step": f"step {row['step']}/{total_steps}",
        "loss": f"loss {row['loss']:.4f}",
        "left": f"{left} left" if left is not None else "",
        "speed": f"{row['tokens_per_second']:,.0f} tokens/s",
        "lr": f"lr {row['lr']:.2e}",
        "norm": f"grad norm {row['grad_norm']:.3f}",
        "memory": f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        "epoch": f"epoch {row['epoch']}",
    }
    kept = ["step", "loss"]
    for name in parts:
        if name not in kept and parts[name] and len(_joined(parts, [*kept, name])) <= width:
            kept.append(name)
    return _joined(parts, kept)


def _joined(parts: dict[str, str], names: list[str]) -> str:
    order = ("step", "epoch", "loss", "norm", "lr", "speed", "memory", "left")
    return "  ".join(parts[name] for name in order if name in names)


def _start_display(console: rich.console.Console, numbers: str, total_steps: int) -> tuple[Progress, TaskID]:
    # The bar takes the room that the numbers leave.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
    progress = Progress(*columns, console=console, expand=True)
    task = progress.add_task(numbers, total=total_steps)
    progress.start()
    return progress, task
