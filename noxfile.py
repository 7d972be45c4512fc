"""What CI and a newcomer run: `uv run nox` (all), `uv run nox -s alone -- am-mesh` (one session, one package).

Sessions use the project's own environment (`uv sync` made it). Only `alone` and `floor` build others: `alone` one per
library, to show that each works with nothing but what it declares; `floor` one with the oldest versions we promise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
STATE = ROOT / ".nox"
LIBRARIES = ["am-ckpt", "am-data", "am-kernels", "am-loss", "am-mesh", "am-models", "am-moe", "am-peft"]
# The only two edges between libraries: what must be built beside a wheel for it to install.
BUILT_WITH = {"am-models": ["am-kernels", "am-moe"]}
FOLDERS = {name: f"packages/{name}" for name in LIBRARIES} | {"am-recipes": "recipes", "am-testing": "tools/am-testing"}
FLOOR = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}

nox.options.default_venv_backend = "none"
nox.options.sessions = ["ci"]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    UV_PYTHON_DOWNLOADS="never",
    # Two lanes run side by side, and threads that spin for each other on busy cores cost far more than they gain.
    OMP_NUM_THREADS="1",
    # Without bytecode each of a hundred processes compiles torch again, for six seconds.
    PYTHONPYCACHEPREFIX=str(STATE / "bytecode"),
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@dataclass(frozen=True)
class Step:
    """A session that `ci` runs, and what follows its `--`."""

    session: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.session, *self.arguments))


# The longest first, so that two lanes, which take the next one each, end at about the same time.
CI = [
    Step("integration"),
    Step("floor"),
    Step("sweep", ("--processes", "1")),
    *(Step("alone", (name,)) for name in LIBRARIES),
    Step("tests", ("am-recipes",)),
    Step("docs"),
    Step("types"),
    Step("tests", ("am-testing",)),
    Step("lint"),
]


@nox.session
def ci(session: nox.Session) -> None:
    """What CI runs, in two lanes (or of it `-- lint docs`): each step's whole log when it ends, and what all cost."""
    unknown = set(session.posargs) - {step.session for step in CI}
    if unknown:
        session.error(f"unknown session {', '.join(unknown)}; choose from {', '.join(sorted({s.session for s in CI}))}")
    waiting = [step for step in CI if not session.posargs or step.session in session.posargs]
    logs = STATE / "ci"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    costs, lock = dict[Step, dict[str, Any]](), threading.Lock()

    def lane() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                step = waiting.pop(0)
            log = logs / f"{step}.log".replace(" ", "_")
            cost = run_step(step, log)
            with lock:
                costs[step] = cost
                print(f"\n===== {step}\n{log.read_text(errors='replace')}", flush=True)

    start = time.monotonic()
    lanes = [threading.Thread(target=lane) for _ in range(2)]
    for thread in lanes:
        thread.start()
    try:
        for thread in lanes:
            thread.join()
    except KeyboardInterrupt:
        waiting.clear()
        raise
    print_costs(costs, time.monotonic() - start)
    failed = [step for step, cost in costs.items() if cost["status"] != 0]
    if failed:
        session.error(
            f"failed: {', '.join(map(str, failed))}; one alone: nox -s {' -- '.join(str(failed[0]).split(' ', 1))}"
        )


def run_step(step: Step, log: Path) -> dict[str, Any]:
    """Run a step as a nox of its own with a folder of its own for temporary files; what ci_cpu.py says of it."""
    usage = log.with_suffix(".json")
    command = [sys.executable, str(ROOT / "tools" / "ci_cpu.py"), "--json", str(usage)]
    command += [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), "-s", step.session]
    command += ["--", *step.arguments] if step.arguments else []
    # Not under .nox: the path of a socket in it may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="nox-") as folder, log.open("w") as output:
        subprocess.run(command, env=os.environ | {"TMPDIR": folder}, stdout=output, stderr=output, check=False)
    # Without the file it was killed.
    return dict(json.loads(usage.read_text())) if usage.exists() else {"status": 1, "cpu": 0.0, "wall": 0.0}


def print_costs(costs: dict[Step, dict[str, Any]], wall: float) -> None:
    rows = [(str(step), cost["status"], cost["cpu"], cost["wall"]) for step, cost in costs.items()]
    print(f"\n{'step':32}{'':8}{'CPU-s':>8}{'wall s':>8}")
    for name, status, cpu, seconds in sorted(rows, key=lambda row: -row[3]):
        print(f"{name:32}{'FAILED' if status else 'ok':8}{cpu:8.0f}{seconds:8.0f}")
    print(f"{'all':40}{sum(row[2] for row in rows):8.0f}{wall:8.0f}", flush=True)


