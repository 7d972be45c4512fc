"""What MLflow is given of a config, and what of it is refused; integration_tests/test_trackers.py has a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from am_recipes import configs
from am_recipes.sections.tracking import require_package
from am_recipes.settings import without_secrets
from am_recipes.sinks.mlflow import grouped
from am_recipes.trackers import flat

BASE = """
recipe: sft
model: {name_or_path: some/model}
dataset: {path: rows.jsonl}
optimizer: {lr: 1.0e-4}
step_scheduler: {max_steps: 1}
"""
# What a config of NeMo AutoModel may say.
REFERENCE = """
mlflow: {experiment_name: e, run_name: "", tracking_uri: null, artifact_location: null, tags: {a: 1}, resume: true,
         description: null, flatten_depth: 1}
"""


def parse(folder: Path, text: str) -> configs.RunConfig:
    file = folder / "config.yaml"
    file.write_text(BASE + text)
    return configs.parse(file)


def test_keys_of_the_reference_are_taken_and_written_again(tmp_path: Path) -> None:
    config = parse(tmp_path, REFERENCE)
    assert list(config.trackers()) == ["mlflow"]
    assert config.trackers()["mlflow"].artifacts() == ["config.yaml", "report.html"]
    assert configs.parse(_written(tmp_path, config)) == config
    assert config.identity() == parse(tmp_path, "").identity()


def _written(folder: Path, config: configs.RunConfig) -> Path:
    (folder / "again.yaml").write_text(config.to_yaml())
    return folder / "again.yaml"


def test_parameters_by_depth() -> None:
    values: dict[str, Any] = {
        "seed": 1,
        "optimizer": {"lr": 0.1},
        "model": {"config": {"rope": {"theta": 2}, "x": [3]}},
    }
    params = flat(values | {"peft": None, "kernels": {}})
    assert params == {
        "seed": 1,
        "optimizer.lr": 0.1,
        "model.config.rope.theta": 2,
        "model.config.x": [3],
        "peft": None,
        "kernels": {},
    }
    assert grouped(params, None) == params
    assert grouped(params, 1) == {
        "seed": 1,
        "optimizer.lr": 0.1,
        "model.config": {"rope.theta": 2, "x": [3]},
        "peft": None,
        "kernels": {},
    }


def test_a_password_in_an_address_is_refused_unless_it_is_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        configs.ConfigError, match=r"mlflow.tracking_uri: has a password in clear, which config.yaml would"
    ) as told:
        parse(tmp_path, "mlflow: {tracking_uri: 'http://me:hidden@host:5000'}")
    assert "hidden" not in str(told.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@host:5000")
    config = parse(tmp_path, "mlflow: {tracking_uri: '${MLFLOW_TRACKING_URI}'}")
    assert config.mlflow is not None
    assert config.mlflow.tracking_uri == "http://me:hidden@host:5000"
    assert "hidden" not in config.to_yaml()
    told_later = without_secrets("request to http://me:hidden@host:5000/api and sqlite:///a@b failed")
    assert told_later == "request to http://<redacted>@host:5000/api and sqlite:///a@b failed"


def test_a_missing_package_is_named_also_where_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_package("json")
    for name in ("no_such_tracker", "a_folder"):
        (tmp_path / "a_folder").mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=rf'needs the package {name}.*pip install "am-recipes\[{name}\]"'):
            require_package(name)
