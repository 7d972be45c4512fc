"""What CI and a newcomer run: ``uv run nox`` (all), ``uv run nox -s tests -- am-mesh`` (one session, one package).

Sessions use the project's own environment (``uv sync`` made it); only ``alone`` builds others, one small environment
per library, to show that each works with nothing but what it declares.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
LIBRARIES = ["am-ckpt", "am-data", "am-kernels", "am-loss", "am-mesh", "am-models", "am-moe", "am-peft"]
# The only two edges between libraries: what must be built beside a wheel for it to install.
BUILT_WITH = {"am-models": ["am-kernels", "am-moe"]}
FOLDERS = {name: f"packages/{name}" for name in LIBRARIES} | {"am-recipes": "recipes", "am-testing": "tools/am-testing"}

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "sweep", "alone", "integration", "docs"]
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", UV_PYTHON_DOWNLOADS="never"
)


def chosen(session: nox.Session, names: list[str]) -> list[str]:
    """The names given after ``--``, or all of them."""
    unknown = [name for name in session.posargs if name not in names]
    if unknown:
        session.error(f"unknown package {', '.join(unknown)}; choose from {', '.join(names)}")
    return list(session.posargs) or names


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint rules, the import graph, and a lock that is current and from PyPI alone."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
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
    """Damage checkpoints in 100,000 ways (or ``-- --mutations N``): nothing crashes, hangs, or takes much memory."""
    script = ROOT / FOLDERS["am-ckpt"] / "tests" / "corruption_sweep.py"
    session.run("python", "-W", "ignore", str(script), *session.posargs)


@nox.session
def alone(session: nox.Session) -> None:
    """Build each library's wheel, install it with its declared dependencies and its test group only, test it there."""
    wheels, environment = ROOT / "dist" / "alone", ROOT / ".nox" / "alone"
    constraints = ROOT / ".nox" / "constraints.txt"
    constraints.parent.mkdir(exist_ok=True)
    export = ("uv", "export", "--locked", "--all-packages", "--no-emit-workspace", "--no-hashes", "--no-annotate", "-q")
    session.run(*export, "-o", str(constraints), external=True, silent=True)
    for name in chosen(session, LIBRARIES):
        shutil.rmtree(wheels, ignore_errors=True)
        shutil.rmtree(environment, ignore_errors=True)
        ours = [*BUILT_WITH.get(name, []), name, "am-testing"]
        for built in ours:
            session.run("uv", "build", "-q", "--wheel", "--package", built, "-o", str(wheels), external=True)
        python = environment / "bin" / "python"
        session.run("uv", "venv", "-q", "--python", sys.executable, str(environment), external=True)
        session.run(
            *("uv", "pip", "install", "-q", "--python", str(python), "--no-sources", "--find-links", str(wheels)),
            *("--constraint", str(constraints), name, "--group", f"{FOLDERS[name]}/pyproject.toml:test"),
            # uv keeps wheels by name and version, and would install those of an earlier run here.
            *(f"--refresh-package={built}" for built in ours),
            external=True,
        )
        listed = session.run(
            "uv", "pip", "list", "--python", str(python), "--format", "freeze", external=True, silent=True
        )
        installed = [line.split("==")[0] for line in str(listed).splitlines() if "==" in line]
        cuda = [package for package in installed if package.startswith(("nvidia-", "cuda-", "triton"))]
        others = sorted(set(installed) - set(cuda))
        session.log(f"{name} alone: {', '.join(others)} (+ {len(cuda)} CUDA packages that torch brings)")
        strangers = set(others) & set(FOLDERS) - {name, "am-testing", *BUILT_WITH.get(name, [])}
        if strangers:
            session.error(f"{name} pulled in {', '.join(strangers)}")
        session.run(str(python), "-m", "pytest", "-q", "-m", "not slow", f"{FOLDERS[name]}/tests", external=True)
    shutil.rmtree(environment, ignore_errors=True)


@nox.session
def integration(session: nox.Session) -> None:
    """What only the combination of packages can show: equivalence of layouts, resume, export."""
    session.run("pytest", "-q", *(session.posargs or ["-m", "not slow"]), "integration_tests")


@nox.session
def slow(session: nox.Session) -> None:
    """The tests marked slow, of every package and of the combination; not part of CI."""
    session.run("pytest", "-q", "-m", "slow", *(f"{folder}/tests" for folder in FOLDERS.values()), "integration_tests")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code blocks of every README and of docs/."""
    session.run("python", "tools/run_docs.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks that run on a CPU, on idle cores; each writes its JSON file under tools/bench/results.

    What every one of them takes may follow ``--``: ``--rounds N``.
    """
    folder = ROOT / "tools" / "bench"
    for script in [*sorted(folder.glob("*_cpu.py")), folder / "ckpt.py"]:
        session.run("python", str(script), *session.posargs)
