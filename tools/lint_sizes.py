"""Sizes of the sources: what grows past a limit is split, or stands in `ALLOWED` with the reason.

    python tools/lint_sizes.py [--root FOLDER]

Checked over the sources of every package: lines of a file and of a function, parameters of a function, lines of a
recipe and of its `train`, the lines that all `train` share (a recipe says what no sibling says), and that no model,
dataset or config is annotated `Any`. Printed besides: `Any` per 1,000 lines, and the cyclomatic complexity of each
`train`, as radon counts it. A recipe is a module directly in am_recipes with a function `train`.
"""

from __future__ import annotations

import argparse
import ast
import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("packages/*/src", "recipes/src", "tools/am-testing/src")
RECIPES = "recipes/src/am_recipes"
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 12
RECIPE_LINES, TRAIN_LINES, SHARED_LINES = 160, 100, 45
NEVER_ANY = ("model", "dataset", "config")


@dataclass(frozen=True)
class Allowed:
    """Up to `most` instead of the limit, and why."""

    most: int
    reason: str


# By rule and place: a file, or a file and the dotted name in it. An entry that allows nothing any more is an error too.
ALLOWED: dict[tuple[str, str], Allowed] = {
    ("lines of the file", "packages/am-ckpt/src/am_ckpt/_train/checkpointer.py"): Allowed(
        426, "one class, a third of it docstrings; what it asks stands in modules beside it"
    ),
    ("lines of the function", "packages/am-ckpt/src/am_ckpt/_tools/merge.py::merge"): Allowed(
        77, "over forty lines of docstring, for each option"
    ),
    ("parameters", "packages/am-ckpt/src/am_ckpt/_tools/merge.py::merge"): Allowed(
        14, "the options of the command, a keyword for each"
    ),
    ("parameters", "packages/am-loss/src/am_loss/_distillation.py::linear_distillation"): Allowed(
        17, "two heads and the options of the loss, all of them keys of a config"
    ),
    ("lines of the function", "packages/am-mesh/src/am_mesh/_parallelize.py::parallelize"): Allowed(
        96, "half of it docstring, for each option"
    ),
    ("parameters", "packages/am-mesh/src/am_mesh/_parallelize.py::parallelize"): Allowed(
        16, "the whole of a layout, each choice of which is independent of the others"
    ),
    ("parameters", "packages/am-models/src/am_models/_attention.py::_attention"): Allowed(
        13, "transformers calls it, with the keywords of its attention interface"
    ),
    ("lines of the file", "recipes/src/am_recipes/kd.py"): Allowed(210, "two models, and what they must agree on"),
}


@dataclass(frozen=True)
class Finding:
    """A number beyond the limit of a rule, and where."""

    rule: str
    place: str
    line: int
    value: int
    limit: int

    def __str__(self) -> str:
        path, _, name = self.place.partition("::")
        where = f"{path}:{self.line}" + (f" {name}" if name else "")
        return f"{where}: {self.rule}: {self.value}, at most {self.limit}"


@dataclass(frozen=True)
class Function:
    """A function of a source file, with the dotted name it has there."""

    path: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def place(self) -> str:
        return f"{self.path}::{self.name}"

    @property
    def is_recipe(self) -> bool:
        """Whether this is the `train` of a recipe."""
        return self.name == "train" and str(Path(self.path).parent) == RECIPES

    @property
    def num_lines(self) -> int:
        assert self.node.end_lineno is not None
        return self.node.end_lineno - self.node.lineno + 1

    def arguments(self) -> list[ast.arg]:
        """All of its parameters but `self` and `cls`."""
        given = self.node.args
        found = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
        return [argument for argument in found if argument is not None and argument.arg not in ("self", "cls")]


def sources(root: Path) -> dict[str, str]:
    """The text of every source file by its path under `root`."""
    files = sorted(file for pattern in FOLDERS for folder in root.glob(pattern) for file in folder.rglob("*.py"))
    return {file.relative_to(root).as_posix(): file.read_text() for file in files}


