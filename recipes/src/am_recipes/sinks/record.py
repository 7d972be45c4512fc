"""run.json: what a run is and what is known of it beside its rows."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from am_recipes.sinks import files

NAME = "run.json"
# Our distributions.
OURS = ("am-recipes", "am-ckpt", "am-data", "am-kernels", "am-loss", "am-mesh", "am-models", "am-moe", "am-peft")


class Launch(TypedDict):
    """One start of the run's command, as `am_recipes.provenance` finds it.

    git: the state of the working directory; code: of the repositories, and digests of the user's own files.
    config: resolved, with secrets as references; origins: where each of its values was set, by dotted path. data:
    digests of what the run read, by name. environment: the machine, variables, the job of a scheduler.
    """

    time: str
    command: str
    resume_step: int | None
    world_size: int
    git: str | None
    device: str
    versions: dict[str, str]
    # Runs of earlier versions lack these.
    code: NotRequired[dict[str, str]]
    environment: NotRequired[dict[str, Any]]
    # Of a recipe's run alone.
    config: NotRequired[dict[str, Any]]
    origins: NotRequired[dict[str, str]]
    data: NotRequired[dict[str, str]]


class ImageAnswers(TypedDict):
    """Answers about images; a row is its images as PNG in base64, the prompt and the expected answer.

    answers: by moment, such as `after`, one for each row. summary: of these, by moment.
    """

    rows: list[tuple[list[str], str, str]]
    answers: dict[str, list[str]]
    summary: dict[str, str]


@dataclass
class Record:
    """The content of run.json.

    Args:
        total_steps: optimizer steps of the whole run.
        identity: JSON values that make two runs the same run.
        launches: one for each start, the oldest first.
        title: heading of the page; None is the name of the run directory.
        status: `running` until the run was closed.
        finished: how long the finished run was asked to train; None where it has not finished.
        ending: what else decided how the finished run ended: early stopping and export.
        notes: facts of the latest launch.
        warnings: step and text.
        samples: training samples as pieces of text, each with whether the loss counts it.
        answers: by moment, such as `after`: pairs of prompt and answer.
        next_steps: shell commands, with `# ...` lines for comments.

    It is saved at every note, so a launch, which says much and does not change, becomes text once.
    """

    total_steps: int
    identity: dict[str, object]
    launches: list[Launch]
    title: str | None = None
    status: str = "running"
    finished: dict[str, object] | None = None
    ending: dict[str, object] | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)
    answers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    image_answers: ImageAnswers | None = None
    next_steps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._texts: list[str] = []

    def add_data(self, digests: Mapping[str, str]) -> None:
        """Say more of what the latest launch read."""
        latest = self.launches[-1]
        latest["data"] = {**digests, **latest.get("data", {})}
        del self._texts[len(self.launches) - 1 :]

    def save(self, run_dir: Path) -> None:
        content = {item.name: self.__dict__[item.name] for item in dataclasses.fields(self) if item.name != "launches"}
        self._texts += [_indented(launch, "    ") for launch in self.launches[len(self._texts) :]]
        launches, others = ",\n".join(self._texts), json.dumps(content, indent=2).removeprefix("{")
        text = f'{{\n  "launches": [\n{launches}\n  ],{others}\n'
        files.replace(run_dir / NAME, [text.encode()])


def _indented(value: object, margin: str) -> str:
    return textwrap.indent(json.dumps(value, indent=2), margin)


def load(run_dir: Path) -> Record:
    """Read `run_dir/run.json`; a key that is not there has its default.

    Raises ValueError where the file is not the record of a run.
    """
    file = run_dir / NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Record(**{name: content[name] for name in Record.__dataclass_fields__ if name in content})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is not the record of a run ({error}); restore the file, or give this run its own run_dir"
        ) from error
