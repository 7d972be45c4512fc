"""What a run prints, on a terminal and elsewhere."""

from __future__ import annotations

import io
import itertools
import re

import pytest
import rich.console

from am_recipes.sinks import Console, Row


def start(total_steps: int, *, terminal: bool = False, width: int = 120) -> tuple[Console, io.StringIO]:
    """A console whose clock goes on by seven seconds from step to step."""
    output, seconds = io.StringIO(), itertools.count(0.0, 7.0)
    console = rich.console.Console(file=output, force_terminal=terminal, width=width)
    return Console(total_steps, console=console, clock=lambda: next(seconds)), output


def row(step: int) -> Row:
    return {
        "step": step,
        "epoch": 0,
        "loss": 2.5,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "tokens_per_second": 200.0,
        "peak_memory_bytes": 3 * 2**29,
    }


def test_plain_output_has_a_line_every_few_steps() -> None:
    console, output = start(25)
    console.note("kernels: [torch]")
    for number in range(1, 26):
        console.step(row(number))
    console.validation({"step": 25, "val_loss": 2.0, "val_loss_code": 1.0})
    console.close("finished")
    line = "epoch 0  loss 2.5000  grad norm 1.500  lr 1.00e-03  200 tokens/s  1.50 GiB"
    assert output.getvalue().splitlines() == [
        "kernels: [torch]",
        f"step 1/25  {line}",
        f"step 10/25  {line}  1 min 45 s left",
        f"step 20/25  {line}  35 s left",
        f"step 25/25  {line}  0 s left",
        "step 25/25  val_loss 2.0000  val_loss_code 1.0000",
    ]


def test_a_terminal_shows_a_bar_that_ends() -> None:
    console, output = start(2, terminal=True)
    console.step(row(1))
    console.step(row(2))
    console.close("finished")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "step 2/2" in shown
    assert "loss 2.5000" in shown
    # Hidden while the bar lives, shown again after.
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_is_one_line_of_the_terminal_and_keeps_what_matters(width: int, terminal: bool) -> None:
    console, output = start(100_000, terminal=terminal, width=width)
    for number in (99, 100):
        console.step(row(number))
    console.close("finished")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue()))]
    assert all(line.startswith("step ") and len(line) <= width for line in lines if line)
    last = lines[-2]
    assert last.startswith("step 100/100000  ")
    assert "loss 2.5000" in last
    assert ("8 d 02 h left" in last) == (width > 40)
    assert ("tokens/s" in last) == (width > 60 or (width == 60 and not terminal))
    assert ("━━━━" in last) == terminal


def test_nothing_started_ends_without_a_word() -> None:
    console, output = start(2, terminal=True)
    console.close("failed: RuntimeError: early")
    assert output.getvalue() == ""
