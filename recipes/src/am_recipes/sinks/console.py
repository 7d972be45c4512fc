"""The run on the terminal: a bar that moves, or where output is no terminal a line every few steps."""

from __future__ import annotations

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from am_recipes.sinks.sink import Row


class Console:
    """Facts, steps and validations as text.

    Args:
        total_steps: optimizer steps of the whole run, including those done before a resume.
        print_every: where output is no terminal, a line is printed each so many steps.
        console: where to print; standard output by default.
    """

    def __init__(self, total_steps: int, *, print_every: int = 10, console: rich.console.Console | None = None) -> None:
        self._total_steps = total_steps
        self._print_every = print_every
        self._console = console if console is not None else rich.console.Console(soft_wrap=True, highlight=False)
        self._display: tuple[Progress, TaskID] | None = None

    def note(self, fact: str) -> None:
        self._console.print(fact, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: Row) -> None:
        numbers = (
            f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        step = int(row["step"])
        if self._console.is_terminal:
            if self._display is None:
                self._display = _start_display(self._console, self._total_steps, step - 1)
            progress, task = self._display
            progress.update(task, completed=step, numbers=numbers)
        elif step % self._print_every == 0 or step in (1, self._total_steps):
            memory = row["peak_memory_bytes"] / 2**30
            self.note(f"step {step}/{self._total_steps}  epoch {row['epoch']}  {numbers}  {memory:.2f} GiB")

    def validation(self, row: Row) -> None:
        losses = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
        self.note(f"step {row['step']}/{self._total_steps}  {losses}")

    def close(self, status: str) -> None:
        """End the bar. The status is printed by the log, which knows what comes next."""
        if self._display is not None:
            self._display[0].stop()
            self._display = None


def _start_display(console: rich.console.Console, total_steps: int, steps_done: int) -> tuple[Progress, TaskID]:
    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    task = progress.add_task("train", total=total_steps, completed=steps_done, numbers="")
    progress.start()
    return progress, task
