"""Handing a run to the scheduler that its config names, or showing what it would be given."""

from __future__ import annotations

import functools
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from am_recipes.configs import RunConfig, check_targets, parse
from am_recipes.launch import job
from am_recipes.settings import is_secret, load, override, plain, references, variable, walk, with_folder


@dataclass(frozen=True)
class Asked:
    """A command line that is to run elsewhere.

    Args:
        path: of the config.
        overrides: of the config.
        flags: of the command beside them.
        program: what runs: a module, or a file that ends in .py.
        processes: ranks on each machine, where the command line says so.
    """

    path: Path
    overrides: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    program: str
    processes: int | None


def rendered(config: RunConfig, asked: Asked) -> job.Rendered:
    """What the scheduler would be given. Raises `ConfigError` or `UnusableError`, with the key that is responsible."""
    key, launcher = _launcher(config)
    given = _job(config, key, asked)
    with config.at(key):
        return launcher.render(given, int(time.time()))


def same_python(config: RunConfig) -> bool:
    """Whether what the config names by `_target_` is what will run, so that it can be held against it here."""
    return _launcher(config)[1].same_python


def submit(config: RunConfig, asked: Asked) -> int:
    """Hand the run to its scheduler; the exit status of the command that does it. Says what became of it."""
    key, launcher = _launcher(config)
    run = _job(config, key, asked)
    with config.at(key):
        # What it cannot take is said before torch is imported for the targets.
        launcher.render(run, int(time.time()))
    if launcher.same_python:
        check_targets(config)
    with config.at(key):
        given, result = job.submit(functools.partial(launcher.render, run), Path.cwd())
    sys.stderr.write(result.stderr)
    if result.returncode:
        name, fix = launcher.refused(result.stderr)
        message = f"{given.command[0]} refused the job ({result.returncode}): {fix}"
        print(f"error: {config.error(f'{key}.{name}'.rstrip('.'), message)}", file=sys.stderr)
        print(f"what it was given: {shlex.join(given.command)}", file=sys.stderr)
        return result.returncode
    print(launcher.submitted(given, result.stdout))
    print(f"  run     {run.run_dir_reference or run.run_dir} (config.yaml, metrics.jsonl, checkpoints)")
    return 0


def _launcher(config: RunConfig) -> tuple[str, job.Launcher]:
    ((key, launcher),) = config.launchers().items()
    return key, launcher


def _job(config: RunConfig, key: str, asked: Asked) -> job.Job:
    text = with_folder(asked.path.read_text(encoding="utf-8"), str(asked.path.absolute().parent))
    copy = _require_same(config, text, asked)
    _require_no_secrets(asked)
    arguments = (*(f"--{path}={value}" for path, value in asked.overrides), f"--{key}=null", *asked.flags)
    program = (asked.program,) if asked.program.endswith(".py") else ("-m", asked.program)
    name = "_".join(reversed(config.COMMAND))
    return job.Job(
        name=name,
        config=asked.path.name,
        text=text,
        program=program,
        arguments=arguments,
        folder=Path.cwd(),
        run_dir=config.run_dir,
        run_dir_reference=copy.environment.get("run_dir"),
        processes=asked.processes,
        variables=_variables(config, key),
    )


def _variables(config: RunConfig, key: str) -> dict[str, str]:
    """What the config takes from the environment, sections of launchers aside, with the first key that does."""
    found: dict[str, str] = {}
    for path, text in config.environment.items():
        if path.partition(".")[0] != key:
            found = {name: path for name, default in references(text) if default is None} | found
    return found


def _require_no_secrets(asked: Asked) -> None:
    """Refuse secrets in clear: the config is copied, and overrides stand in the command of the job."""
    tree = load(asked.path)
    for path, text in asked.overrides:
        override(tree, path, text)
    for path, node in walk(tree):
        if is_secret(path) and _is_in_clear(node.value):
            raise node.error(
                "a secret in clear would be copied with the config to where it runs; name an environment variable "
                "that holds it instead: ${NAME}"
            )


def _is_in_clear(value: object) -> bool:
    """Whether a value is more than the name of a variable; a number is a secret as well as a text."""
    if isinstance(value, str):
        return value not in ("", "none", "None") and variable(value) is None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_same(config: RunConfig, text: str, asked: Asked) -> RunConfig:
    """The config as its copy has it; refuses one that means something else at another place.

    That is `${here}` where it cannot be written out.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, asked.path.name)
        path.write_text(text, encoding="utf-8")
        copy = parse(path, asked.overrides)
    # As texts: .nan is not equal to itself.
    if json.dumps(plain(copy), default=str) != json.dumps(plain(config), default=str):
        raise config.error("", "a copy in the folder of the job would mean something else; write ${here} out")
    return copy


def preview(given: job.Rendered) -> str:
    """The text for people, with the command that would hand it over."""
    return f"# {shlex.join(given.command)}\n{given.files[given.shown]}"
