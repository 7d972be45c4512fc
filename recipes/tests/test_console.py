"""What a run prints, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import rich.console

from am_recipes.sinks import Console, Row


def start(total_steps: int, *, terminal: bool = False, print_every: int = 10) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=terminal, width=120)
    return Console(total_steps, print_every=print_every, console=console), output


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
    line = "loss 2.5000  grad norm 1.500  lr 1.00e-03  200 tokens/s  1.50 GiB"
    assert output.getvalue().splitlines() == [
        "kernels: [torch]",
        *(f"step {number}/25  epoch 0  {line}" for number in (1, 10, 20, 25)),
        "step 25/25  val_loss 2.0000  val_loss_code 1.0000",
    ]


def test_a_terminal_shows_a_bar_that_ends() -> None:
    console, output = start(2, terminal=True)
    console.step(row(1))
    console.step(row(2))
    console.close("finished")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "2/2" in shown
    assert "loss 2.5000" in shown
    # Hidden while the bar lives, shown again after.
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")


def test_nothing_started_ends_without_a_word() -> None:
    console, output = start(2, terminal=True)
    console.close("failed: RuntimeError: early")
    assert output.getvalue() == ""
