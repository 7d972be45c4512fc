"""`deterministic: true`: two runs are equal to the bit, as `automodel compare` sees, and torch is left as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from am_recipes import cli
from integration_tests import runs
from integration_tests.test_resume import CONFIG, SHORT

RUN = SHORT | {"deterministic": "true", "step_scheduler.max_steps": "4", "step_scheduler.ckpt_every_steps": "4"}
JITTER = {"loss_fn": "{_target_: integration_tests.user_code.jittered_cross_entropy}"}
SCATTERED = {"loss_fn": "{_target_: integration_tests.user_code.scattered_cross_entropy}"}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.train(tmp_path_factory.mktemp("once"), "run", CONFIG, RUN)


def differs(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["compare", str(a), str(b), "--assert-equal"])
    return status, capsys.readouterr().out


def test_two_runs_are_equal_to_the_bit(once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU they are without the key too: this is of the whole way, the one below of what the key does."""
    again = runs.train(tmp_path, "again", CONFIG, RUN)
    status, text = differs(once, again, capsys)
    assert status == 0
    assert "rows are equal to the last digit: the 6 that both have" in text
    assert [line for line in text.splitlines() if line.endswith("the same")] == [
        *("configuration: the same", "code: the same", "data and weights: the same", "environment: the same"),
    ]
    runs.assert_same_run(again, once)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: what deterministic changes, it changes there"
)
def test_two_runs_on_a_gpu_are_equal_by_deterministic_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {}
    for asked in ("true", "false"):
        changes = RUN | SCATTERED | {"deterministic": asked}
        pairs[asked] = [runs.train(tmp_path, f"{name}-{asked}", CONFIG, changes) for name in "ab"]
    assert differs(*pairs["true"], capsys)[0] == 0
    assert "rows differ from step" in differs(*pairs["false"], capsys)[1]
    variables = [
        json.loads((pair[0] / "run.json").read_text())["launches"][0]["environment"]["variables"]
        for pair in pairs.values()
    ]
    assert [found.get("CUBLAS_WORKSPACE_CONFIG") for found in variables] == [":4096:8", None]


def test_a_loss_that_jitters_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [runs.train(tmp_path, name, CONFIG, RUN | JITTER) for name in ("a", "b")]
    status, text = differs(pair[0], pair[1], capsys)
    assert status == 1
    assert "rows differ from step 1 on" in text
    assert "configuration: the same" in text


def test_another_rate_and_other_rows_are_named(once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "train.jsonl"
    source = Path(runs.shipped("tiny.yaml")["dataset"]["path"])
    rows.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    other = runs.train(tmp_path, "other", CONFIG, RUN | {"optimizer.lr": "1e-3", "dataset.path": str(rows)})
    status, text = differs(once, other, capsys)
    assert status == 1
    assert re.search(r"optimizer.lr\n +A 0.002 \(.*tiny.yaml:\d+\)\n +B 0.001 \(command line --optimizer.lr\)", text)
    assert re.search(r"data and weights: 2 differ\n  dataset, as read\n.*\n.*\n  dataset.path: train.jsonl\n", text)


def test_torch_is_left_as_it_was_and_a_wrong_workspace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"--{key}={value}" for key, value in RUN.items()]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1024:2")
    refused = runs.command(str(CONFIG), f"--run_dir={tmp_path / 'run'}", *asked)
    told = r"deterministic: true needs CUBLAS_WORKSPACE_CONFIG to be one of :4096:8, :16:8, .* ':1024:2'; unset it"
    runs.require_refusal(refused, 1, told)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.backends.cudnn.benchmark = True
    try:
        assert runs.command(str(CONFIG), f"--run_dir={tmp_path / 'run'}", *asked) == (0, "")
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
    assert not torch.are_deterministic_algorithms_enabled()
    launch = json.loads((tmp_path / "run/run.json").read_text())["launches"][0]
    assert launch["environment"]["variables"]["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert launch["origins"]["deterministic"] == "command line --deterministic"
