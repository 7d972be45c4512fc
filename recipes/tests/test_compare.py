"""`automodel compare`: which step differs first, by how much, and what differs in what the runs were made of."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from am_recipes import cli
from am_recipes.compare import compare, compare_rows, different_columns
from am_recipes.sinks.record import Record

LAUNCH: dict[str, Any] = {
    "time": "2026-01-01T00:00:00+00:00",
    "command": "automodel mine.yaml",
    "resume_step": None,
    "world_size": 1,
    "git": "abc",
    "device": "cpu",
    "versions": {"python": "3.12.1", "torch": "2.11.0"},
    "code": {"working directory": "abc", "mine.py": "5 bytes, blake2b:00"},
    "environment": {"host": "one", "threads": 1, "variables": {}, "job": {"SLURM_JOB_ID": "7"}},
    "config": {"run_dir": "runs/a", "optimizer": {"lr": 0.001, "betas": None}, "freeze": []},
    "origins": {"run_dir": "default", "optimizer.lr": "mine.yaml:4", "optimizer.betas": "default", "freeze": "default"},
    "data": {"dataset, as read": "f00", "dataset.path: /here/a.jsonl": "5 bytes, blake2b:00"},
}


def row(step: int, **changed: Any) -> dict[str, Any]:
    values = {"step": step, "loss": 2.0 / step, "grad_norm": 1.0, "tokens": 100, "tokens_per_second": 5.0, "time": 7.0}
    return values | {"peak_memory_bytes": 10} | changed


def run(folder: Path, rows: list[dict[str, Any]], *launches: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    Record(total_steps=9, identity={}, launches=[{**LAUNCH, **each} for each in launches or ({},)]).save(folder)  # type: ignore[typeddict-item]
    return folder


def told(a: Path, b: Path) -> str:
    equal, text = compare(a, b)
    assert all(len(line) <= 80 for line in text.splitlines()[2:]), text
    for asked, status in (([], 0), (["--assert-equal"], 0 if equal else 1)):
        assert cli.main(["compare", str(a), str(b), *asked]) == status
    return text.partition("\n\n")[2]


def test_equal_runs_may_differ_in_what_was_measured(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "val_loss": 3.0},
        row(1),
        row(2, loss=None),
        row(3, loss=math.nan),
        {"step": 3, "val_loss": 2.0},
    ]
    timed = [
        each | ({"time": 9.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1} if "loss" in each else {})
        for each in rows
    ]
    other = {"time": "later", "command": "again", "environment": LAUNCH["environment"] | {"job": {"SLURM_JOB_ID": "8"}}}
    text = told(run(tmp_path / "a", rows), run(tmp_path / "b", timed, other))
    assert text.split("\n\n") == [
        "rows are equal to the last digit: the 5 that both have",
        "configuration: the same",
        "code: the same",
        "data and weights: the same",
        "environment: the same",
    ]


def test_what_is_not_finite_is_one_whoever_wrote_it(tmp_path: Path) -> None:
    files = tmp_path / "a", tmp_path / "b"
    for file, values in zip(files, ((math.nan, math.inf, None), (None, None, math.nan)), strict=True):
        file.write_text("".join(json.dumps(row(step, loss=value)) + "\n" for step, value in enumerate(values, start=1)))
    assert compare_rows(*files).are_equal


def test_runs_without_a_row_are_not_shown_to_be_equal(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", []), run(tmp_path / "b", [])
    assert "no row is in both" in told(a, b)
    assert cli.main(["compare", str(a), str(b), "--assert-equal"]) == 1


@pytest.mark.parametrize(
    ("column", "is_compared"),
    [
        ("val_loss_lifetime", True),
        ("val_loss_first_seconds", True),
        ("lora_bytes", True),
        ("overtime", True),
        ("expert_seconds", False),
        ("images_per_second", False),
    ],
)
def test_which_columns_are_measured(column: str, is_compared: bool) -> None:
    assert different_columns(row(1, **{column: 1.0}), row(1, **{column: 2.0})) == [column] * is_compared


def test_files_of_one_name_in_two_folders(tmp_path: Path) -> None:
    """The same files elsewhere are the same, and each is held against its own."""

    def launch(root: str, german: str) -> dict[str, Any]:
        names = {f"{root}/de/part.parquet": german, f"{root}/en/part.parquet": "e"}
        return {"data": {f"dataset.path: {name}": digest for name, digest in names.items()}}

    a = run(tmp_path / "a", [row(1)], launch("/here", "d"))
    text = told(a, run(tmp_path / "b", [row(1)], launch("/there/it/is", "d")))
    assert "data and weights: the same" in text
    text = told(a, run(tmp_path / "c", [row(1)], launch("/there/it/is", "other")))
    assert "data and weights: 1 differs\n  dataset.path: de/part.parquet\n    A d\n    B other\n" in text


def test_the_first_step_that_differs_and_by_how_much(tmp_path: Path) -> None:
    a = [row(1), row(2), row(3, extra=1.0), {"step": 3, "val_loss": 2.0}]
    b = [row(1), row(2, loss=1.25, grad_norm=None), row(3), {"step": 3, "val_loss": 2.5}]
    text = told(run(tmp_path / "a", a), run(tmp_path / "b", b))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:5] == [
        "rows differ from step 2 on: 3 of the 4 that both have",
        "",
        "A B B - A",
        "loss 1 1.25 +0.25",
        "grad_norm 1 null -",
    ]
    assert lines[5:11] == [
        "",
        "the last of them, the validation after step 3:",
        "",
        "A B B - A",
        "val_loss 2 2.5 +0.5",
        "",
    ]


def test_a_validation_that_differs_is_named_so(tmp_path: Path) -> None:
    a, b = ([row(1), {"step": 1, "val_loss": loss}] for loss in (2.0, 2.0000000000000004))
    text = told(run(tmp_path / "a", a), run(tmp_path / "b", b))
    assert "rows differ from the validation after step 1 on: 1 of the 2" in text
    assert "+4.44e-16" in text


@pytest.mark.parametrize("swapped", [False, True])
def test_runs_of_different_length_and_validations_of_one_alone(tmp_path: Path, swapped: bool) -> None:
    long = run(tmp_path / "long", [{"step": 0, "val_loss": 3.0}, *map(row, range(1, 6))])
    short = run(tmp_path / "short", [row(1), row(2)])
    text = told(*((short, long) if swapped else (long, short)))
    one, other = "BA" if swapped else "AB"
    assert "rows are equal to the last digit: the 2 that both have" in text
    assert f"4 rows are in {one} alone, which ends at step 5, {other} at step 2" in text
    assert cli.main(["compare", str(long), str(short), "--assert-equal"]) == 1


def test_a_file_that_is_still_written(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", [row(1), row(2)]), run(tmp_path / "b", [row(1)])
    with (b / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert "B: read up to line 2 of metrics.jsonl, which is no row, which is not finished" in told(a, b)


def test_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    a = run(tmp_path / "a", [row(2), row(1)])
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: step 1 comes after step 2; restore the file"):
        compare_rows(a / "metrics.jsonl", a / "metrics.jsonl")


def test_what_differs_in_config_code_data_and_machine(tmp_path: Path) -> None:
    changed = {
        "world_size": 2,
        "versions": {"python": "3.12.1", "torch": "2.12.0"},
        "code": {"working directory": "abc, changed: blake2b:11", "mine.py": "5 bytes, blake2b:00"},
        "environment": {"host": "two", "threads": 1, "variables": {"OMP_NUM_THREADS": "1"}},
        "config": {"run_dir": "runs/b", "optimizer": {"lr": 0.002, "betas": None}, "freeze": [{"freeze": "*" * 90}]},
        "origins": {"optimizer.lr": "command line --optimizer.lr", "optimizer.betas": "mine.yaml:9"},
        "data": {"dataset, as read": "f00", "dataset.path: /there/a.jsonl": "5 bytes, blake2b:00"},
    }
    text = told(run(tmp_path / "a", [row(1)]), run(tmp_path / "b", [row(1)], changed))
    sections = {each.splitlines()[0]: each.splitlines()[1:] for each in text.split("\n\n")[1:]}
    assert sections["configuration: 2 differ"] == [
        "  optimizer.lr",
        "    A 0.001 (mine.yaml:4)",
        "    B 0.002 (command line --optimizer.lr)",
        "  freeze.0.freeze",
        "    A not there",
        f"    B '{'*' * 33} ... {'*' * 34}'",
    ]
    assert sections["code: 2 differ"] == [
        "  working directory",
        "    A abc",
        "    B abc, changed: blake2b:11",
        "  torch",
        "    A 2.11.0",
        "    B 2.12.0",
    ]
    assert sections["data and weights: the same"] == []
    assert [line for line in sections["environment: 3 differ"] if not line.startswith("    ")] == [
        *("  ranks", "  host", "  variables.OMP_NUM_THREADS"),
    ]


def test_another_number_of_ranks_is_one_difference(tmp_path: Path) -> None:
    variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    machine = {**LAUNCH["environment"], "nodes": 1}
    one = {"environment": machine | {"hosts": {"vm": 1}}}
    two = {"world_size": 2, "environment": machine | {"hosts": {"vm": 2}, "variables": variables}}
    text = told(run(tmp_path / "a", [row(1)], one), run(tmp_path / "b", [row(1)], two))
    assert text.endswith("environment: 1 differs\n  ranks\n    A 1\n    B 2")
    other = {"environment": machine | {"hosts": {"elsewhere": 1}}}
    text = told(tmp_path / "a", run(tmp_path / "c", [row(1)], other))
    assert text.endswith("environment: 1 differs\n  hosts\n    A vm\n    B elsewhere")


def test_what_changed_within_a_run(tmp_path: Path) -> None:
    later = {"resume_step": 4, "versions": {"torch": "2.12.0"}}
    again = {"resume_step": 6, "versions": {"torch": "2.12.0"}}
    text = told(run(tmp_path / "a", [row(1)], {}, later, again), run(tmp_path / "b", [row(1)]))
    assert text.splitlines()[-1] == "A: launch 2 of 3, from step 4, changed code"


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", [row(1)]), run(tmp_path / "b", [row(1)])
    old = json.loads((b / "run.json").read_text())
    for key in ("code", "environment", "config", "origins", "data"):
        del old["launches"][0][key]
    (b / "run.json").write_text(json.dumps(old))
    assert "configuration: B does not say, in a record of an older version" in told(a, b)
    assert "configuration: neither run says" in told(b, b)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run(tmp_path / "good", [row(1)])
    for name in ("empty", "foreign", "broken", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "empty/metrics.jsonl").unlink()
    (tmp_path / "foreign/run.json").write_text('{"name": "another tool"}')
    (tmp_path / "broken/run.json").write_text("{")
    (tmp_path / "bare/run.json").write_text('{"total_steps": 1, "identity": {}, "launches": []}')
    messages = {
        "empty": "empty is not the directory of a run: run.json and metrics.jsonl not found there; give that of one",
        "none": "none is not the directory of a run: run.json and metrics.jsonl not found there; give that of one",
        "foreign": "run.json is not the record of a run",
        "broken": "run.json is not the record of a run",
        "bare": "run.json names no launch, so it is not the record of a run; restore the file",
    }
    for name, message in messages.items():
        for pair in ((good, tmp_path / name), (tmp_path / name, good)):
            assert cli.main(["compare", *map(str, pair)]) == 1
            printed = capsys.readouterr()
            assert message in printed.err
            assert "Traceback" not in printed.err
    for arguments in ([], ["a"], ["a", "b", "c"], ["a", "b", "--assert"]):
        assert cli.main(["compare", *arguments]) == 2


def test_it_needs_no_torch(tmp_path: Path) -> None:
    a = run(tmp_path / "a", [row(1)])
    lines = ("import sys", "from am_recipes import cli", "cli.main(sys.argv[1:])", "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", "\n".join(lines), "compare", str(a), str(a)], check=True, capture_output=True)
