"""The services that a run is delivered to: asked before it loads anything, told while it trains, and how it ended.

Each section of the config that is set (`RunConfig.trackers`) is a tracker with a thread of its own on rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from am_recipes.run_config import RunConfig
from am_recipes.settings import plain, written
from am_recipes.sinks import Row, delivered, ends, record
from am_recipes.sinks.follower import Follower
from am_recipes.sinks.tracker import Status, Tracked

# Of the end of a run; who sends a signal does not wait long.
_SECONDS_AT_THE_END, _SECONDS_AFTER_A_SIGNAL = 60.0, 10.0
# Of what a tracker gets, that is there by then.
_AT_THE_BEGINNING = "config.yaml"


class Trackers:
    """A sink that reads along: the thread of each tracker follows metrics.jsonl, and the training thread does nothing.

    `start` it once the log has made metrics.jsonl that of this launch; ask `news` now and then, and tell them to the
    log.

    Args:
        seconds: how long the end of a run waits for what is not delivered yet; a folder that is being uploaded may take
            as long as its bytes do.
        seconds_after_a_signal: the same where the run was stopped.
    """

    def __init__(
        self,
        followers: Sequence[Follower],
        *,
        seconds: float = _SECONDS_AT_THE_END,
        seconds_after_a_signal: float = _SECONDS_AFTER_A_SIGNAL,
    ) -> None:
        self._followers = followers
        self._seconds: dict[Status, float] = {"FINISHED": seconds, "FAILED": seconds, "KILLED": seconds_after_a_signal}
        self._started = False

    def news(self) -> Iterator[str]:
        """What the trackers have to say since the last call."""
        for follower in self._followers:
            yield from follower.news()

    def start(self) -> None:
        """Begin to deliver; once, however often it is called."""
        if not self._started:
            self._started = True
            for follower in self._followers:
                follower.start()

    def note(self, fact: str) -> None:
        """Nothing: a tracker gets rows and files."""

    def step(self, row: Row) -> None:
        """Nothing: it is in the file."""

    def validation(self, row: Row) -> None:
        """Nothing: it is in the file."""

    def close(self, status: str) -> None:
        """Wait, within bounds, until everything is delivered, and print what is not."""
        self.start()
        how = _status(status)
        for follower in self._followers:
            follower.finish(how)
        deadline = time.monotonic() + self._seconds[how]
        waiting = list(self._followers)
        while waiting and time.monotonic() < deadline:
            waiting = [follower for follower in waiting if not follower.join(0.05)]
            if any(follower.is_uploading for follower in waiting):
                # What comes after the upload has its time too.
                deadline = time.monotonic() + self._seconds[how]
        for follower in waiting:
            follower.give_up()
        for fact in self.news():
            print(fact)
        for follower in self._followers:
            left = follower.undelivered()
            if left is not None:
                print(left)


def build(config: RunConfig, resume_step: int | None) -> Trackers:
    """The trackers of a run; on another rank than the first, none. `resume_step`: see `Tracked`."""
    return Trackers(_followers(config, resume_step) if torch.distributed.get_rank() == 0 else [])


def require_reachable(config: RunConfig) -> None:
    """Refuse to begin a run whose tracker does not answer: ConfigError. One that goes on does so without, and says so.

    Imports the trackers' packages, here, where nobody trains yet: later it would hold up the steps. Rank 0 calls it.
    """
    begun = (config.run_dir / record.NAME).exists()
    for name, section in config.trackers().items():
        try:
            with config.at(name):
                section.reach()
        except ValueError as error:
            if not begun:
                raise
            print(f"WARNING {error}; the run goes on, and what is missing there is delivered once it answers")


def deliver_rest(config: RunConfig) -> None:
    """Deliver what the trackers of a finished run still miss, within the bounds of its end. Rank 0 calls it."""
    missing = [name for name in config.trackers() if delivered.load(config.run_dir, name).status != "FINISHED"]
    if missing:
        print(f"{', '.join(missing)}: what is missing there of {config.run_dir} is delivered")
        # Nothing begins anew: the run is at its end.
        build(config, record.load(config.run_dir).total_steps).close(ends.FINISHED)


def _followers(config: RunConfig, resume_step: int | None) -> list[Follower]:
    def tracked(identifier: str | None) -> Tracked:
        return Tracked(
            name=config.run_dir.name,
            run_dir=config.run_dir.absolute(),
            params=flat(written(plain(config), config.environment)),
            tags=_tags(config),
            id=identifier,
            resume_step=resume_step,
        )

    return [
        Follower(
            name,
            section.tracker(),
            config.run_dir,
            tracked,
            section.artifacts(),
            at_the_beginning=[file for file in section.artifacts() if file == _AT_THE_BEGINNING],
        )
        for name, section in config.trackers().items()
    ]


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested values by dotted key; what is no mapping, or an empty one, stays as it is."""
    result: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _tags(config: RunConfig) -> dict[str, str]:
    """Of the launch that has just been recorded."""
    launch = record.load(config.run_dir).launches[-1]
    tags = {"recipe": config.recipe, "device": launch["device"], "world_size": str(launch["world_size"])}
    tags["command"] = launch["command"]
    if launch["git"] is not None:
        tags["git_commit"] = launch["git"]
    # All that is installed, which is hundreds, is in run.json.
    shown = ("python", "torch", *record.OURS)
    return tags | {f"version.{name}": launch["versions"][name] for name in shown if name in launch["versions"]}


def _status(status: str) -> Status:
    """How a log's status reads at a service."""
    if ends.is_finished(status):
        return "FINISHED"
    return "KILLED" if ends.is_stopped(status) else "FAILED"
