"""What the ranks of a run must have in common before it loads anything: their config, and the run directory itself.

Two machines without a common file system would write half of every checkpoint each.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from am_recipes import lock
from am_recipes.run_config import RunConfig, identity_difference
from am_recipes.settings import plain, written
from am_recipes.sinks.record import OURS

# NFS keeps for up to a minute what it knows of a folder, so that a file of another machine is not there.
SECONDS_TO_APPEAR = 60.0
_SECONDS_OF_SILENCE = 5.0
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "datasets", "numpy")


@dataclass(frozen=True)
class Claim:
    """What rank 0 has: the host, the run directory there, the text of its lock, its config and its packages."""

    host: str
    folder: Path
    lock: bytes
    configs: tuple[dict[str, Any], dict[str, Any]]
    versions: dict[str, str]


def claim_of(config: RunConfig) -> Claim:
    """Of this rank, once the lock is held."""
    text = _text(config.run_dir) or b""
    return Claim(socket.gethostname(), config.run_dir.absolute(), text, _configs(config), _versions())


def require_shared(config: RunConfig, claim: Claim) -> None:
    """Raise Refused, on every rank, unless each sees what rank 0 made in the run directory, may write there, and has
    its config. Every rank calls it with the `claim` of rank 0.

    A rank of another machine waits for a minute until it sees that.
    """
    complaints: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(complaints, _complaint(config, claim))
    first = next(filter(None, complaints), None)
    if first is not None:
        raise lock.Refused(first)


def _complaint(config: RunConfig, claim: Claim) -> str | None:
    host, folder = socket.gethostname(), config.run_dir.absolute()
    me = f"rank {torch.distributed.get_rank()} on {host}"
    for mine, theirs in zip(_configs(config), claim.configs, strict=True):
        # As texts: a NaN is no other than itself.
        if json.dumps(mine, sort_keys=True) != json.dumps(theirs, sort_keys=True):
            different = ", ".join(identity_difference(theirs, mine))
            return (
                f"{me} was given another config than rank 0 on {claim.host}: {different}; every machine needs the same "
                "file and the same command, but for --node-rank"
            )
    here = _versions()
    others = {name: there for name, there in claim.versions.items() if there != here[name]}
    if others:
        told = ", ".join(f"{name} {here[name]}, not {there}" for name, there in others.items())
        return f"{me} has other packages than rank 0 on {claim.host}: {told}; every machine needs the same versions"
    # On one machine there is nothing to wait for.
    if not appears(config.run_dir, claim.lock, 0 if host == claim.host else SECONDS_TO_APPEAR):
        return (
            f"run_dir={config.run_dir} is not one directory: {me} does not see in {folder} what rank 0 on {claim.host} "
            f"has made in {claim.folder}; it must be on storage that every machine has under the same path, so give an "
            "absolute one there"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"run_dir={config.run_dir}: {me} cannot write in {folder}, as every rank must; mount it writable there"
    return None


def appears(run_dir: Path, text: bytes, seconds: float) -> bool:
    """Whether the lock in `run_dir` has this text within `seconds`; says for what it waits after five of them."""
    began = time.monotonic()
    said = False
    while _text(run_dir) != text:
        waited = time.monotonic() - began
        if waited >= seconds:
            return False
        if waited > _SECONDS_OF_SILENCE and not said:
            print(f"waiting for {run_dir} to appear on {socket.gethostname()}", file=sys.stderr, flush=True)
            said = True
        # To list a folder has the system ask the server again.
        with contextlib.suppress(OSError):
            os.listdir(run_dir.parent)
        time.sleep(0.2)
    return True


def _configs(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same on every rank: what identifies the run, and the rest as it is written, layout and lengths
    too; a name of a machine may come from its environment.
    """
    values = written(plain(config), config.environment)
    return config.identity(), {key: value for key, value in values.items() if key != "run_dir"}


def _versions() -> dict[str, str]:
    """Of what computes, or decides what tensors are called and where they lie."""
    python = ".".join(platform.python_version_tuple()[:2])
    found = {name: importlib.metadata.version(name) for name in (*OURS, *_PACKAGES)}
    return {"python": python} | found


def _text(run_dir: Path) -> bytes | None:
    try:
        return (run_dir / lock.NAME).read_bytes()
    except OSError:
        return None
