"""What a scheduler is asked to run, and what it is given for that: text first, so that it can be shown and checked."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """A command line to be run elsewhere.

    Args:
        name: what the job is called where nothing else says so: `llm_finetune`.
        config: file name of the config.
        text: of the config, with `${here}` written out and the same lines, so that messages name the same line.
        program: what Python runs: `-m`, a module; or a file.
        arguments: of the program, beside `-c CONFIG`: the overrides, among them one (`--slurm null`) that takes the
            section of the launcher out.
        folder: where the command was typed, and runs.
        run_dir: where the run is kept.
        run_dir_reference: the same as it was written, where that refers to the environment: there it may differ.
        processes: ranks on each machine that the command line asks for.
        variables: what the config needs of the environment, and the first key that does, by name.
    """

    name: str
    config: str
    text: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    folder: Path
    run_dir: Path
    run_dir_reference: str | None = None
    processes: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    def own_folder(self, job_dir: Path, now: int) -> Path:
        """The folder of a submission at `now`, in the section's `job_dir`."""
        return (self.folder / job_dir / str(now)).absolute()


@dataclass(frozen=True)
class Rendered:
    """What a launcher makes of a job, still in memory.

    Args:
        folder: where the files go; made new.
        files: text by file name, the config among them.
        shown: the name of the file that `--dry-run` prints.
        command: hands it to the scheduler, run in the job's folder.
    """

    folder: Path
    files: Mapping[str, str]
    shown: str
    command: tuple[str, ...]


class Launcher(Protocol):
    """A section of a config that says which scheduler runs it."""

    @property
    def same_python(self) -> bool:
        """Whether the ranks have the Python and packages of this process: what the config names is then looked at."""
        ...

    def render(self, job: Job, now: int) -> Rendered:
        """The files and the command for `job`, at `now` (seconds since the epoch). Writes nothing.

        Raises ArgumentError with the key (`kubernetes.name`), or ValueError, where the scheduler could not take it.
        """
        ...

    def submitted(self, rendered: Rendered, output: str) -> str:
        """What to tell of a job that was taken: where it runs, how to follow and to cancel it.

        `output` is what the command printed.
        """
        ...

    def refused(self, errors: str) -> tuple[str, str]:
        """Of what the command wrote on stderr when it failed: which key of the section it means, and what helps."""
        ...


@dataclass(frozen=True)
class Refusal:
    """What a scheduler's command says of a key of ours.

    Args:
        words: that all stand in its message, in small letters.
        key: of the section; empty for none alone.
        fix: what helps.
    """

    words: tuple[str, ...]
    key: str
    fix: str


def refusal(table: Sequence[Refusal], errors: str, otherwise: str) -> tuple[str, str]:
    """Key and fix of the first row of `table` that `errors` speaks of; no key and `otherwise` without one."""
    for row in table:
        if all(word in errors.lower() for word in row.words):
            return row.key, row.fix
    return "", otherwise


def submit(render: Callable[[int], Rendered], folder: Path) -> tuple[Rendered, subprocess.CompletedProcess[str]]:
    """Write the files of a job and run its command in `folder`; the job, and how the command ended and what it said.

    `render` makes the job for a time, which is now, or the next one whose folder nobody has made: also two submissions
    in one second have their own. Raises FileNotFoundError where the scheduler's command is not on PATH, before anything
    is written.
    """
    for now in itertools.count(int(time.time())):
        rendered = render(now)
        program = rendered.command[0]
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"{program} is not on PATH, so there is nothing to submit to; type this where it is. --dry-run shows "
                "what would be submitted, and the section taken out (null) trains here"
            )
        rendered.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            rendered.folder.mkdir()
            break
    for name, text in rendered.files.items():
        (rendered.folder / name).write_text(text, encoding="utf-8")
    return rendered, subprocess.run(rendered.command, cwd=folder, capture_output=True, text=True, check=False)
