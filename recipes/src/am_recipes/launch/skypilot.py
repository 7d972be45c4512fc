"""A task of SkyPilot, which rents machines, runs the same commands on each, and starts a lost job anew elsewhere.

Pure functions from values to a mapping; `am_recipes.launch.kubernetes.dump` makes text of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from am_recipes.launch.nodes import PREEMPTED

# Beside the folder that SkyPilot copies; a path there may begin with ~, which the shell of the task writes out.
CONFIG_FOLDER = "~/automodel_job"


@dataclass(frozen=True)
class Task:
    """What is rented, and what runs on each machine.

    Args:
        command: of each machine, before the options of the launch and the config.
        config: where the config is here, and its file name.
        processes: ranks of a machine; None is one for each GPU that is there.
        resources: as SkyPilot has them, without those of the recovery.
        secrets: variables that `sky` takes from the environment it is called in; by the name that the run knows.
        managed: whether SkyPilot watches over the job and starts it anew.
    """

    name: str
    command: Sequence[str]
    config: tuple[str, str]
    arguments: Sequence[str]
    nodes: int
    processes: int | None
    port: int
    resources: Mapping[str, Any]
    managed: bool
    max_restarts: int
    workdir: str | None = None
    setup: str | None = None
    file_mounts: Mapping[str, Any] = field(default_factory=dict)
    volumes: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)


def describe(task: Task) -> dict[str, Any]:
    """The task file: secrets are null in it, and filled in by `--secret NAME` of the command."""
    folder, name = task.config
    recovery = {"max_restarts_on_errors": task.max_restarts, "recover_on_exit_codes": [PREEMPTED]}
    values = {
        "name": task.name,
        "workdir": task.workdir,
        "num_nodes": task.nodes,
        "resources": dict(task.resources) | ({"job_recovery": recovery} if task.managed else {}),
        "file_mounts": {f"{CONFIG_FOLDER}/{name}": f"{folder}/{name}"} | dict(task.file_mounts),
        "volumes": dict(task.volumes),
        "envs": dict(task.env),
        "secrets": dict.fromkeys(task.secrets.values()),
        "setup": task.setup,
        "run": _run(task),
    }
    return {key: value for key, value in values.items() if value not in (None, {})}


def command_for(task: Task, file: str) -> tuple[str, ...]:
    """What hands the task `file` to SkyPilot and comes back once it is taken."""
    launch = ("sky", "jobs", "launch", "-n") if task.managed else ("sky", "launch", "-c")
    secrets = [word for variable in dict.fromkeys(task.secrets.values()) for word in ("--secret", variable)]
    return (*launch, task.name, "-y", "-d", *secrets, file)


def _run(task: Task) -> str:
    """The shell script of each machine; `exec` so that signals and the exit status are those of the launcher."""
    renamed = [f'export {name}="${variable}"' for name, variable in task.secrets.items() if name != variable]
    words = [*map(shlex.quote, task.command), "-c", f"{CONFIG_FOLDER}/{shlex.quote(task.config[1])}"]
    words += map(shlex.quote, task.arguments)
    if task.nodes > 1:
        endpoint = f'"$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{task.port}"'
        words += ["--nnodes", str(task.nodes), "--node-rank", '"$SKYPILOT_NODE_RANK"', "--rdzv-endpoint", endpoint]
    if task.processes is not None:
        words += ["--nproc-per-node", str(task.processes)]
    return "\n".join([*renamed, "exec " + " ".join(words), ""])
