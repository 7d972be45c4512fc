"""What a run leaves for people: config.yaml, run.json, metrics.jsonl, a progress display and report.html.

Rank 0 writes; on every other rank the same object does nothing, so a recipe calls it without asking. A row of
metrics.jsonl reaches the operating system before ``step`` returns: killing the process loses none, and a row cut off by
a power failure is dropped on resume. Numbers that JSON has no word for (NaN, infinities) become null, with a warning.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from am_recipes import _html

PACKAGES = (
    *("am-recipes", "am-ckpt", "am-data", "am-kernels", "am-loss", "am-mesh", "am-models", "am-moe", "am-peft"),
    *("torch", "transformers", "peft", "datasets", "safetensors"),
)
SECONDS_BETWEEN_SYNCS = 5.0


class Report:
    """The record of one run. Use it as a context manager, so that an error ends the display and is recorded.

    Args:
        run_dir: created where missing.
        config: the resolved configuration as YAML text, with secrets as references; written as it is.
        total_steps: optimizer steps of the whole run, including those done before a resume.
        rank: every method does nothing unless this is 0.
        world_size: processes of the job; recorded.
        resume_step: the step of the checkpoint this launch continues from; None starts the record anew. Rows of later
            steps are dropped: they will be written again.
        identity: JSON values that make two runs the same run; kept in run.json under that name.
        title: heading of the page; the name of ``run_dir`` by default.
        print_every: where output is no terminal, a line is printed each so many steps.
        console: where to print; standard output by default.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        config: str,
        *,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        resume_step: int | None = None,
        identity: Mapping[str, Any] | None = None,
        title: str | None = None,
        print_every: int = 10,
        console: Console | None = None,
    ) -> None:
        self.active = rank == 0
        if not self.active:
            return
        self._run_dir = Path(run_dir)
        self._total_steps = total_steps
        self._print_every = print_every
        self._console = console if console is not None else Console(soft_wrap=True, highlight=False)
        self._display: tuple[Progress, TaskID] | None = None
        self._page = _html.Page(title or self._run_dir.name, config, total_steps)
        self._last_sync = time.monotonic()

        self._run_dir.mkdir(parents=True, exist_ok=True)
        _replace(self._run_dir / "config.yaml", config)
        self._page.rows = _keep_rows(self._run_dir / "metrics.jsonl", resume_step)
        self._record = self._begin_record(resume_step, world_size, dict(identity or {}))
        self._page.answers = self._record["answers"]
        self._page.pictures = self._record["pictures"]
        self._write_record()
        self._metrics = (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active and not self._metrics.closed:
            self._close("stopped" if kind is None else f"failed: {kind.__name__}: {error}")

    def note(self, fact: object) -> None:
        """Print ``str(fact)`` and keep it for the page: what was chosen, counted or found before training."""
        if self.active:
            self._page.notes.append(str(fact))
            self._print(str(fact))

    def samples(self, samples: Iterable[Sequence[tuple[str, bool]]]) -> None:
        """Show training samples on the page; each is pieces of text, with whether the loss counts them."""
        if self.active:
            self._page.samples = [list(sample) for sample in samples]

    def answers(self, moment: str, answers: Iterable[tuple[str, str]]) -> None:
        """Print and keep (prompt, answer) pairs of a moment such as ``before`` or ``after`` training; they survive."""
        if not self.active:
            return
        pairs = [[prompt, answer] for prompt, answer in answers]
        self._record["answers"][moment] = pairs
        self._write_record()
        for prompt, answer in pairs:
            self._print(f"\n> {prompt}\n{answer.strip()}")

    def pictures(self, rows: Iterable[tuple[Sequence[bytes], str, str, str]], summary: str) -> None:
        """Show answers about pictures on the page, and print them; they survive.

        Each row is its pictures as PNG bytes, the prompt, the model's answer and the expected one.
        """
        if not self.active:
            return
        encoded: list[Any] = [
            [[base64.b64encode(picture).decode() for picture in pictures], prompt, answer, expected]
            for pictures, prompt, answer, expected in rows
        ]
        self._record["pictures"] = self._page.pictures = {"summary": summary, "rows": encoded}
        self._write_record()
        for _, prompt, answer, expected in encoded:
            self._print(f"> {prompt}  {answer.strip()}  (expected: {expected})")
        self._print(summary)

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

        ``loss`` is per target token; ``lr`` the rate the step was taken with; ``tokens`` and ``target_tokens`` count
        this step over all ranks, without padding; ``seconds`` is how long it took, without validation or saving.
        ``others`` are further numbers by name, the same names at every step; each gets a chart of its own.
        """
        if not self.active:
            return
        row = {
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
        } | dict(others or {})
        self._page.others = list(others or {})
        self._write_row(row)
        self._show(row)

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record validation losses per target token after ``step`` steps (0: before training).

        Their names are ``val_loss``, or ``val_loss_<name>`` where there are several data sets; ValueError otherwise.
        """
        if not self.active:
            return
        wrong = [name for name in losses if name != "val_loss" and not name.startswith("val_loss_")]
        if wrong:
            raise ValueError(f"validation losses {wrong} must be named val_loss or val_loss_<name>; rename them")
        row = {"step": step, **losses}
        self._write_row(row)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
        self._print(f"step {step}/{self._total_steps}  {shown}")
        self.write_page()

    def write_page(self) -> None:
        """Replace report.html; ``validation`` and ``finish`` do it themselves, call it after a checkpoint."""
        if self.active:
            self._sync()
            _replace(self._run_dir / "report.html", _html.render(self._page))

    def finish(
        self, *, goal: Mapping[str, Any] | None = None, status: str = "finished", next_steps: Sequence[str] = ()
    ) -> None:
        """End the record, once.

        ``goal`` is how long the run was asked to train, written to run.json as ``finished``; leave it out where the run
        was stopped before. ``next_steps`` are shell commands to show, with ``# ...`` lines for comments.
        """
        if not self.active:
            return
        self._page.next_steps = list(next_steps)
        if goal is not None:
            self._record["finished"] = dict(goal)
        self._close(status)
        for name, first, last in self._validation_losses():
            self._print(f"\n{name} {first:.4f} before, {last:.4f} after")
        self._print(f"{status}: {self._run_dir / 'report.html'}")
        for line in next_steps:
            self._print(f"  {line}")

    def _validation_losses(self) -> list[tuple[str, float, float]]:
        """Name, value before training and latest value of each validation loss that was measured before training."""
        rows = [row for row in self._page.rows if "loss" not in row]
        if not rows or rows[0]["step"] != 0:
            return []
        return [(name, value, rows[-1][name]) for name, value in rows[0].items() if name != "step"]

    def _begin_record(self, resume_step: int | None, world_size: int, identity: dict[str, Any]) -> dict[str, Any]:
        file = self._run_dir / "run.json"
        launch = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "resume_step": resume_step,
            "world_size": world_size,
            "git": _git_commit(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        record: dict[str, Any] = {"launches": [], "answers": {}, "pictures": {}}
        if resume_step is not None and file.exists():
            record |= json.loads(file.read_text(encoding="utf-8"))
        record |= {"identity": identity, "finished": None, "total_steps": self._total_steps}
        record["launches"].append(launch)
        self._page.launches = record["launches"]
        return record

    def _write_record(self) -> None:
        _replace(self._run_dir / "run.json", json.dumps(self._record, indent=2) + "\n")

    def _write_row(self, row: dict[str, Any]) -> None:
        broken = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            warning = f"step {row['step']}: " + ", ".join(f"{name} is {row[name]}" for name in broken)
            self._page.warnings.append(warning)
            self._print(f"WARNING {warning}; written as null")
        finite = {name: None if name in broken else value for name, value in row.items()}
        try:
            self._metrics.write(json.dumps(finite, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise _not_written(self._run_dir / "metrics.jsonl", error) from error
        if time.monotonic() - self._last_sync > SECONDS_BETWEEN_SYNCS:
            self._sync()
        self._page.rows.append(finite)

    def _sync(self) -> None:
        os.fsync(self._metrics.fileno())
        self._last_sync = time.monotonic()

    def _show(self, row: Mapping[str, Any]) -> None:
        numbers = (
            f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        step = row["step"]
        if self._console.is_terminal:
            if self._display is None:
                self._display = _start_display(self._console, self._total_steps, step - 1)
            progress, task = self._display
            progress.update(task, completed=step, numbers=numbers)
        elif step % self._print_every == 0 or step in (1, self._total_steps):
            memory = row["peak_memory_bytes"] / 2**30
            self._print(f"step {step}/{self._total_steps}  epoch {row['epoch']}  {numbers}  {memory:.2f} GiB")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _close(self, status: str) -> None:
        if self._display is not None:
            self._display[0].stop()
            self._display = None
        self._page.status = status
        self._write_record()
        self.write_page()
        self._metrics.close()


def peak_memory_bytes() -> int:
    """The most memory this process has held: of torch's CUDA allocator on a GPU, resident memory elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _start_display(console: Console, total_steps: int, steps_done: int) -> tuple[Progress, TaskID]:
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


def _keep_rows(file: Path, resume_step: int | None) -> list[dict[str, Any]]:
    """Drop the rows after ``resume_step``, all of them for None, and whatever follows a torn line; return the rest."""
    rows: list[dict[str, Any]] = []
    if resume_step is not None and file.exists():
        for line in file.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= resume_step:
                rows.append(row)
    _replace(file, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _replace(file: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash, finds the old file or the new one and never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError) -> OSError:
    """The error with what the system leaves out: which file, and how much room there is."""
    free = shutil.disk_usage(file.parent).free
    return OSError(
        error.errno, f"{file} was not written: {error.strerror}, {free} bytes are free; the same command continues"
    )


def _git_commit() -> str | None:
    """The commit of the working directory, with ``-dirty`` where it was changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
