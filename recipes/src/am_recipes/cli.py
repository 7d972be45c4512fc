"""The `automodel` command, and the command line of each recipe module.

Exit status: 0 done, 1 failed, 2 wrong usage or config, 75 stopped by SIGTERM and can be continued. A mistake in what
the user wrote is a message on stderr; what a library raises shows its traceback, and so does everything with
``--debug`` or ``AUTOMODEL_TRACEBACK=1``.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from am_recipes import launch
from am_recipes.configs import ConfigError, RunConfig, check_targets, parse
from am_recipes.settings.yaml import did_you_mean

HELP = """\
usage: automodel CONFIG [options] [overrides]
       automodel COMMAND -c CONFIG [options] [overrides]

Runs the recipe that the YAML file CONFIG names; a COMMAND demands one:
  finetune llm   sft        pretrain llm   pretrain
  finetune vlm   vlm        kd llm         kd

options:
  -c, --config CONFIG     the config file
  --nproc-per-node N      processes on this machine (default: one per GPU, one where there is none)
  --dry-run               check the config, print it with every default, and stop
  --debug                 show tracebacks (also: AUTOMODEL_TRACEBACK=1)
  -h, --help              this text

overrides, for any key of the config:
  --optimizer.lr 1e-5     --step_scheduler.max_steps=100     --generate.prompts.0 "Hello"     --peft null

The same command again continues the run from its latest checkpoint. Under torchrun and on several machines:
  torchrun --nproc-per-node 8 -m am_recipes.sft -c CONFIG [overrides]

