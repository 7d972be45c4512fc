"""metrics.jsonl as a reader, a killed process and a resumed run find it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from am_recipes.sinks import JsonLines
from am_testing import small_files


def rows(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def write(file: Path, last: int, *, resume_step: int | None = None) -> None:
    lines = JsonLines(file, resume_step=resume_step)
    for number in range((resume_step or 0) + 1, last + 1):
        lines.step({"step": number, "loss": 1 / 3 / number})
    lines.close("finished")


def test_rows_are_in_the_file_when_a_call_returns(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file)
    lines.note("nothing of this is a number")
    lines.validation({"step": 0, "val_loss": 3.0})
    assert file.read_text() == '{"step": 0, "val_loss": 3.0}\n'
    lines.step({"step": 1, "loss": 2.5, "tokens": 100})
    assert rows(file) == [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.5, "tokens": 100}]
    lines.close("finished")
    with pytest.raises(ValueError, match="closed"):
        lines.step({"step": 2, "loss": 2.5})


def test_numbers_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.step({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "tokens": 2})
    lines.validation({"step": 1, "val_loss": math.nan})
    lines.close("finished")
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": None, "tokens": 2},
        {"step": 1, "val_loss": None},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "lo\n{"step": 2, "loss": 9.0}\n', "\x00" * 80])
def test_resuming_keeps_the_rows_up_to_the_step_as_they_were(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, 5)
    first = file.read_text().splitlines(keepends=True)
    with file.open("a") as stream:
        stream.write(torn)
    write(file, 4, resume_step=3)
    assert file.read_text() == "".join(first[:4])


def test_a_whole_row_without_its_end_of_line_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    write(file, 3, resume_step=2)
    assert [row["step"] for row in rows(file)] == [1, 2, 3]


def test_a_run_from_the_start_begins_an_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, 5)
    JsonLines(file).close("stopped")
    assert file.read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_first_and_last_validation_survive_a_resume(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.first_validation is None
    for step in range(4):
        lines.validation({"step": step, "val_loss": 3.0 - step, "val_loss_code": math.nan})
        lines.step({"step": step + 1, "loss": 1.0})
    lines.close("stopped")
    resumed = JsonLines(tmp_path / "metrics.jsonl", resume_step=2)
    resumed.close("stopped")
    assert (resumed.first_validation, resumed.last_validation) == (
        {"step": 0, "val_loss": 3.0},
        {"step": 2, "val_loss": 1.0},
    )


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file)
    message = r"metrics.jsonl was not written: .*, \d+ bytes are free; the same command continues"
    with small_files(1000), pytest.raises(OSError, match=message):
        lines.step({"step": 1} | {f"column {number}": 1.0 for number in range(100)})
    lines.close("failed: OSError")
    assert file.stat().st_size >= 1000


def killed_after_two_steps(file: str) -> None:
    lines = JsonLines(Path(file))
    lines.step({"step": 1, "loss": 2.0})
    lines.step({"step": 2, "loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path / "metrics.jsonl")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


if __name__ == "__main__":
    killed_after_two_steps(sys.argv[1])