def chosen(session: nox.Session, names: list[str]) -> list[str]:
    """The names given after `--`, or all of them."""
    unknown = [name for name in session.posargs if name not in names]
    if unknown:
        session.error(f"unknown package {', '.join(unknown)}; choose from {', '.join(names)}")
    return list(session.posargs) or names


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint rules, sizes, the import graph, and a lock that is current and from PyPI alone."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("python", "tools/lint_sizes.py")
    session.run("lint-imports")
    session.run("uv", "lock", "--check", external=True)
    sources = set(re.findall(r'registry = "(.*?)"', Path("uv.lock").read_text()))
    if len(sources) != 1 or not sources.pop().startswith("https://"):
        session.error("uv.lock names a second package index or a local folder; lock from PyPI alone")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, over the sources of every package."""
    session.run("mypy", *(f"{folder}/src" for folder in FOLDERS.values()))


@nox.session
def tests(session: nox.Session) -> None:
    """Each package's own tests, in the project's environment."""
    for name in chosen(session, list(FOLDERS)):
        session.run("pytest", "-q", "-m", "not slow", f"{FOLDERS[name]}/tests")


@nox.session
def sweep(session: nox.Session) -> None:
    """Damage checkpoints in 10,000 ways drawn by the commit (or `-- --mutations N`): no crash, hang or much memory."""
    script = ROOT / FOLDERS["am-ckpt"] / "tests" / "corruption_sweep.py"
    # In memory: what is damaged are some kilobytes, written and removed thousands of times.
    memory = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    session.run("python", "-W", "ignore", str(script), *session.posargs, env=memory)


@nox.session
def alone(session: nox.Session) -> None:
    """Build each library's wheel, install it with its declared dependencies and its test group only, test it there."""
    for name in chosen(session, LIBRARIES):
        folder = STATE / "alone" / name
        ours = [*BUILT_WITH.get(name, []), name, "am-testing"]
        python = make_environment(session, folder, sys.executable, [name], ours, locked_versions(session))
        installed = names_of_installed(session, python)
        cuda = [package for package in installed if package.startswith(("nvidia-", "cuda-", "triton"))]
        others = sorted(set(installed) - set(cuda))
        session.log(f"{name} alone: {', '.join(others)} (+ {len(cuda)} CUDA packages that torch brings)")
        strangers = set(others) & set(FOLDERS) - set(ours)
        if strangers:
            session.error(f"{name} pulled in {', '.join(strangers)}")
        bare = make_bare(session, folder / "bare", name) if name == "am-ckpt" else {}
        run_tests(session, python, f"{FOLDERS[name]}/tests", env=bare)
        shutil.rmtree(folder)


@nox.session
def floor(session: nox.Session) -> None:
    """The tests of every package (or `-- am-mesh`) with the oldest Python, torch and transformers that we promise."""
    # With these go the versions of what they pin themselves.
    theirs = re.compile(r"(nvidia-|cuda-|(torchvision|setuptools|huggingface-hub)==)")
    versions = [
        line for line in locked_versions(session) if line.split("==")[0] not in FLOOR and not theirs.match(line)
    ]
    versions += [f"{name}=={version}" for name, version in FLOOR.items()]
    names = [name for name in FOLDERS if name != "am-testing"]
    tested = chosen(session, names)
    python = make_environment(session, STATE / "floor", "3.11", names, list(FOLDERS), versions)
    for name in tested:
        run_tests(session, python, *at_floor(name))
    shutil.rmtree(STATE / "floor")


def make_bare(session: nox.Session, folder: Path, name: str) -> dict[str, str | None]:
    """An environment with what `pip install NAME` brings, which must be next to nothing; how the tests find it."""
    python = make_environment(session, folder, sys.executable, [name], [name], locked_versions(session), tests=False)
    installed = names_of_installed(session, python)
    if installed != [name, "numpy", "xxhash"]:
        session.error(f"{name} installs {', '.join(installed)}; its base is numpy and xxhash, the rest are extras")
    return {"AM_CKPT_BARE_PYTHON": str(python)}


