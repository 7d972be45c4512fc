"""Several machines by hand: the same command on each of them, with its number and where they meet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PREEMPTED = 75
"""Exit status of a run that was told to stop and can be continued (EX_TEMPFAIL)."""

MEETING_TIMEOUT = "AUTOMODEL_MEETING_TIMEOUT"
"""The environment variable with the seconds that machines wait for each other."""

SECONDS_TO_MEET = 600
"""Without it."""

# HOST:PORT, where an IPv6 address has brackets.
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):([0-9]+)")


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which of them this is.

    Args:
        count: machines.
        rank: of this one; its ranks come after those of all machines with a lower number.
        host: where number 0 is reached by all of them.
        port: a free one there.
    """

    count: int
    rank: int
    host: str
    port: int

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"


def is_whole(text: str, least: int = 0) -> bool:
    """Whether a text is a whole number of at least `least`: digits that everybody reads, and no sign."""
    return text.isascii() and text.isdecimal() and int(text) >= least


def seconds_to_meet(environment: Mapping[str, str]) -> int:
    """How long machines wait for each other. Raises ValueError."""
    text = environment.get(MEETING_TIMEOUT) or str(SECONDS_TO_MEET)
    if not is_whole(text, 1):
        raise ValueError(f"{MEETING_TIMEOUT}={text} is no whole number of seconds of at least 1; correct or unset it")
    return int(text)


def parse(options: Mapping[str, str]) -> Nodes | None:
    """What `--nnodes`, `--node-rank` and `--rdzv-endpoint` of a command line say; None for this machine alone.

    Args:
        options: the texts of those that are there, by name without the dashes.

    Raises ValueError.
    """
    given = [name for name in ("nnodes", "node-rank", "rdzv-endpoint") if name in options]
    if not given:
        return None
    count = _whole("nnodes", options["nnodes"], 1) if "nnodes" in options else None
    if count == 1:
        if "rdzv-endpoint" in options:
            _endpoint(options["rdzv-endpoint"])
        rank = _whole("node-rank", options.get("node-rank", "0"), 0)
        if rank:
            raise ValueError(f"--node-rank {rank} must be less than --nnodes 1; the only machine has number 0")
        return None
    missing = [f"--{name}" for name in ("nnodes", "node-rank", "rdzv-endpoint") if name not in options]
    if count is None or missing:
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in given)} without {' and '.join(missing)}: several machines need "
            "--nnodes N --node-rank R --rdzv-endpoint HOST:PORT on each of them, R from 0 to N - 1, and HOST:PORT "
            "of the one with R = 0; leave all of them out for this machine alone"
        )
    rank = _whole("node-rank", options["node-rank"], 0)
    if rank >= count:
        raise ValueError(
            f"--node-rank {rank} must be less than --nnodes {count}; number the machines from 0 to {count - 1}"
        )
    host, port = _endpoint(options["rdzv-endpoint"])
    return Nodes(count, rank, host, port)


def _whole(name: str, text: str, least: int) -> int:
    if not is_whole(text, least):
        raise ValueError(f"--{name} must be a whole number of at least {least}, got {text!r}")
    return int(text)


def _endpoint(text: str) -> tuple[str, int]:
    parts = _ENDPOINT.fullmatch(text)
    if parts is None or not 1 <= int(parts[2]) <= 65535:
        raise ValueError(
            f"--rdzv-endpoint must be HOST:PORT with a port from 1 to 65535, got {text!r}; HOST is a name or address "
            "of the machine with --node-rank 0 that all of them reach, as in node0:29400 or [fe80::1]:29400"
        )
    return parts[1], int(parts[2])