def functions(path: str, node: ast.AST, prefix: str = "") -> Iterator[Function]:
    """Every function under `node`, methods and inner functions included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + child.name
            if not isinstance(child, ast.ClassDef):
                yield Function(path, name, child)
            yield from functions(path, child, name + ".")
        else:
            yield from functions(path, child, prefix)


def sizes(path: str, text: str, found: list[Function]) -> Iterator[Finding]:
    """Every number that has a limit, whether beyond it or not."""
    is_recipe = any(function.is_recipe for function in found)
    yield Finding("lines of the file", path, 1, len(text.splitlines()), RECIPE_LINES if is_recipe else FILE_LINES)
    for function in found:
        line = function.node.lineno
        limit = TRAIN_LINES if function.is_recipe else FUNCTION_LINES
        yield Finding("lines of the function", function.place, line, function.num_lines, limit)
        yield Finding("parameters", function.place, line, len(function.arguments()), PARAMETERS)
        untyped = [argument for argument in function.arguments() if argument.arg in NEVER_ANY and _may_be_any(argument)]
        yield Finding("model, dataset or config annotated Any", function.place, line, len(untyped), 0)


def _may_be_any(argument: ast.arg) -> bool:
    """Whether the annotation is `Any`, alone or as a member of a union."""

    def members(node: ast.expr | None) -> Iterator[ast.expr]:
        if isinstance(node, ast.BinOp):
            yield from members(node.left)
            yield from members(node.right)
        elif node is not None:
            yield node

    return any(isinstance(node, ast.Name) and node.id == "Any" for node in members(argument.annotation))


def shared_lines(texts: Mapping[str, str], recipes: list[Function]) -> int:
    """How many lines all recipes' `train` have in common, without indentation, blank ones, and regard to order."""
    counts = []
    for function in recipes:
        lines = texts[function.path].splitlines()[function.node.lineno - 1 : function.node.end_lineno]
        counts.append(collections.Counter(line.strip() for line in lines if line.strip()))
    common = counts[0]
    for count in counts[1:]:
        common &= count
    return common.total()


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity as radon counts it."""
    total = 1
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.IfExp | ast.Assert):
            total += 1
        elif isinstance(node, ast.For | ast.AsyncFor | ast.While):
            total += 1 + bool(node.orelse)
        elif isinstance(node, ast.Try | ast.TryStar):
            total += len(node.handlers) + bool(node.orelse)
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, ast.Match):
            total += sum(not _matches_all(case) for case in node.cases)
    return total


def _matches_all(case: ast.match_case) -> bool:
    return isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None and case.guard is None


def errors(findings: list[Finding], allowed: Mapping[tuple[str, str], Allowed]) -> list[str]:
    """What is beyond its limit and not allowed, or allowed and not beyond it."""
    beyond = {(finding.rule, finding.place): finding for finding in findings if finding.value > finding.limit}
    messages = [
        f"{finding}; mend it, or allow it in tools/lint_sizes.py with a reason"
        for key, finding in beyond.items()
        if key not in allowed
    ]
    for (rule, place), entry in allowed.items():
        if (rule, place) not in beyond:
            messages.append(f"{place}: {rule}: nothing is beyond the limit; take the entry out of ALLOWED")
        elif beyond[rule, place].value > entry.most:
            messages.append(f"{beyond[rule, place]}, {entry.most} by ALLOWED; mend it")
        elif not entry.reason:
            messages.append(f"{place}: {rule}: ALLOWED gives no reason")
    return messages


def examine(texts: Mapping[str, str]) -> tuple[list[Finding], list[str]]:
    """Every finding, and what is printed besides."""
    findings: list[Finding] = []
    recipes: list[Function] = []
    num_any = 0
    for path, text in texts.items():
        tree = ast.parse(text, path)
        found = list(functions(path, tree))
        findings += sizes(path, text, found)
        recipes += [function for function in found if function.is_recipe]
        num_any += sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))
    num_lines = sum(len(text.splitlines()) for text in texts.values())
    notes = [f"{num_lines:,} lines in {len(texts)} files, {1000 * num_any / num_lines:.1f} Any per 1,000 lines"]
    if len(recipes) > 1:
        shared = shared_lines(texts, recipes)
        findings.append(Finding("lines that all train() share", RECIPES, 1, shared, SHARED_LINES))
        notes.append(f"{shared} lines are the same in all {len(recipes)} train()")
    for function in recipes:
        notes.append(f"{function.path}: train has {function.num_lines} lines, complexity {complexity(function.node)}")
    return findings, notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    root = parser.parse_args().root
    findings, notes = examine(sources(root))
    messages = errors(findings, ALLOWED)
    print(*notes, *messages, sep="\n")
    return 1 if messages else 0


if __name__ == "__main__":
    raise SystemExit(main())
