"""The `automodel` command, and the command line of each recipe and of every copy of one.

Exit status: 0 done, 1 failed, 2 wrong usage or config, 75 stopped, and to be continued, 130 quit.
A wrong config, value or file is a message on stderr; everything else shows its traceback (`am_recipes.errors`), and so
does everything with `--debug` or `AUTOMODEL_TRACEBACK=1`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from am_recipes import __version__, errors, launch
from am_recipes.command_line import HELP, Arguments, UsageError, parse_arguments
from am_recipes.configs import DEFAULT_RUN_DIR, RECIPES, RunConfig, check_targets, parse
from am_recipes.stop_signal import StopSignal


def main(argv: Sequence[str] | None = None) -> int:
    """The `automodel` command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # As with `python -m`: targets may name the user's own modules beside the place the command is typed.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return _run_command(argv)


def run_recipe(recipe: str, file: str, argv: Sequence[str] | None = None) -> int:
    """The command line of a recipe's own `file`, which may be a copy; returns the exit status.

    `recipe` names the config that it takes. What runs is this very file, in this process or in `--nproc-per-node N`.
    """
    # Behind the folder of the file, where Python looks first: as for `automodel`, and as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(1, os.getcwd())
    # How Python was told to find it: with `-m`, its name also says which package it is part of.
    spec = sys.modules["__main__"].__spec__
    program = spec.name if spec is not None and spec.origin == file else str(Path(file).absolute())
    return _run_command(sys.argv[1:] if argv is None else argv, recipe, program)


def _run_command(argv: Sequence[str], recipe: str | None = None, program: str | None = None) -> int:
    """`recipe` and `program`, what to run for it, are those of a recipe's own command line."""

    def answer() -> int:
        return _answer(argv, recipe, program)

    return launch.as_worker(answer) if _is_worker() else answer()


