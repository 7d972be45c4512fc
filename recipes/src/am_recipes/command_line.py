"""The command line of `automodel` and of each recipe, taken apart: grammar, options and help. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from am_recipes import launch
from am_recipes.configs import RECIPES
from am_recipes.settings import did_you_mean

COMMANDS = {kind.COMMAND: name for name, kind in RECIPES.items()}
_COMMAND_LINES = "\n".join(f"  {' '.join(kind.COMMAND):<15}{name:<11}{kind.HELP}" for name, kind in RECIPES.items())
HELP = f"""\
usage: automodel CONFIG [options] [overrides]
       automodel COMMAND -c CONFIG [options] [overrides]
       automodel RECIPE --keys
       automodel report RUN
       automodel compare RUN_A RUN_B [--assert-equal]

Runs the recipe that the YAML file CONFIG names; a COMMAND demands one:
{_COMMAND_LINES}

options:
  -c, --config CONFIG     the config file
  --nproc-per-node N      processes on this machine (default: one per GPU, one where there is none)
  --nnodes N --node-rank R --rdzv-endpoint HOST:PORT
                          on each of N machines, R from 0 to N - 1; HOST is the one with R = 0
  --dry-run               do all that comes before reading weights, print the config with every default, and stop
  --keys                  every key of a recipe's config, with type, default and meaning
  --debug                 show tracebacks (also: AUTOMODEL_TRACEBACK=1)
  -h, --help              this text

overrides, for any key of the config:
  --optimizer.lr 1e-5     --step_scheduler.max_steps=100     --generate.prompts.0 "Hello"     --peft null
  --freeze.0.freeze "*"   an item of a list by its number; the next one adds an item, 0 where there is none yet
  --dataset.truncation    a key without a value is true; null, none and ~ are no value, where the key may have none

Ctrl-C finishes the step and commits it; a second one quits at once (status 130). The same command again
continues the run from its latest checkpoint. Under torchrun:
  torchrun --nproc-per-node 8 -m am_recipes.sft -c CONFIG [overrides]
A recipe is one file. Copy and change it; the copy takes the same options:
  python mysft.py -c CONFIG [--nproc-per-node N]      torchrun --nproc-per-node 8 mysft.py -c CONFIG
`automodel report RUN` draws RUN/report.html of a run directory, while it runs or later. `automodel compare RUN_A RUN_B`
says from which step two runs differ, and what differs in config, code, data and machine; with --assert-equal
its status is 1 where rows differ.

exit status: 0 done, 1 failed, 2 wrong usage or config, 75 stopped: run it again to continue"""

_WITH_VALUE = {"-c": "config", "--config": "config"}
# As torchrun takes them: with dashes or underscores.
for _name in ("nproc-per-node", "nnodes", "node-rank", "rdzv-endpoint"):
    _WITH_VALUE |= {f"--{_name}": _name, f"--{_name.replace('-', '_')}": _name}
_FLAGS = {"-h": "help", "--help": "help", "--dry-run": "dry_run", "--keys": "keys", "--debug": "debug"}


class UsageError(ValueError):
    """A command line that cannot be understood."""


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart; `recipe` is what the command demands of the config, if anything."""

    path: Path | None
    overrides: tuple[tuple[str, str], ...] = ()
    recipe: str | None = None
    processes: int | None = None
    nodes: launch.Nodes | None = None
    dry_run: bool = False
    keys: bool = False
    debug: bool = False
    help: bool = False

    def worker_arguments(self) -> list[str]:
        """The command line of the recipe module in each process that this one starts."""
        overrides = [f"--{path}={text}" for path, text in self.overrides]
        flags = [flag for flag, is_set in (("--debug", self.debug), ("--dry-run", self.dry_run)) if is_set]
        return ["-c", str(self.path), *overrides, *flags]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Take `[CONFIG | COMMAND DOMAIN | RECIPE] [options] [overrides]` apart. Raises `UsageError`; reads no file."""
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
                value = _value_of(name, tokens)
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
        processes=_processes(values.get("nproc-per-node")),
        nodes=_nodes(values),
        dry_run="dry_run" in flags,
        keys="keys" in flags,
        debug="debug" in flags,
        help="help" in flags,
    )


def _value_of(name: str, tokens: list[str]) -> str:
    """What follows the option `name`, taken off `tokens`; a key of the config alone is one that is turned on."""
    if tokens and not tokens[0].startswith("--"):
        return tokens.pop(0)
    hint = did_you_mean(name, [*_FLAGS, *_WITH_VALUE])
    if name in _WITH_VALUE or ("." not in name and hint):
        raise UsageError(f"{name} needs a value{hint}")
    return "true"


def _recipe(positional: list[str]) -> str | None:
    """Take a command or recipe off `positional`; what is left there may only be the config."""
    recipe = None
    if tuple(positional[:2]) in COMMANDS:
        recipe = COMMANDS[positional[0], positional[1]]
        del positional[:2]
    elif positional and positional[0] in RECIPES and all(map(_is_config, positional[1:2])):
        recipe = positional.pop(0)
    elif positional and not _is_config(positional[0]):
        verbs = {verb for verb, _ in COMMANDS} | set(RECIPES) | {"report", "compare"}
        hint = did_you_mean(positional[0], verbs) if positional[0] not in verbs else ""
        raise UsageError(
            f"{' '.join(positional[:2])!r} is neither a config file nor a command{hint}; there is: "
            f"{', '.join(' '.join(command) for command in COMMANDS)}, report, compare"
        )
    if len(positional) > 1:
        raise UsageError(f"unexpected argument {positional[1]!r}; overrides are written --section.key value")
    return recipe


def _is_config(text: str) -> bool:
    return Path(text).exists() or Path(text).suffix in (".yaml", ".yml")


def _processes(text: str | None) -> int | None:
    if text is None:
        return None
    if not launch.is_whole(text, 1):
        raise UsageError(f"--nproc-per-node must be a whole number of at least 1, got {text!r}")
    return int(text)


def _nodes(values: Mapping[str, str]) -> launch.Nodes | None:
    try:
        return launch.parse_nodes(values)
    except ValueError as error:
        raise UsageError(str(error)) from None
