"""What run.json says of a run: origins of values, code, digests of what was read, and no secret."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from am_recipes import configs, provenance
from am_recipes.build import Weights
from am_recipes.settings import command_line, plain, replaced
from am_recipes.sinks import record

NO_WEIGHTS = Weights({}, [], {}, {})
CONFIG = """\
recipe: sft
model: {name_or_path: model}
dataset:
  path: ${ROWS,a.jsonl}
  split: ${SPLIT,train}
  hf_token: very-secret
optimizer: {lr: 1.0e-3}
step_scheduler: {max_steps: 5}
"""


def parsed(folder: Path, *overrides: tuple[str, str], text: str = CONFIG) -> configs.RunConfig:
    (folder / "mine.yaml").write_text(text)
    return configs.parse(folder / "mine.yaml", overrides)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["run", "--dataset.hf_token=abc", "--optimizer.lr=1"], "run '--dataset.hf_token=<redacted>' --optimizer.lr=1"),
        (
            ["run", "--dataset.hf_token", "abc", "--optimizer.lr", "1"],
            "run --dataset.hf_token '<redacted>' --optimizer.lr 1",
        ),
        (["run", "--api_key", "--seed", "1"], "run --api_key --seed 1"),
        (["run", "--api_key"], "run --api_key"),
        (["run", "--secret.0", "abc"], "run --secret.0 '<redacted>'"),
        (["run", "--tokenizer.pad_token", "abc"], "run --tokenizer.pad_token abc"),
        (["run", "--wandb={api_key: abc, project: p}"], "run '--wandb={api_key: <redacted>, project: p}'"),
        (["run", "--sinks", "[{key: abc}, {name: b}]"], "run --sinks '[{key: <redacted>}, {name: b}]'"),
        (
            ["run", "--uri", "http://me:pw@host:1/x", "http://host:1"],
            "run --uri 'http://<redacted>@host:1/x' http://host:1",
        ),
        (["run", "--uri=https://TOKEN@host/x"], "run '--uri=https://<redacted>@host/x'"),
        (["run", "--uri=http://h?a=1&write_token=T"], "run '--uri=http://h?a=1&write_token=<redacted>'"),
        (["run", "--a={password: [x, y], b: 1}"], "run '--a={password: [<redacted>, <redacted>], b: 1}'"),
        (["run", "--trackio.webhook_url=x"], "run '--trackio.webhook_url=<redacted>'"),
        (["run", "--a={api_key: x"], "run '--a=<redacted>'"),
        (["run", "--peft={r: 4,  dim: [1]}"], "run '--peft={r: 4,  dim: [1]}'"),
    ],
)
def test_a_command_is_shown_without_its_secrets(typed: list[str], shown: str) -> None:
    assert command_line(typed) == shown


def test_origins_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", "b.jsonl")
    monkeypatch.delenv("SPLIT", raising=False)
    config = parsed(tmp_path, ("optimizer.lr", "2e-3"), ("generate.prompts.0", "Hello"), ("peft", "{r: 4}"))
    file = tmp_path / "mine.yaml"
    found = provenance.of_run(config, NO_WEIGHTS, None, 1, {})["origins"]
    assert {path: found[path] for path in found if found[path] != "default"} == {
        "recipe": f"{file}:1",
        "model.name_or_path": f"{file}:2",
        "dataset.path": f"{file}:4, environment ROWS",
        "dataset.split": f"{file}:5, environment SPLIT (not set)",
        "dataset.hf_token": f"{file}:6",
        "optimizer.lr": "command line --optimizer.lr",
        "step_scheduler.max_steps": f"{file}:8",
        "generate.prompts.0": "command line --generate.prompts.0",
        "peft.r": "command line --peft",
    }
    assert found["run_dir"] == found["seed"] == found["loss_fn._target_"] == "default"


def test_what_a_recipe_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "NCCL_DEBUG": "INFO", "NVIDIA_API_KEY": "very-secret"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "a.jsonl").write_text("rows")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(bytes(100))
    config = parsed(tmp_path, ("dataset.path", str(tmp_path / "a.jsonl")))
    weights = Weights({"tokenizer.json": "{}", "chat_template.jinja": b"x"}, [], {}, {"base": tmp_path / "weights"})
    found = provenance.of_run(config, weights, 5, 4, {"one": 2, "two": 2})
    assert (found["resume_step"], found["world_size"], found["environment"]["nodes"]) == (5, 4, 2)
    assert found["environment"]["job"] == {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    assert found["environment"]["variables"]["NCCL_DEBUG"] == "INFO"
    assert found["config"]["dataset"]["hf_token"] == "${HF_TOKEN}"
    assert "very-secret" not in json.dumps(found)
    assert list(found["data"]) == [
        f"dataset.path: {tmp_path}/a.jsonl",
        "base weights",
        "chat_template.jinja",
        "tokenizer.json",
    ]
    assert found["data"]["tokenizer.json"] != found["data"]["chat_template.jinja"]
    assert {"python", *record.OURS, "torch", "numpy"} <= found["versions"].keys()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")


def test_a_secret_that_config_yaml_does_not_have_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "very-secret")
    asked = (("mlflow.tags.api_token", "very-secret"), ("mlflow.tags.password", "${MINE}"))
    config = parsed(tmp_path, *asked)
    assert list(replaced(plain(config), config.environment)) == [
        "dataset.hf_token is a secret, and config.yaml has ${HF_TOKEN} in its place: to use that file, set HF_TOKEN",
        "mlflow.tags.api_token is a secret, and config.yaml has ${API_TOKEN} in its place: to use that file, "
        "set API_TOKEN",
    ]


def test_weights_that_were_digested_already_are_not_read_again(tmp_path: Path) -> None:
    weights = Weights({}, [], {"base": "abc"}, {"base": tmp_path / "not there"})
    assert provenance.weights_and_files(weights) == {"base weights": "blake2b of 16 blocks of each file:abc"}


def test_what_cannot_be_read_ends_no_run(tmp_path: Path) -> None:
    long = "x" * 300
    config = plain(parsed(tmp_path, ("dataset.path", long)))
    assert provenance.data_files(config) == {f"dataset.path: {long}": "not readable: File name too long"}
    weights = Weights({}, [], {}, {"base": tmp_path / long})
    assert provenance.weights_and_files(weights) == {"base weights": "not readable: File name too long"}


def test_digests_of_files(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(provenance.WHOLE_BYTES + 1))
    before = [provenance.file_digest(file) for file in (small, large)]
    assert before[0].startswith("1,000 bytes, blake2b:")
    assert before[1].startswith("8,388,609 bytes, blake2b of 16 blocks:")
    for file in (small, large):
        with file.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(b"x")
    after = [provenance.file_digest(file) for file in (small, large)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False]
    assert provenance.file_digest(tmp_path / "none") == "not readable: No such file or directory"


def test_files_of_patterns_folders_and_lists(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(str(number))

    def files(value: str) -> dict[str, str]:
        changed = (("dataset.path", value), ("validation_dataset", "{path: none/b}"))
        return provenance.data_files(plain(parsed(tmp_path, *changed)))

    each = {f"{tmp_path}/{number}.jsonl": provenance.file_digest(tmp_path / f"{number}.jsonl") for number in range(3)}
    assert files(f"{tmp_path}/*.jsonl") == {f"dataset.path: {name}": digest for name, digest in each.items()}
    assert files(f"[{tmp_path}/2.jsonl]") == {f"dataset.path.0: {tmp_path}/2.jsonl": each[f"{tmp_path}/2.jsonl"]}
    assert len(files(str(tmp_path))) == 4
    assert files("organisation/name") == {}


def test_many_files_are_one_line_that_tells_another_size_and_other_content(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03}.bin").write_bytes(bytes(10))

    def line() -> str:
        found = provenance.data_files(plain(parsed(tmp_path, ("dataset.path", f"{folder}/*.bin"))))
        assert list(found) == [f"dataset.path: {folder}/*.bin"]
        return found[f"dataset.path: {folder}/*.bin"]

    lines = [line()]
    assert lines[0].startswith("300 files, 3,000 bytes, blake2b of all names and sizes and 3 blocks of 256 files:")
    (folder / "000.bin").write_bytes(b"x" * 10)
    lines.append(line())
    (folder / "001.bin").write_bytes(bytes(11))
    lines.append(line())
    assert len(set(lines)) == 3


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_state_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "working directory" not in provenance.repositories()
    git(tmp_path, "init")
    (tmp_path / "train.py").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")

    def state() -> str:
        return provenance.repositories()["working directory"]

    clean = state()
    (tmp_path / "untracked").write_text("is no part of it")
    assert state() == clean
    assert len(clean) == 40
    changed = []
    for text in ("two\n", "three\n", "two\n"):
        (tmp_path / "train.py").write_text(text)
        changed.append(state())
    assert all(each.startswith(f"{clean}, changed: blake2b:") for each in changed)
    assert changed[0] == changed[2] != changed[1]
    assert provenance.launch(None, 1)["git"] == changed[0]


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository, which is the working directory."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    return tmp_path


def test_a_repository_of_another_user_has_its_commit(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that is mounted into a container: git refuses the diff, which could run what the repository names."""
    commit = provenance.repositories()["working directory"]
    ran = committed / "ran"
    git(committed, "config", "core.fsmonitor", f"touch {ran}; false")
    # Git's own switch for its own tests.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    told = provenance.repositories()["working directory"]
    assert told.startswith(f"{commit}, changes not known: fatal: detected dubious ownership in repository at ")
    assert not ran.exists()


