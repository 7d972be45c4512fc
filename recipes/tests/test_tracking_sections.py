"""Sections of trackers in a config: what they take beside their keys, what they refuse, what is written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from am_recipes import configs

BASE: dict[str, Any] = {
    "recipe": "sft",
    "model": {"name_or_path": "some/model"},
    "dataset": {"path": "rows.jsonl"},
    "optimizer": {"lr": 1e-4},
    "step_scheduler": {"max_steps": 1},
}


def parsed(folder: Path, *overrides: tuple[str, str], **trackers: Any) -> configs.RunConfig:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(BASE | trackers))
    return configs.parse(file, overrides)


def test_further_arguments_reach_the_client_and_the_written_config_says_the_same(tmp_path: Path) -> None:
    wandb = {"entity": "team", "name": "", "tags": ["a"], "job_type": "train", "settings": {"console": "wrap"}}
    config = parsed(tmp_path, wandb=wandb, trackio={"group": "g"}, tensorboard={"log_dir": "events"})
    assert config.wandb is not None
    assert config.wandb.init.arguments == {"job_type": "train", "settings": {"console": "wrap"}}
    assert (config.wandb.project, config.wandb.entity, config.wandb.tags) == ("automodel", "team", ("a",))
    assert [call.key for call in config.targets() if call.key in ("wandb", "trackio")] == ["wandb", "trackio"]
    written = tmp_path / "written.yaml"
    written.write_text(config.to_yaml())
    assert configs.parse(written) == config


def test_what_is_off_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(tmp_path).trackers() == {}
    assert list(parsed(tmp_path, wandb={}, trackio={}, tensorboard={}).trackers()) == [
        "wandb",
        "tensorboard",
        "trackio",
    ]
    assert parsed(tmp_path, wandb={"enable": False}).trackers() == {}
    assert parsed(tmp_path, wandb={"mode": "disabled"}).trackers() == {}
    assert parsed(tmp_path, ("wandb", "null"), wandb={}).trackers() == {}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert parsed(tmp_path, wandb={}).trackers() == {}
    assert list(parsed(tmp_path, wandb={"mode": "offline"}).trackers()) == ["wandb"]


def test_a_tracker_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    assert parsed(tmp_path, wandb={}, tensorboard={}).identity() == parsed(tmp_path).identity()


def test_a_secret_among_the_settings_is_written_as_a_reference(tmp_path: Path) -> None:
    text = parsed(tmp_path, wandb={"settings": {"api_key": "visible"}}).to_yaml()
    assert "visible" not in text
    assert "api_key: ${API_KEY}" in text


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"wandb": {"projct": "p"}}, "wandb.projct: unknown key; did you mean 'project'?"),
        ({"wandb": {"jobtype": "p"}}, "wandb.jobtype: unknown key; did you mean 'job_type'?"),
        ({"wandb": {"mode": "on"}}, "wandb.mode: must be one of 'auto', 'online', 'offline', 'disabled', got 'on'"),
        ({"wandb": {"_target_": "os.system"}}, "wandb._target_: must be wandb.init, got 'os.system'; leave it out"),
        ({"wandb": {"log_artifacts": ["weights"]}}, "log_artifacts.0: must be one of 'config', 'report', 'export'"),
        ({"tensorboard": {"logdir": "x"}}, "tensorboard.logdir: unknown key; did you mean 'log_dir'?"),
        ({"trackio": {"space": "x"}}, "trackio.space: unknown key; did you mean 'space_id'?"),
        ({"trackio": {"project": ""}}, "trackio.project: must not be empty"),
        (
            {"mlflow": {"tracking_uri": "localhost:5000"}},
            "mlflow.tracking_uri: must be an address, such as http://HOST",
        ),
        (
            {"trackio": {"server_url": "http://here:1?write_token=visible"}},
            "trackio.server_url: has a write_token in clear, which config.yaml would repeat; give the whole address as",
        ),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_the_schema(tmp_path: Path, section: dict[str, Any], expected: str) -> None:
    with pytest.raises(configs.ConfigError) as caught:
        parsed(tmp_path, **section)
    assert expected in str(caught.value)
