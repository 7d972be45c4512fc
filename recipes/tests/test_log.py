"""The files a run leaves, through the public API, as a reader and a resumed run find them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from am_recipes.log import Log

CONFIG = "recipe: sft\nseed: 1\n"
HOSTILE = '<script>alert("x")</script>&amp;<img src=x onerror=alert(1)>'


def start(run_dir: Path, output: io.StringIO | None = None, **arguments: Any) -> Log:
    console = Console(file=output or io.StringIO(), force_terminal=arguments.pop("terminal", False), width=120)
    return Log(run_dir, CONFIG, console=console, **({"total_steps": 20} | arguments))


def step(report: Log, number: int, **changed: Any) -> None:
    values = {"epoch": 0, "loss": 2.5, "grad_norm": 1.5, "lr": 1e-3, "tokens": 100, "target_tokens": 60, "seconds": 0.5}
    report.step(number, **(values | changed))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def page(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text()


class Tags(HTMLParser):
    """Collects elements and attributes, and checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_step_is_one_complete_row(tmp_path: Path) -> None:
    with start(tmp_path) as report:
        step(report, 1)
        (row,) = rows(tmp_path)
        assert row.pop("time") > 1.7e9
        assert row.pop("peak_memory_bytes") > 10 * 2**20
        assert row == {
            "step": 1,
            "epoch": 0,
            "loss": 2.5,
            "grad_norm": 1.5,
            "lr": 1e-3,
            "tokens": 100,
            "target_tokens": 60,
            "tokens_per_second": 200.0,
        }
        report.validation(1, {"val_loss": 2.25})
        report.validation(1, {"val_loss_chat": 2.0, "val_loss_code": 3.0})
        assert rows(tmp_path)[1:] == [
            {"step": 1, "val_loss": 2.25},
            {"step": 1, "val_loss_chat": 2.0, "val_loss_code": 3.0},
        ]
        with pytest.raises(ValueError, match=r"\['chat'\] must be named val_loss or val_loss_<name>"):
            report.validation(1, {"chat": 2.0})


def test_numbers_json_has_no_word_for_become_null_with_a_warning(tmp_path: Path) -> None:
    output = io.StringIO()
    with start(tmp_path, output) as report:
        step(report, 1, loss=math.nan, grad_norm=math.inf)
        step(report, 2)
        report.finish()
    assert [(row["loss"], row["grad_norm"]) for row in rows(tmp_path)] == [(None, None), (2.5, 1.5)]
    assert "WARNING step 1: loss is nan, grad_norm is inf; written as null" in output.getvalue()
    assert "step 1: loss is nan, grad_norm is inf" in page(tmp_path)


def test_resuming_keeps_what_the_checkpoint_covers(tmp_path: Path) -> None:
    with start(tmp_path, identity={"seed": 1}) as first:
        first.answers("before", [("Why?", "Because.")])
        first.validation(0, {"val_loss": 3.0})
        for number in range(1, 6):
            step(first, number, loss=float(number))
    # A power failure cuts a line off.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with start(tmp_path, resume_step=3, identity={"seed": 1}) as resumed:
        assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]
        step(resumed, 4, loss=40.0)
        resumed.finish(goal={"max_steps": 4})
    assert [row.get("loss") for row in rows(tmp_path)] == [None, 1.0, 2.0, 3.0, 40.0]
    record = json.loads((tmp_path / "run.json").read_text())
    assert [launch["resume_step"] for launch in record["launches"]] == [None, 3]
    assert record["answers"] == {"before": [["Why?", "Because."]]}
    assert "Because." in page(tmp_path)
    with start(tmp_path):
        assert rows(tmp_path) == []
    assert [launch["resume_step"] for launch in json.loads((tmp_path / "run.json").read_text())["launches"]] == [None]