def test_what_git_does_not_tell_is_said(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (committed / ".git/HEAD").write_text("nothing")
    assert provenance.launch(None, 1)["git"] == (
        "not known: fatal: not a git repository (or any of the parent directories): .git"
    )
    monkeypatch.setenv("PATH", str(committed))
    assert provenance.launch(None, 1)["git"] == "not known: git does not start: No such file or directory"
    (committed / "git").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (committed / "git").chmod(0o755)
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.2)
    assert provenance.launch(None, 1)["git"] == "not known: git took more than 0.2 s"


def test_own_modules_are_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows_of_this_test.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_rows_of_this_test")
    found = provenance.own_modules()
    del sys.modules["my_rows_of_this_test"]
    assert found == {"my_rows_of_this_test.py": provenance.file_digest(tmp_path / "my_rows_of_this_test.py")}


def big_launch() -> Any:
    versions = {f"package-{number}": f"{number}.0" for number in range(300)}
    values = {f"section.key_{number}": f"configs/file.yaml:{number}" for number in range(200)}
    return provenance.launch(None, 1) | {"versions": versions, "origins": values, "config": values}


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    made = record.Record(total_steps=2, identity={"seed": 1}, launches=[big_launch()])
    made.save(tmp_path)
    made.notes.append("{")
    made.add_data({"dataset": "abc"})
    made.launches.append(big_launch())
    made.save(tmp_path)
    found = record.load(tmp_path)
    assert dataclasses.asdict(found) == dataclasses.asdict(made)
    assert found.launches[0]["data"] == {"dataset": "abc"}


