"""tools/lint_sizes.py finds one seeded offence of each kind, and nothing in sources without one."""

from __future__ import annotations

import ast
import re

import pytest

from tools.lint_sizes import RECIPES, Allowed, complexity, errors, examine

TRAIN = "def train(config):\n" + "".join(f"    own_{{name}}_{number} = 1\n" for number in range(40)) + "{shared}"


def recipes(num_shared: int, num_own: int = 0) -> dict[str, str]:
    """Two recipes whose `train` have so many lines in common (the first among them), and one of them some more."""
    shared = "".join(f"\n    shared_{number} = 1" for number in range(num_shared - 1))
    texts = {f"{RECIPES}/{name}.py": TRAIN.format(name=name, shared=shared) for name in ("sft", "kd")}
    texts[f"{RECIPES}/kd.py"] += "\n    more = 1" * num_own
    return texts


def parameters(number: int) -> str:
    return ", ".join(f"p{index}" for index in range(number))


FINE = {
    "packages/am-x/src/am_x/lines.py": "\n" * 400,
    "packages/am-x/src/am_x/function.py": "def long():\n" + "    pass\n" * 59,
    "packages/am-x/src/am_x/parameters.py": f"class C:\n    def f(self, {parameters(11)}, *, last): ...\n",
    "packages/am-x/src/am_x/any.py": "def f(other: Any, model: nn.Module, dataset: list[Any], config: C | None): ...\n",
    # `train` has another limit in a recipe alone; so has what it shares.
    **recipes(45, num_own=10),
}


def found(changes: dict[str, str]) -> list[str]:
    return errors(examine(FINE | changes)[0], {})


def test_sources_within_the_limits() -> None:
    assert found({}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packages/am-x/src/am_x/lines.py": "\n" * 401}, "lines.py:1: lines of the file: 401, at most 400"),
        (
            {"packages/am-x/src/am_x/function.py": "class C:\n    async def long():\n" + "        pass\n" * 60},
            "function.py:2 C.long: lines of the function: 61, at most 60",
        ),
        (
            {"packages/am-x/src/am_x/inner.py": "def f():\n    def g():\n" + "        pass\n" * 60},
            "inner.py:2 f.g: lines of the function: 61",
        ),
        (
            {"packages/am-x/src/am_x/parameters.py": f"def f({parameters(9)}, /, b, *c, d, **e): ...\n"},
            "parameters.py:1 f: parameters: 13, at most 12",
        ),
        ({"recipes/src/am_recipes/sft.py": "def train():\n" + "    x\n" * 100}, "sft.py:1 train: .*: 101, at most 100"),
        ({"packages/am-x/src/am_x/t.py": "def train():\n" + "    x\n" * 60}, "t.py:1 train: .*: 61, at most 60"),
        (recipes(46), "lines that all train.. share: 46, at most 45"),
        ({"packages/am-x/src/am_x/any.py": "def f(*, model: Any): ...\n"}, "annotated Any: 1, at most 0"),
        ({"packages/am-x/src/am_x/any.py": "def f(dataset: int | Any | None): ...\n"}, "annotated Any: 1"),
        ({"packages/am-x/src/am_x/any.py": "def f(config: Any = None): ...\n"}, "annotated Any: 1"),
    ],
)
def test_one_offence_of_each_kind(changes: dict[str, str], message: str) -> None:
    messages = found(changes)
    assert any(re.search(message, line) for line in messages), messages
    # Nothing is said of the files that have not changed.
    assert all(line.split(":")[0] in {*changes, RECIPES} for line in messages)


def test_what_is_allowed() -> None:
    path = "packages/am-x/src/am_x/lines.py"
    key = ("lines of the file", path)
    findings, _ = examine(FINE | {path: "\n" * 410})
    assert errors(findings, {key: Allowed(410, "a table")}) == []
    (message,) = errors(findings, {key: Allowed(409, "a table")})
    assert "410, at most 400, 409 by ALLOWED" in message
    (message,) = errors(findings, {key: Allowed(410, "")})
    assert "gives no reason" in message
    (message,) = errors(examine(FINE)[0], {key: Allowed(410, "a table")})
    assert f"{path}: lines of the file: nothing is beyond the limit; take the entry out" in message


def test_notes() -> None:
    _, notes = examine(FINE)
    assert "45 lines are the same in all 2 train()" in notes
    assert f"{RECIPES}/sft.py: train has 86 lines, complexity 1" in notes
    assert "3 Any per" in examine({"a.py": "Any\nAny\nAny\n" + "\n" * 997})[1][0].replace(".0", "")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", 1),
        ("if a and b or c: pass\n elif d: pass\n else: pass", 5),
        ("for x in y: pass\n else: pass", 3),
        ("while x if y else z: pass", 3),
        ("try: pass\n except A: pass\n except B: pass\n else: pass\n finally: pass", 4),
        ("z = [x for x in y if x if y]", 4),
        ("with a: assert b", 2),
        ("match a:\n  case 1: pass\n  case _: pass", 2),
    ],
)
def test_complexity_is_radons(body: str, expected: int) -> None:
    assert complexity(ast.parse(f"def f():\n {body}\n")) == expected