exit status: 0 done, 1 failed, 2 wrong usage or config, 75 stopped by SIGTERM: run it again to continue"""

COMMANDS = {
    ("finetune", "llm"): "sft",
    ("finetune", "vlm"): "vlm",
    ("pretrain", "llm"): "pretrain",
    ("kd", "llm"): "kd",
}
_PACKAGES = (
    "am_ckpt",
    "am_data",
    "am_kernels",
    "am_loss",
    "am_mesh",
    "am_models",
    "am_moe",
    "am_peft",
    "am_recipes",
)
_WITH_VALUE = {"-c": "config", "--config": "config", "--nproc-per-node": "nproc", "--nproc_per_node": "nproc"}
_FLAGS = {"-h": "help", "--help": "help", "--dry-run": "dry_run", "--debug": "debug"}
# What a first rank may need to import and look at before it can report: seconds.
_SECONDS_TO_REPORT = 15


class UsageError(ValueError):
    """A command line that cannot be understood."""


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart; ``recipe`` is what the command demands of the config, if anything."""

    path: Path | None
    overrides: tuple[tuple[str, str], ...] = ()
    recipe: str | None = None
    processes: int | None = None
    dry_run: bool = False
    debug: bool = False
    help: bool = False

    def worker_arguments(self) -> list[str]:
        """The command line of the recipe module in each process that this one starts."""
        overrides = [f"--{path}={text}" for path, text in self.overrides]
        return ["-c", str(self.path), *overrides, *(["--debug"] if self.debug else [])]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Take ``[CONFIG | COMMAND DOMAIN] [options] [overrides]`` apart. Raises `UsageError`; reads no file."""
    positional: list[str] = []
    overrides: list[tuple[str, str]] = []
    values: dict[str, str] = {}
    flags: set[str] = set()
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if name in _FLAGS:
            if equals:
                raise UsageError(f"{name} takes no value, got {value!r}")
            flags.add(_FLAGS[name])
        elif not token.startswith("-"):
            positional.append(token)
        elif name in _WITH_VALUE or (name.startswith("--") and ("." in name or "-" not in name[2:])):
            if not equals:
                if not tokens or tokens[0].startswith("--"):
                    raise UsageError(f"{name} needs a value{did_you_mean(name, [*_FLAGS, *_WITH_VALUE])}")
                value = tokens.pop(0)
            if name in _WITH_VALUE:
                values[_WITH_VALUE[name]] = value
            else:
                overrides.append((name[2:], value))
        else:
            raise UsageError(f"unknown option {name}{did_you_mean(name, [*_FLAGS, *_WITH_VALUE])}")
    recipe = None if "help" in flags else _recipe(positional)
    configs = [*positional, *([values["config"]] if "config" in values else [])]
    if len(configs) > 1 and "help" not in flags:
        raise UsageError(f"two configs: {configs[0]} and {configs[1]}")
    return Arguments(
        recipe=recipe,
        path=Path(configs[0]) if configs else None,
        overrides=tuple(overrides),
        processes=_processes(values.get("nproc")),
        dry_run="dry_run" in flags,
        debug="debug" in flags,
        help="help" in flags,
    )


def _recipe(positional: list[str]) -> str | None:
    """Take a command and its domain off ``positional``; what is left there may only be the config."""
    existing = ", ".join(" ".join(command) for command in COMMANDS)
    verbs = {verb for verb, _ in COMMANDS}
    recipe = None
    if positional and not Path(positional[0]).exists() and Path(positional[0]).suffix not in (".yaml", ".yml"):
        command = tuple(positional[:2])
        if len(command) < 2 or command not in COMMANDS:
            hint = did_you_mean(positional[0], verbs) if positional[0] not in verbs else ""
            raise UsageError(
                f"{' '.join(command)!r} is neither a config file nor a command{hint}; there is: {existing}"
            )
        recipe = COMMANDS[command[0], command[1]]
        del positional[:2]
    if len(positional) > 1:
        raise UsageError(f"unexpected argument {positional[1]!r}; overrides are written --section.key value")
    return recipe


def _processes(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--nproc-per-node must be a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The `automodel` command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # As with `python -m`: targets may name the user's own modules beside the place the command is typed.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return _run_command(argv, None)


def main_recipe(recipe: str, argv: Sequence[str] | None = None) -> int:
    """The command line of one recipe module, which runs in this process; returns the exit status."""
    return _run_command(sys.argv[1:] if argv is None else argv, recipe)


def _run_command(argv: Sequence[str], module: str | None) -> int:
    try:
        arguments = parse_arguments(argv)
        if arguments.help or not argv:
            print(HELP)
            return 0
        if arguments.path is None:
            raise UsageError("which config? Write automodel CONFIG or -c CONFIG")
        _check_worker(arguments, module)
    except UsageError as error:
        print(f"error: {error}\nautomodel --help shows the usage", file=sys.stderr)
        return 2
    debug = arguments.debug or os.environ.get("AUTOMODEL_TRACEBACK") == "1"
    path = arguments.path
    return _reported(lambda: _run_config(arguments, path, module), debug)


def _check_worker(arguments: Arguments, module: str | None) -> None:
    if arguments.processes is None:
        return
    here = os.environ.get("LOCAL_WORLD_SIZE") if _is_worker() else None
    if here is not None and int(here) != arguments.processes:
        raise UsageError(f"--nproc-per-node {arguments.processes} inside a torchrun worker that has {here} processes")
    if here is None and module is not None and arguments.processes > 1:
        raise UsageError(
            f"python -m am_recipes.{module} is one process; use automodel --nproc-per-node {arguments.processes} "
            f"or torchrun --nproc-per-node {arguments.processes} -m am_recipes.{module}"
        )


def _run_config(arguments: Arguments, path: Path, module: str | None) -> int:
    config = parse(path, arguments.overrides)
    for demanded in (arguments.recipe, module):
        if demanded is not None and demanded != config.recipe:
            raise config.error("recipe", f"the command runs {demanded!r}, the config says {config.recipe!r}")
    if arguments.dry_run:
        check_targets(config)
        print(config, end="")
        return 0
    if module is None and not _is_worker():
        processes = arguments.processes or _default_processes()
        if processes > 1:
            return launch.run(f"am_recipes.{config.recipe}", arguments.worker_arguments(), processes)
    return _train(config)


def _train(config: RunConfig) -> int:
    check_targets(config)
    status = importlib.import_module(f"am_recipes.{config.recipe}").main(config)
    return 0 if status is None else int(status)


def _reported(function: Callable[[], int], debug: bool) -> int:
    """Run ``function``; turn what went wrong into a message and an exit status.

    Ranks of one machine see the same config and environment, so the first of them reports a config error and torchrun
    stops the others meanwhile; anything else may differ and is reported by every rank under its number.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "error: " if rank == "0" else f"[rank {rank}] error: "
    try:
        return function()
    except ConfigError as error:
        if debug:
            traceback.print_exc()
            return 2
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Were this rank to end first, torchrun would stop the first one before it has said anything.
            time.sleep(_SECONDS_TO_REPORT)
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"{prefix}{error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, RuntimeError, ArithmeticError, ModuleNotFoundError) as error:
        is_message = not debug and _raised_by_us(error)
        if not is_message:
            traceback.print_exc()
        print(f"{prefix}{error}{' (--debug shows where)' if is_message else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prefix}interrupted", file=sys.stderr)
        return 130


def _raised_by_us(error: BaseException) -> bool:
    """Whether the innermost Python frame is in one of our packages, which raise with messages for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # Generated code, such as a compiled chat template, has no module name.
    return frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES


def _is_worker() -> bool:
    """Whether torchrun (or whoever sets its variables) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _default_processes() -> int:
    # The first heavy import of a run; everything before it has to answer at once.
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    raise SystemExit(main())