def _answer(argv: Sequence[str], recipe: str | None, program: str | None) -> int:
    try:
        if list(argv) == ["--version"]:
            print(f"automodel {__version__}")
            return 0
        if argv[:1] == ["report"] and recipe is None:
            return _report(argv[1:])
        if argv[:1] == ["compare"] and recipe is None:
            return _compare(argv[1:])
        arguments = parse_arguments(argv)
        if arguments.help or not argv:
            # Nothing at all is no question: a script whose variable was empty must not go on.
            print(HELP, file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        if arguments.keys:
            return _print_keys(arguments.recipe or recipe, arguments.path)
        if arguments.path is None:
            raise UsageError("which config? Write automodel CONFIG or -c CONFIG")
        _check_worker(arguments)
    except UsageError as error:
        print(f"error: {error}\nautomodel --help shows the usage", file=sys.stderr)
        return 2
    path = arguments.path
    debug = arguments.debug or _tracebacks_wanted()
    return errors.reported(lambda: _run_config(arguments, path, recipe, program, debug), debug=debug)


def _tracebacks_wanted() -> bool:
    return os.environ.get("AUTOMODEL_TRACEBACK") == "1"


def _print_keys(recipe: str | None, path: Path | None) -> int:
    if recipe is None or path is not None:
        raise UsageError(f"--keys is about a recipe: automodel RECIPE --keys, with one of {', '.join(RECIPES)}")
    from am_recipes.settings import keys

    kind = RECIPES[recipe]
    print(keys.table(kind, f"Recipe {kind.NAME}: {kind.HELP}.", defaults={"run_dir": DEFAULT_RUN_DIR}))
    return 0


def _report(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UsageError("automodel report takes a run directory, such as runs/quickstart, and nothing else")

    def draw() -> int:
        from am_recipes.sinks import html

        print(html.write_page(Path(arguments[0])))
        return 0

    return errors.reported(draw, debug=_tracebacks_wanted())


def _compare(arguments: Sequence[str]) -> int:
    folders = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if len(folders) != 2 or set(flags) - {"--assert-equal"}:
        raise UsageError("automodel compare takes two run directories, and --assert-equal or nothing else")

    def tell() -> int:
        from am_recipes import compare

        are_equal, told = compare.compare(*map(Path, folders))
        print(told)
        return 1 if flags and not are_equal else 0

    return errors.reported(tell, debug=_tracebacks_wanted())


def _check_worker(arguments: Arguments) -> None:
    here = os.environ.get("LOCAL_WORLD_SIZE") if _is_worker() else None
    if arguments.processes is not None and here is not None and int(here) != arguments.processes:
        raise UsageError(f"--nproc-per-node {arguments.processes} inside a torchrun worker that has {here} processes")
    if arguments.nodes is not None and _is_worker():
        raise UsageError(
            f"--nnodes {arguments.nodes.count} inside a torchrun worker: torchrun has started this process already; "
            "leave --nnodes, --node-rank and --rdzv-endpoint to torchrun, or start the command without it"
        )


def _run_config(arguments: Arguments, path: Path, recipe: str | None, program: str | None, debug: bool) -> int:
    config = parse(path, arguments.overrides)
    for demanded in (arguments.recipe, recipe):
        if demanded is not None and demanded != config.recipe:
            raise config.error("recipe", f"the command runs {demanded!r}, the config says {config.recipe!r}")
    if config.launchers() and not _is_worker():
        if arguments.nodes is not None:
            (key,) = config.launchers()
            raise config.error(
                key,
                f"--nnodes {arguments.nodes.count} with a section {key}, which starts the nodes itself: --{key} null",
            )
        return _elsewhere(config, arguments, path, program or f"am_recipes.{config.recipe}")
    if not _is_worker():
        # A recipe's own file and a dry run are one process, unless they are told otherwise.
        one = program is not None or arguments.dry_run
        processes = arguments.processes or (1 if one else _default_processes())
        if processes > 1 or arguments.nodes is not None:
            what = program or f"am_recipes.{config.recipe}"
            return launch.run(what, arguments.worker_arguments(), processes, arguments.nodes)
    program = program or f"am_recipes.{config.recipe}"
    if arguments.dry_run:
        return _dry_run(config, program)
    return errors.reported(lambda: _train(config, program), debug=debug, run_dir=config.run_dir)


def _elsewhere(config: RunConfig, arguments: Arguments, path: Path, program: str) -> int:
    """Submit, or show what would be submitted below the config."""
    from am_recipes import submission

    flags = ("--debug",) if arguments.debug else ()
    asked = submission.Asked(path, arguments.overrides, flags, program, arguments.processes)
    if not arguments.dry_run:
        return submission.submit(config, asked)
    text = submission.preview(submission.rendered(config, asked))
    if submission.same_python(config):
        _dry_run(config, program)
    else:
        print("# What the config names is elsewhere (container, python, repo_root, command): not looked at here.")
        print(config, end="")
    print(f"---\n{text}", end="")
    return 0


def _train(config: RunConfig, program: str) -> int:
    # The import of torch takes seconds, in which a signal would kill; or, to the first process of a container, be lost.
    with StopSignal():
        check_targets(config)
        module = _load(program)
    with config.at():
        return int(module.main(config))


def _dry_run(config: RunConfig, program: str) -> int:
    check_targets(config)
    # Imports torch.
    from am_recipes import dry_run

    with config.at():
        dry_run.dry_run(config, _load(program).train)
    if os.environ.get("RANK", "0") == "0":
        print(config.spelt_out(), end="")
    return 0


def _load(program: str) -> ModuleType:
    """The module of that name, or of the file: as `import` would find it beside itself, and under that name."""
    if not program.endswith(".py"):
        return importlib.import_module(program)
    name = Path(program).stem
    spec = importlib.util.spec_from_file_location(name, program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _is_worker() -> bool:
    """Whether torchrun (or whoever sets its variables) started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _default_processes() -> int:
    # The first heavy import of a run; everything before it has to answer at once.
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    raise SystemExit(main())