def test_a_launch_that_equals_the_next_one_is_written_once(tmp_path: Path) -> None:
    """Ephemeral machines launch a run a thousand times; the latest launch is whole in the file."""
    launches = [big_launch() | {"resume_step": step} for step in range(4)]
    launches[1]["versions"] = {"torch": "1"}
    made = record.Record(total_steps=2, identity={}, launches=launches[:1])
    for launch in launches[1:]:
        made.save(tmp_path)
        made.launches.append(launch)
        # Known after the first save of the launch.
        made.save(tmp_path)
        made.add_data({"dataset, as read": "abc"})
    made.save(tmp_path)
    written = json.loads((tmp_path / "run.json").read_text())["launches"]
    assert [launch.get("as_next") for launch in written] == [
        ["config", "origins", "code"],
        ["config", "origins", "code", "data"],
        ["versions", "config", "origins", "code", "data"],
        None,
    ]
    assert written[3] == made.launches[3]
    assert len(json.dumps(written[2])) < len(json.dumps(written[3])) / 10
    assert record.load(tmp_path).launches == made.launches
    # A second writer, which has read the file, writes it as it was.
    before = (tmp_path / "run.json").read_bytes()
    record.load(tmp_path).save(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_record_with_another_form_of_launches_is_refused(tmp_path: Path) -> None:
    for launches in ("[1, 2]", '[{"as_next": ["config"]}, {}]', "7", '[{"as_next": 5}, {}]'):
        (tmp_path / "run.json").write_text(f'{{"total_steps": 1, "identity": {{}}, "launches": {launches}}}')
        with pytest.raises(ValueError, match="is not the record of a run"):
            record.load(tmp_path)


def test_a_note_leaves_the_launches_as_they_were(tmp_path: Path) -> None:
    made = record.Record(total_steps=2, identity={}, launches=[big_launch()] * 200)
    made.save(tmp_path)
    before = record.load(tmp_path)
    made.notes.append("a note")
    made.save(tmp_path)
    found = record.load(tmp_path)
    assert (found.notes, found.launches) == (["a note"], before.launches)