def test_run_json_says_what_ran(tmp_path: Path) -> None:
    with start(tmp_path, world_size=4, identity={"seed": 1}) as report:
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["identity"] == {"seed": 1}
        assert record["finished"] is None
        (launch,) = record["launches"]
        assert launch["world_size"] == 4
        assert {"python", "torch", "transformers", "am-recipes"} <= launch["versions"].keys()
        report.finish(goal={"max_steps": 20, "num_epochs": None})
    assert '<span class="pill good">finished</span>' in page(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["finished"] == {"max_steps": 20, "num_epochs": None}
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    with start(tmp_path / "run", rank=1) as report:
        report.note("kernels")
        report.samples([[("a", True)]])
        report.answers("before", [("a", "b")])
        step(report, 1)
        report.validation(1, {"val_loss": 1.0})
        report.sync()
        report.finish()
    assert not (tmp_path / "run").exists()


def killed_after_two_steps(run_dir: str) -> None:
    report = start(Path(run_dir))
    step(report, 1)
    step(report, 2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def run_out_of_luck(run_dir: Path) -> None:
    with start(run_dir) as report:
        step(report, 1)
        raise RuntimeError("out of luck")


def test_an_error_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        run_out_of_luck(tmp_path)
    assert "failed: RuntimeError: out of luck" in page(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is None


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    with start(tmp_path) as report:
        report.finish(status="stopped after step 3; run the same command again")
    assert '<span class="pill busy">stopped</span>' in page(tmp_path)
    assert "stopped after step 3; run the same command again</p>" in page(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is None


def test_plain_output_has_a_line_every_few_steps(tmp_path: Path) -> None:
    output = io.StringIO()
    with start(tmp_path, output, total_steps=25, print_every=10) as report:
        report.note("kernels: [torch]")
        for number in range(1, 26):
            step(report, number)
        report.validation(25, {"val_loss": 2.0})
        report.finish(next_steps=["am-ckpt verify RUN"])
    lines = output.getvalue().splitlines()
    assert lines[0] == "kernels: [torch]"
    assert [line.split()[1] for line in lines[1:6]] == ["1/25", "10/25", "20/25", "25/25", "25/25"]
    assert "loss 2.5000  grad norm 1.500  lr 1.00e-03  200 tokens/s" in lines[1]
    assert lines[5] == "step 25/25  val_loss 2.0000"
    assert lines[6].startswith("finished: ")
    assert lines[7] == "  am-ckpt verify RUN"
    assert "\x1b" not in output.getvalue()


def test_a_terminal_shows_a_bar_that_ends(tmp_path: Path) -> None:
    output = io.StringIO()
    with start(tmp_path, output, terminal=True, total_steps=2) as report:
        step(report, 1)
        step(report, 2)
        report.finish()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "2/2" in shown
    assert "loss 2.5000" in shown
    # Hidden while the bar lives, shown again after.
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("num_steps", [0, 1, 10, 1000])
def test_the_page_stands_alone_whatever_the_length(tmp_path: Path, num_steps: int) -> None:
    with start(tmp_path, total_steps=max(num_steps, 1)) as report:
        report.validation(0, {"val_loss": 3.0})
        for number in range(1, num_steps + 1):
            step(report, number, loss=3.0 / number, lr=0.0)
        report.finish()
    text = page(tmp_path)
    tags = Tags(text)
    assert tags.open == []
    assert not tags.names & {"script", "link", "img", "iframe"}
    assert not tags.attributes & {"src", "href"}
    assert "http" not in text
    assert "NaN" not in text
    assert "nan" not in text
    assert (text.count("<polyline") > 0) == (num_steps > 0)
    assert len(text) < 400_000


def test_values_under_the_pointer(tmp_path: Path) -> None:
    with start(tmp_path) as report:
        step(report, 1, loss=2.5)
        report.validation(1, {"val_loss": 2.25})
        report.finish()
    assert "step 1   train 2.5   validation 2.25</text>" in page(tmp_path)


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with Log(tmp_path, f"a: {HOSTILE}\n", total_steps=1, title=HOSTILE, console=console) as report:
        report.note(HOSTILE)
        report.samples([[(HOSTILE, True), (HOSTILE, False)]])
        report.answers(HOSTILE, [(HOSTILE, HOSTILE)])
        step(report, 1)
        report.validation(1, {f"val_loss_{HOSTILE}": 1.0})
        report.finish(status=f"failed: {HOSTILE}", next_steps=[HOSTILE, f"# {HOSTILE}"])
    tags = Tags(page(tmp_path))
    assert tags.open == []
    assert not tags.names & {"script", "img"}
    assert "onerror" not in tags.attributes
    # Title, heading, status, config, note, two pieces of the sample, moment, prompt, answer, two next steps.
    assert page(tmp_path).count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;") >= 12


def test_supervised_text_is_marked(tmp_path: Path) -> None:
    with start(tmp_path) as report:
        report.samples([[("question ", False), ("answer", True)]])
        report.finish()
    assert "question <mark>answer</mark>" in page(tmp_path)


if __name__ == "__main__":
    killed_after_two_steps(sys.argv[1])


def test_further_numbers_have_columns_and_charts(tmp_path: Path) -> None:
    with start(tmp_path) as report:
        step(report, 1, others={"kd_loss": 0.25, "ce_loss": 3.5})
        step(report, 2, others={"kd_loss": 0.125, "ce_loss": 3.25})
        report.finish()
    assert [(row["kd_loss"], row["ce_loss"]) for row in rows(tmp_path)] == [(0.25, 3.5), (0.125, 3.25)]
    assert ">Kd loss<" in page(tmp_path)
    assert ">Ce loss<" in page(tmp_path)
    Tags(page(tmp_path))


def test_answers_about_images_are_shown_and_survive(tmp_path: Path) -> None:
    output = io.StringIO()
    with start(tmp_path, output) as report:
        report.images([([b"PNG-1", b"PNG-2"], "What?", HOSTILE, "cat"), ([], "And?", "dog ", "dog")], "1 of 2 right")
        step(report, 1)
    assert "1 of 2 right" in output.getvalue()
    assert "(expected: cat)" in output.getvalue()
    with start(tmp_path, resume_step=1) as report:
        report.finish()
    text = page(tmp_path)
    assert text.count('src="data:image/png;base64,') == 2
    assert "1 of 2 right" in text
    assert "expected: cat" in text
    assert "<script>alert" not in text
    Tags(text)
