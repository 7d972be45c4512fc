"""The log of a run: what the training loop has to say, told to every sink and kept in the run directory.

Rank 0 writes; on every other rank the same object does nothing, so a recipe calls it without asking. The rows go to
metrics.jsonl, everything else to run.json, and nothing of a step stays in memory: what people look at, such as the
page, is made of these files.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import resource
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import rich.console
import torch

from am_recipes import provenance
from am_recipes.sinks import Console, HtmlPage, JsonLines, Row, Sink, ends, files, record, text

# A column that is NaN at every step would otherwise fill run.json.
MAX_WARNINGS = 100


class Log:
    """Tells a run to its sinks: metrics.jsonl, the terminal, the page, then those of the user, in this order.

    Use it as a context manager, so that an error is recorded and every sink is closed.

    Args:
        run_dir: created where missing.
        config_yaml: the resolved configuration, with secrets as references; written to config.yaml as it is.
        total_steps: optimizer steps of the whole run, including those done before a resume.
        rank: every method does nothing unless this is 0.
        world_size: processes of the job; recorded.
        resume_step: the step of the checkpoint this launch continues from; None starts the record anew. Rows of later
            steps are dropped: they will be written again.
        identity: JSON values that make two runs the same run; kept in run.json under that name.
        sinks: further ones. What they raise ends the run.
        title: heading of the page; the name of `run_dir` by default.
        print_every: where output is no terminal, a line is printed each so many steps.
        console: where to print; standard output by default.
        launch: what is known of this start of the run (`am_recipes.provenance`); by default what the process knows.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        config_yaml: str,
        *,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        resume_step: int | None = None,
        identity: Mapping[str, object] | None = None,
        sinks: Sequence[Sink] = (),
        title: str | None = None,
        print_every: int = 10,
        console: rich.console.Console | None = None,
        launch: record.Launch | None = None,
    ) -> None:
        self._active = rank == 0
        if not self._active:
            return
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._record = _begin(self._run_dir, resume_step)
        self._record.total_steps = total_steps
        self._record.identity = dict(identity or {})
        self._record.title = title
        self._record.launches.append(launch or provenance.launch(resume_step, world_size))
        # Before any other file: killed in between, it says whose the directory is.
        self._record.save(self._run_dir)
        files.replace(self._run_dir / "config.yaml", [config_yaml.encode()])
        self._metrics = JsonLines(self._run_dir / "metrics.jsonl", resume_step=resume_step)
        self._console = Console(total_steps, print_every=print_every, console=console)
        # The user's come last: when they are closed, the page is there to be taken along.
        self._sinks: tuple[Sink, ...] = (self._metrics, self._console, HtmlPage(self._run_dir), *sinks)
        self._closed = False

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active and not self._closed:
            self._close(ends.STOPPED if error is None else ends.failed(error), error)

    def note(self, fact: object) -> None:
        """Tell `str(fact)` and keep it for the page: what was chosen, counted or found before training."""
        if self._active:
            self._record.notes.append(str(fact))
            self._record.save(self._run_dir)
            self._tell(str(fact))

    def data(self, digests: Mapping[str, str]) -> None:
        """Keep digests of what this launch reads, by name; the next note saves them."""
        if self._active:
            self._record.add_data(digests)

    def samples(self, samples: Iterable[Sequence[tuple[str, bool]]]) -> None:
        """Show training samples on the page; each is pieces of text, with whether the loss counts them.

        The first is told, too, in a few lines.
        """
        if not self._active:
            return
        self._record.samples = [list(sample) for sample in samples]
        self._record.save(self._run_dir)
        for sample in self._record.samples[:1]:
            self._tell("a training sample, [[...]] is under loss (report.html has more, whole):")
            self._tell(text.excerpt("".join(f"[[{piece}]]" if counts else piece for piece, counts in sample)))

    def answers(self, moment: str, answers: Iterable[tuple[str, str]]) -> None:
        """Keep (prompt, answer) pairs of a moment such as `before` or `after` training, and tell their first lines.

        They survive a resume.
        """
        pairs = [(prompt, answer) for prompt, answer in answers]
        if not self._active or not pairs:
            return
        self._record.answers[moment] = pairs
        self._record.save(self._run_dir)
        for prompt, answer in pairs:
            self._tell(f"> {moment}: {prompt}\n{text.excerpt(answer.strip())}")

    def images(self, moment: str, rows: Iterable[tuple[Sequence[bytes], str, str, str]], summary: str) -> None:
        """Show answers about images of a moment on the page, and tell their summary; they survive.

        Each row is its images as PNG bytes, the prompt, the model's answer and the expected one.
        """
        if not self._active:
            return
        rows = list(rows)
        kept: record.ImageAnswers = self._record.image_answers or {"rows": [], "answers": {}, "summary": {}}
        kept["rows"] = [
            ([base64.b64encode(image).decode() for image in images], prompt, expected)
            for images, prompt, _, expected in rows
        ]
        kept["answers"][moment] = [answer for _, _, answer, _ in rows]
        kept["summary"][moment] = summary
        self._record.image_answers = kept
        self._record.save(self._run_dir)
        self._tell(textwrap.fill(f"{moment}: {summary}", 80, subsequent_indent="  "))

    def step(
        self,
        step: int,
        *,
        epoch: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        target_tokens: int,
        seconds: float,
        others: Mapping[str, float] | None = None,
    ) -> None:
        """Record an optimizer step, counted from 1.

        Args:
            loss: per target token.
            lr: the rate the step was taken with.
            tokens: of this step over all ranks, without padding; so are `target_tokens`.
            seconds: how long it took, without validation or saving.
            others: further numbers by name, the same names at every step; each gets a chart of its own.
        """
        if not self._active:
            return
        row: Row = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "target_tokens": target_tokens,
            "tokens_per_second": tokens / seconds if seconds > 0 else math.nan,
            "peak_memory_bytes": peak_memory_bytes(),
            "time": time.time(),
            **(others or {}),
        }
        self._warn_of_broken(row)
        for sink in self._sinks:
            sink.step(row)

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record validation losses per target token after `step` steps (0: before training).

        Their names are `val_loss`, or `val_loss_<name>` where there are several data sets; ValueError otherwise.
        """
        if not self._active:
            return
        wrong = [name for name in losses if name != "val_loss" and not name.startswith("val_loss_")]
        if wrong:
            raise ValueError(f"validation losses {wrong} must be named val_loss or val_loss_<name>; rename them")
        row: Row = {"step": step, **losses}
        self._warn_of_broken(row)
        for sink in self._sinks:
            sink.validation(row)

    def sync(self) -> None:
        """Wait until the rows so far would survive a power failure, so that no checkpoint outlives its rows."""
        if self._active:
            self._metrics.sync()

    def finish(
        self,
        *,
        goal: Mapping[str, object] | None = None,
        ending: Mapping[str, object] | None = None,
        status: str = ends.FINISHED,
        next_steps: Sequence[str] = (),
    ) -> None:
        """End the log, once.

        `goal` is how long the run was asked to train, written to run.json as `finished`, with what else decided its
        `ending`; leave them out where the run was stopped before. `next_steps` are shell commands to show, with
        `# ...` lines for comments.
        """
        if not self._active:
            return
        self._record.next_steps = list(next_steps)
        if goal is not None:
            self._record.finished = dict(goal)
            self._record.ending = dict(ending or {})
        self._close(status, None)
        for name, before, after in self._validation_losses():
            self._console.note(f"\n{name} {before:.4f} before, {after:.4f} after")
        self._console.note(f"{status}: {self._run_dir / 'report.html'}")
        for line in next_steps:
            self._console.note(f"  {line}")

    def _tell(self, text: str) -> None:
        for sink in self._sinks:
            sink.note(text)

    def _warn_of_broken(self, row: Row) -> None:
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if not broken:
            return
        step, warnings = int(row["step"]), self._record.warnings
        warning = f"step {step}: " + ", ".join(f"{name} is {row[name]}" for name in broken)
        if len(warnings) < MAX_WARNINGS:
            warnings.append((step, warning))
            if len(warnings) == MAX_WARNINGS:
                warnings.append((step, "there may be more: only the terminal has them"))
            self._record.save(self._run_dir)
        self._tell(f"WARNING {warning}; written as null")

    def _validation_losses(self) -> list[tuple[str, float, float]]:
        """Name, value before training and latest value of each validation loss that was measured before and since."""
        before, after = self._metrics.first_validation, self._metrics.last_validation
        if before is None or after is None or before["step"] != 0 or after["step"] == 0:
            return []
        return [(name, value, after[name]) for name, value in before.items() if name != "step" and name in after]

    def _close(self, status: str, error: BaseException | None) -> None:
        """Record the status and close every sink, whatever they raise; `error` is what ends the run, if anything."""
        self._closed = True
        self._record.status = status

        def keep_first(
            kind: type[BaseException] | None, second: BaseException | None, trace: TracebackType | None
        ) -> bool:
            if error is None or second is None:
                return False
            text = "".join(traceback.format_exception(second, chain=False))
            error.add_note(f"After this error, closing the log failed too:\n{text}")
            return True

        # Last in, first out: the record, then the sinks in order.
        with contextlib.ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.push(keep_first)
                stack.callback(sink.close, status)
            stack.push(keep_first)
            stack.callback(self._record.save, self._run_dir)


def peak_memory_bytes() -> int:
    """The most memory this process has held: of torch's CUDA allocator on a GPU, resident memory elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _begin(run_dir: Path, resume_step: int | None) -> record.Record:
    """An empty record, or of a run that continues: its launches, answers, and warnings up to that step."""
    if resume_step is None or not (run_dir / record.NAME).exists():
        return record.Record(total_steps=0, identity={}, launches=[])
    old = record.load(run_dir)
    return record.Record(
        total_steps=0,
        identity={},
        launches=old.launches,
        warnings=[(step, text) for step, text in old.warnings if step <= resume_step],
        answers=old.answers,
        image_answers=old.image_answers,
    )
