"""run.json: what a run is and what is known of it beside its rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from am_recipes.sinks import files

NAME = "run.json"
# Keys of a launch that are long, and mostly equal in the next one.
LONG = ("versions", "config", "origins", "code", "data")
# In the file, the key for those that are.
AS_NEXT = "as_next"
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

    It is saved at every note, so a launch, which says much and does not change, becomes text once. What is long and
    equal in the launch after it is written there alone: a run may be launched a thousand times.
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
        del self._texts[max(0, len(self.launches) - 2) :]

    def save(self, run_dir: Path) -> None:
        content = {item.name: self.__dict__[item.name] for item in dataclasses.fields(self) if item.name != "launches"}
        if len(self._texts) < len(self.launches):
            # What was the last one has a next one now.
            del self._texts[-1:]
            pairs = itertools.zip_longest(self.launches, self.launches[1:])
            self._texts += [_text(*pair) for pair in itertools.islice(pairs, len(self._texts), None)]
        launches, others = ",\n".join(self._texts), json.dumps(content, indent=2).removeprefix("{")
        text = f'{{\n  "launches": [\n{launches}\n  ],{others}\n'
        files.replace(run_dir / NAME, [text.encode()])


def _text(launch: Launch, after: Launch | None) -> str:
    """A launch as the file has it, indented."""
    content: dict[str, Any] = {**launch}
    if after is not None:
        equal = [key for key in LONG if key in content and key in after and content[key] == {**after}[key]]
        content = {key: value for key, value in content.items() if key not in equal} | (
            {AS_NEXT: equal} if equal else {}
        )
    return textwrap.indent(json.dumps(content, indent=2), "    ")


def _whole(launches: list[dict[str, Any]]) -> None:
    """Put back what launches have in common with the next one."""
    for launch, after in reversed(list(itertools.pairwise(launches))):
        launch |= {key: after[key] for key in launch.pop(AS_NEXT, ())}


def load(run_dir: Path) -> Record:
    """Read `run_dir/run.json`; a key that is not there has its default.

    Raises ValueError where the file is not the record of a run.
    """
    file = run_dir / NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _whole(content.get("launches", []))
        return Record(**{name: content[name] for name in Record.__dataclass_fields__ if name in content})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is not the record of a run ({error}); restore the file, or give this run its own run_dir"
        ) from error