def names_of_installed(session: nox.Session, python: Path) -> list[str]:
    """The packages of an environment, sorted."""
    command = ("uv", "pip", "list", "--python", str(python), "--format", "freeze")
    listed = str(session.run(*command, external=True, silent=True))
    return sorted(line.split("==")[0] for line in listed.splitlines() if "==" in line)


def run_tests(session: nox.Session, python: Path, *tests: str, env: dict[str, str | None] | None = None) -> None:
    """pytest of an environment, which sees no sources but those installed there."""
    command = (str(python), "-m", "pytest", "-q", "-m", "not slow", *tests)
    session.run(*command, env={"PYTHONPATH": None, **(env or {})}, external=True)


def at_floor(name: str) -> list[str]:
    """What of a package's tests `floor` runs."""
    tests = f"{FOLDERS[name]}/tests"
    if name == "am-ckpt":
        # Crashes are a matter of the file system, and two thirds of the cost.
        return [tests, "--ignore-glob=*/test_crash*.py"]
    if name == "am-recipes":
        # And whole runs, whose exports open in stock transformers. Published schemas are no matter of old versions.
        return [
            tests,
            "--ignore-glob=*/test_kubernetes.py",
            "--ignore-glob=*/test_skypilot.py",
            "integration_tests/test_export.py",
            "integration_tests/test_vlm.py::test_from_a_folder_to_an_export",
        ]
    return [tests]


def locked_versions(session: nox.Session) -> list[str]:
    """The third-party packages of uv.lock, as constraints."""
    export = ("uv", "export", "--locked", "--all-packages", "--no-emit-workspace", "--no-hashes", "--no-annotate", "-q")
    return str(session.run(*export, "--no-header", external=True, silent=True)).splitlines()


def make_environment(
    session: nox.Session,
    folder: Path,
    base: str,
    names: list[str],
    built: list[str],
    versions: list[str],
    *,
    tests: bool = True,
) -> Path:
    """Make an environment with the packages `names` and their test groups, nothing of ours but `built`; its Python.

    `tests=False`: without the test groups.

    It is removed with `folder`. The wheels are built here, in 0.1 s, so that sessions can run side by side.
    """
    shutil.rmtree(folder, ignore_errors=True)
    environment, wheels, constraints = folder / "environment", folder / "wheels", folder / "constraints.txt"
    for package in built:
        session.run("uv", "build", "-q", "--wheel", "--package", package, "-o", str(wheels), external=True)
    constraints.write_text("\n".join(versions))
    session.run("uv", "venv", "-q", "--python", base, str(environment), external=True)
    # Environments of the same versions share bytecode, which Python checks against the time and size of each source.
    shared = STATE / "bytecode" / folder.relative_to(STATE).parts[0]
    own = Path(f"{os.environ['PYTHONPYCACHEPREFIX']}{environment}")
    shared.mkdir(parents=True, exist_ok=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    own.unlink(missing_ok=True)
    own.symlink_to(shared)
    python = environment / "bin" / "python"
    session.run(
        *("uv", "pip", "install", "-q", "--python", str(python), "--no-sources", "--find-links", str(wheels)),
        *("--constraint", str(constraints), *names),
        *(f"--group={FOLDERS[name]}/pyproject.toml:test" for name in (names if tests else [])),
        # uv keeps wheels by name and version, and would install those of an earlier run here.
        *(f"--refresh-package={package}" for package in built),
        external=True,
    )
    return python


@nox.session
def integration(session: nox.Session) -> None:
    """What only the combination of packages can show: equivalence of layouts, resume, export."""
    session.run("pytest", "-q", *(session.posargs or ["-m", "not slow"]), "integration_tests")


@nox.session
def slow(session: nox.Session) -> None:
    """The tests marked slow, of every package and of the combination, and the whole sweep; not part of CI."""
    session.run("pytest", "-q", "-m", "slow", *(f"{folder}/tests" for folder in FOLDERS.values()), "integration_tests")
    script = ROOT / FOLDERS["am-ckpt"] / "tests" / "corruption_sweep.py"
    session.run("python", "-W", "ignore", str(script), "--flips", "1000", "--mutations", "100000")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code blocks of every README and of docs/."""
    session.run("python", "tools/run_docs.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks that run on a CPU, on idle cores; each writes its JSON file under tools/bench/results.

    What every one of them takes may follow `--`: `--rounds N`.
    """
    folder = ROOT / "tools" / "bench"
    for script in [*sorted(folder.glob("*_cpu.py")), folder / "ckpt.py"]:
        session.run("python", str(script), *session.posargs)
