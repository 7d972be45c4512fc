"""report.html as a browser reads it, drawn from run directories of runs that ended in every way."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import rich.console

from am_recipes import provenance
from am_recipes.log import Log
from am_recipes.sinks import HtmlPage, curves
from am_recipes.sinks.html import write_page

CONFIG = "recipe: sft\nseed: 1\n"
HOSTILE = '<script>alert("x")</script>&amp;<img src=x onerror=alert(1)>'


def start(run_dir: Path, config: str = CONFIG, **arguments: Any) -> Log:
    return Log(run_dir, config, console=rich.console.Console(file=io.StringIO()), **({"total_steps": 20} | arguments))


def step(log: Log, number: int, **changed: Any) -> None:
    values = {"epoch": 0, "loss": 2.5, "grad_norm": 1.5, "lr": 1e-3, "tokens": 100, "target_tokens": 60, "seconds": 0.5}
    log.step(number, **(values | changed))


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


def test_the_page_says_what_a_launch_was_made_of(tmp_path: Path) -> None:
    launch: Any = provenance.launch(None, 2) | {
        "origins": {"seed": "mine.yaml:2 <b>", "run_dir": "default"},
        "data": {"dataset": "5 bytes, blake2b:00"},
        "environment": {"hosts": {"one": 2}, "job": {"SLURM_JOB_ID": "7"}},
    }
    with start(tmp_path, launch=launch) as log:
        log.finish()
    text = page(tmp_path)
    assert f"2 processes on {launch['device']} of one\nSLURM_JOB_ID=7\n$ " in text
    assert "\ndataset: 5 bytes, blake2b:00</pre>" in text
    assert "<pre>seed: mine.yaml:2 &lt;b&gt;</pre>" in text
    assert "  torch " in text


@pytest.mark.parametrize("num_steps", [0, 1, 10, 1000])
def test_the_page_stands_alone_whatever_the_length(tmp_path: Path, num_steps: int) -> None:
    with start(tmp_path, total_steps=max(num_steps, 1)) as log:
        log.validation(0, {"val_loss": 3.0})
        for number in range(1, num_steps + 1):
            step(log, number, loss=3.0 / number, lr=0.0)
        log.finish()
    text = page(tmp_path)
    tags = Tags(text)
    assert tags.open == []
    assert not tags.names & {"script", "link", "img", "iframe"}
    assert not tags.attributes & {"src", "href"}
    assert "http" not in text
    assert "NaN" not in text
    # A word of its own: the command that is shown may name a file such as provenance.py.
    assert re.search(r"\bnan\b", text) is None
    assert (text.count("<polyline") > 0) == (num_steps > 0)
    assert ("Lines are means of 4 steps" in text) == (num_steps == 1000)
    assert len(text) < 400_000


def test_values_under_the_pointer(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        step(log, 1, loss=2.5)
        log.validation(1, {"val_loss": 2.25})
        log.finish()
    assert "step 1   train 2.5   validation 2.25</text>" in page(tmp_path)


def test_text_cannot_become_markup(tmp_path: Path) -> None:
    with start(tmp_path, f"a: {HOSTILE}\n", title=HOSTILE) as log:
        log.note(HOSTILE)
        log.samples([[(HOSTILE, True), (HOSTILE, False)]])
        log.answers(HOSTILE, [(HOSTILE, HOSTILE)])
        step(log, 1, others={HOSTILE: 1.0})
        log.validation(1, {f"val_loss_{HOSTILE}": 1.0})
        log.finish(status=f"failed: {HOSTILE}", next_steps=[HOSTILE, f"# {HOSTILE}"])
    tags = Tags(page(tmp_path))
    assert tags.open == []
    assert not tags.names & {"script", "img"}
    assert "onerror" not in tags.attributes
    # Title, heading, status, config, note, two pieces of the sample, moment, prompt, answer, two next steps.
    assert page(tmp_path).count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;") >= 12


def test_supervised_text_is_marked(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        log.samples([[("question ", False), ("answer", True)]])
        log.finish()
    assert "question <mark>answer</mark>" in page(tmp_path)


def test_further_numbers_have_charts(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        step(log, 1, others={"kd_loss": 0.25, "ce_loss": 3.5})
        step(log, 2, others={"kd_loss": 0.125, "ce_loss": 3.25})
        log.finish()
    assert ">Kd loss<" in page(tmp_path)
    assert ">Ce loss<" in page(tmp_path)
    assert "step 2   kd_loss 0.125</text>" in page(tmp_path)
    assert Tags(page(tmp_path)).open == []


def test_numbers_that_were_not_finite_leave_a_gap(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        step(log, 1, loss=math.nan, grad_norm=math.nan, others={"load": math.nan})
        step(log, 2, loss=2.0, grad_norm=math.nan)
        log.finish()
    assert "step 2   train 2</text>" in page(tmp_path)
    assert "step 1   train" not in page(tmp_path)
    assert "<dt>Train loss</dt><dd>2.000</dd>" in page(tmp_path)
    assert Tags(page(tmp_path)).open == []


def test_answers_about_images_are_shown_and_survive(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        log.images(
            "before", [([b"PNG-1", b"PNG-2"], "What?", "fish", "cat"), ([], "And?", "fowl", "dog")], "0 of 2 right"
        )
        step(log, 1)
    with start(tmp_path, resume_step=1) as log:
        log.images(
            "after", [([b"PNG-1", b"PNG-2"], "What?", HOSTILE, "cat"), ([], "And?", "dog ", "dog")], "1 of 2 right"
        )
        log.finish()
    text = page(tmp_path)
    assert text.count('src="data:image/png;base64,') == 2
    assert "before: 0 of 2 right" in text
    assert "after: 1 of 2 right" in text
    assert "expected: cat" in text
    assert "before: fish" in text
    assert "before: fowl" in text
    assert "<script>alert" not in text
    assert Tags(text).open == []


@pytest.mark.parametrize(
    ("status", "color", "kind"),
    [
        ("finished", "good", "finished"),
        ("stopped after step 3; the same command continues", "busy", "stopped"),
        ("failed: RuntimeError: out of luck", "bad", "failed"),
    ],
)
def test_how_a_run_ended_is_its_first_word(tmp_path: Path, status: str, color: str, kind: str) -> None:
    with start(tmp_path) as log:
        log.finish(status=status)
    assert f'<span class="pill {color}">{kind}</span>' in page(tmp_path)
    assert (f'<p class="reason {color}">{status}</p>' in page(tmp_path)) == (status != kind)


def killed_while_writing(run_dir: str) -> None:
    log = start(Path(run_dir))
    log.note("kernels of the killed run")
    log.validation(0, {"val_loss": 3.0})
    step(log, 1, loss=2.0)
    step(log, 2, loss=1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_has_a_page(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert subprocess.run([sys.executable, __file__, str(run_dir)], check=False).returncode == -signal.SIGKILL
    (run_dir / "report.html").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert write_page(run_dir) == run_dir / "report.html"
    text = page(run_dir)
    assert Tags(text).open == []
    assert '<h1>run <span class="pill busy">running</span></h1>' in text
    assert "running, or killed: the last step ended at 20" in text
    assert "<dd>2 of 20</dd>" in text
    assert "<dd>2.000 → 1.000</dd>" in text
    assert "kernels of the killed run" in text
    assert "step 2   train 1</text>" in text
    assert "Warnings" not in text


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        step(log, 1)
        log.finish()
    first = page(tmp_path)
    write_page(tmp_path)
    assert page(tmp_path) == first
    write_page(tmp_path)
    assert page(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the directory of a run: config\.yaml, run\.json, metrics\.jsonl not"):
        write_page(tmp_path / "nothing")
    with start(tmp_path):
        pass
    (tmp_path / "report.html").unlink()
    for content in ("{", "[1]", '{"identity": {}}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is not the record of a run \(.*\); restore the file"):
            write_page(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r": metrics\.jsonl not found there; give the run_dir of a run"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_broken_line_among_others_is_said(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        for number in range(1, 6):
            step(log, number)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([*lines[:3], lines[3][:20], "\n", lines[4]]))
    write_page(tmp_path)
    assert "line 4 of metrics.jsonl is no JSON" in page(tmp_path)
    assert "<dd>3 of 20</dd>" in page(tmp_path)


def test_a_page_every_few_minutes(tmp_path: Path) -> None:
    """`HtmlPage` reads on where its last page ended, and comes to the page of a reader that begins anew."""
    with start(tmp_path) as log:
        seldom, often = HtmlPage(tmp_path), HtmlPage(tmp_path, minutes=0)
        for number in range(1, 2000):
            step(log, number, loss=float(number % 7), others={"load": float(number % 3)})
            seldom.step({"step": number})
            seldom.validation({"step": number, "val_loss": 1.0})
            # Neither the page of the log nor this one is drawn again within minutes.
            assert (tmp_path / "report.html").exists() == (number == 1)
            if number == 1 or number % 97 == 0:
                often.step({"step": number})
                assert f"<dd>{number:,} of 20</dd>" in page(tmp_path)
                (tmp_path / "report.html").unlink()
        often.close("finished")
        drawn = page(tmp_path)
        write_page(tmp_path)
        assert page(tmp_path) == drawn


@pytest.mark.parametrize("num_points", [1, 319, 320, 321, 640, 641, 5000])
def test_a_curve_holds_means_and_extremes_of_all_points(num_points: int) -> None:
    chance = random.Random(num_points)
    values = [chance.random() for _ in range(num_points)]
    curve, begin = curves.Curve(), 0
    while begin < num_points:
        end = begin + chance.randrange(1, 400)
        curve.extend(range(begin, min(end, num_points)), values[begin:end])
        begin = end
    assert len(curve.buckets) <= curves.MAX_POINTS
    assert len(curve.buckets) > min(num_points, curves.MAX_POINTS) // 2
    for number, bucket in enumerate(curve.buckets):
        own = values[number * curve.size : (number + 1) * curve.size]
        assert (bucket.count, bucket.low, bucket.high) == (len(own), min(own), max(own))
        assert bucket.mean == pytest.approx(mean(own), rel=1e-12)
        assert bucket.step == number * curve.size + (len(own) - 1) / 2
    assert sum(bucket.count for bucket in curve.buckets) == num_points
    assert (curve.first, curve.last) == ((0, values[0]), (num_points - 1, values[-1]))
    assert (curve.low, curve.high) == (min(values), max(values))


def test_a_row_that_is_being_written_is_read_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": number, "val_loss": 1.0 / number}) + "\n" for number in (1, 2, 3)]
    text = "".join(rows)
    for cut in range(len(text) + 1):
        file.write_text(text[:cut])
        metrics = curves.read(file)
        whole = text[:cut].count("\n")
        assert (metrics.num_lines, metrics.is_broken) == (whole, False)
        file.write_text(text)
        curves.read(file, metrics)
        assert metrics.num_lines == 3
        assert [bucket.mean for bucket in metrics.validation["val_loss"].buckets] == [1.0, 1 / 2, 1 / 3]


def test_the_headline_loss_is_the_smoothed_one(tmp_path: Path) -> None:
    random.seed(0)
    losses = [3.0 + random.choice((-1.0, 1.0)) for _ in range(200)]
    with start(tmp_path, total_steps=200) as log:
        for number, loss in enumerate(losses, start=1):
            step(log, number, loss=loss)
        log.finish()
    curve = curves.read(tmp_path / "metrics.jsonl").train["loss"].smoothed()
    assert curve.last is not None
    assert curve.last[1] == pytest.approx(mean(losses[-11:]))
    assert [bucket.mean for bucket in curve.buckets[:2]] == pytest.approx([losses[0], mean(losses[:3])])
    assert f"<dd>{losses[0]:.3f} → {mean(losses[-11:]):.3f}</dd>" in page(tmp_path)
    assert "train, smoothed" in page(tmp_path)


def test_a_narrow_screen_has_a_drawing_of_its_own_width(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        step(log, 1)
        log.finish()
    text = page(tmp_path)
    assert '<div class="narrow"><svg viewBox="0 0 520 300"' in text
    assert '<div class="wide"><svg viewBox="0 0 1040 300"' in text


def test_a_sample_is_on_the_page_once_and_in_a_few_lines_on_the_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    sentence = "One sentence among many that make this sample longer than a line of a terminal. " * 3
    console = rich.console.Console(file=output, width=80)
    with Log(tmp_path, CONFIG, total_steps=1, console=console) as log:
        log.note("2 rows read")
        log.samples([[("<|user|>\n" * 9, False), (sentence, True)], [("second", True)]])
        log.finish()
    assert page(tmp_path).count(sentence) == 1
    lines = output.getvalue().split("2 rows read\n")[1].splitlines()[:7]
    assert max(map(len, lines)) <= 80
    assert lines[1:4] == ["  <|user|>", "  <|user|>", "  ... 5 lines"]
    assert lines[6].startswith("  [[One sentence among many")
    assert lines[6].endswith("of a terminal. ]]")


if __name__ == "__main__":
    killed_while_writing(sys.argv[1])
