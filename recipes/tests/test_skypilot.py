"""What SkyPilot is given: a task against its own schema, what runs on each machine, and what is refused."""

from __future__ import annotations

import importlib.metadata
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from am_recipes import cli, command_line, configs
from am_recipes.launch import Nodes

ROOT = Path(__file__).parents[2]
CONFIG = """\
recipe: sft
run_dir: /training/runs/one
model: {name_or_path: some/model}
dataset: {path: rows.jsonl}
optimizer: {lr: 1e-4}
step_scheduler: {max_steps: 10}
skypilot:
  cloud: aws
  volumes: {/training: training}
"""
EVERYTHING = """\
  accelerators: H100:8
  num_nodes: 2
  use_spot: true
  disk_size: 500
  region: us-east-1
  zone: us-east-1a
  job_name: one
  image_id: docker:ghcr.io/example/automodel:1.0
  setup: |
    pip install am-recipes
    nvidia-smi
  hf_home: /training/huggingface
  hf_token: ${MY_TOKEN}
  wandb_key: ${WANDB_API_KEY}
  secrets: [AWS_SECRET_ACCESS_KEY]
  env_vars: {NCCL_DEBUG: INFO, OMP_NUM_THREADS: 8}
  file_mounts: {/data: s3://bucket/rows, /out: {name: results, mode: MOUNT}}
  max_restarts: 2
"""


@pytest.fixture(scope="module")
def faults():
    """Says what SkyPilot's schema of a task finds wrong.

    Its packages are made bare, as their `__init__` imports all of SkyPilot and seventy packages. Two modules stand in
    for what they give to the schema: how an idle cluster is stopped and the daemons of its server, of which a task of
    ours has neither.
    """
    folder = Path(str(importlib.metadata.distribution("skypilot").locate_file("sky")))
    version = importlib.metadata.version("skypilot")
    before = set(sys.modules)
    for name, contents in {
        "sky": {"__path__": [str(folder)], "__version__": version},
        "sky.server": {"__path__": [str(folder / "server")]},
        "sky.utils": {"__path__": [str(folder / "utils")]},
        "sky.skylet.autostop_lib": {"AutostopWaitFor": types.SimpleNamespace(supported_modes=list)},
        "sky.server.daemons": {"INTERNAL_REQUEST_DAEMONS": []},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    try:
        from sky.utils import schemas, validator

        kind = validator.get_schema_validator()
        task, resources = kind(schemas.get_task_schema()), kind(schemas.get_resources_schema())
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "sky":
                del sys.modules[name]

    def faults(values):
        found = [*task.iter_errors(values), *resources.iter_errors(values["resources"])]
        return [error.message for error in found]

    return faults


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "hf_abc")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_abc")

    def write(text=CONFIG, name="one.yaml"):
        Path(name).write_text(text)
        return name

    return write


@pytest.fixture
def rendered(write, capsys):
    """The task that a dry run shows, and the command above it."""

    def rendered(text=CONFIG, *arguments):
        assert cli.main([write(text), "--dry-run", *arguments]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert "_abc" not in out
        command, _, text = out.partition("\n---\n# ")[2].partition("\n")
        return yaml.safe_load(text), command.split()

    return rendered


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A program on PATH that writes down how it was called and ends as it is told."""

    def tool(name, status=0):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        lines = ("#!/bin/sh", f'printf "%s\\n" "$@" > "{tmp_path}/{name}.called"', f'env > "{tmp_path}/{name}.env"')
        path.write_text("\n".join([*lines, f"exit {status}\n"]))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        return tmp_path / f"{name}.called"

    return tool


def test_skypilots_schema_takes_the_task(rendered, faults):
    for text in (CONFIG, CONFIG + EVERYTHING, CONFIG.replace("aws", "kubernetes") + "  instance_type: p5.48xlarge\n"):
        assert faults(rendered(text)[0]) == []


def test_the_schema_would_notice_what_it_does_not_know(rendered, faults):
    task, _ = rendered(CONFIG + EVERYTHING)
    task["secret"] = task.pop("secrets")
    task["resources"]["disksize"] = 1
    task["resources"]["job_recovery"]["recover_on_exit_codes"] = [756]
    found = faults(task)
    assert len(found) == 3, found
    assert [word in "".join(found) for word in ("'secret' was", "'disksize' was", "756")] == [True] * 3


def test_every_key_of_the_section_is_where_skypilot_looks_for_it(rendered, tmp_path):
    task, command = rendered(CONFIG + EVERYTHING)
    (config,) = [source for path, source in task["file_mounts"].items() if path == "~/automodel_job/one.yaml"]
    assert Path(config).parent.parent == tmp_path / "skypilot_jobs"
    assert task.pop("file_mounts") == {
        "~/automodel_job/one.yaml": config,
        "/data": "s3://bucket/rows",
        "/out": {"name": "results", "mode": "MOUNT"},
    }
    assert task.pop("run").startswith('export HF_TOKEN="$MY_TOKEN"\nexec python -m am_recipes.sft ')
    assert task == {
        "name": "one",
        "workdir": ".",
        "num_nodes": 2,
        "resources": {
            "infra": "aws/us-east-1/us-east-1a",
            "accelerators": "H100:8",
            "use_spot": True,
            "disk_size": 500,
            "image_id": "docker:ghcr.io/example/automodel:1.0",
            # A run that was stopped ends with 75, and is not counted.
            "job_recovery": {"max_restarts_on_errors": 2, "recover_on_exit_codes": [75]},
        },
        "volumes": {"/training": "training"},
        "envs": {
            "PYTHONUNBUFFERED": "1",
            "HF_HOME": "/training/huggingface",
            "NCCL_DEBUG": "INFO",
            "OMP_NUM_THREADS": "8",
        },
        "secrets": {"MY_TOKEN": None, "WANDB_API_KEY": None, "AWS_SECRET_ACCESS_KEY": None},
        "setup": "pip install am-recipes\nnvidia-smi\n",
    }
    secrets = "--secret MY_TOKEN --secret WANDB_API_KEY --secret AWS_SECRET_ACCESS_KEY"
    assert " ".join(command[:-1]) == f"sky jobs launch -n one -y -d {secrets}"


def test_the_defaults_are_those_of_the_reference(rendered):
    task, command = rendered()
    assert task["resources"] == {
        "infra": "aws",
        "accelerators": "T4:1",
        "use_spot": True,
        "disk_size": 100,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }
    assert task["num_nodes"] == 1
    assert " ".join(command[:-1]) == "sky jobs launch -n llm_finetune -y -d"
    assert rendered(CONFIG, "--skypilot.zone", "b")[0]["resources"]["infra"] == "aws/*/b"


def test_a_cluster_of_ones_own_is_not_watched_over(rendered):
    task, command = rendered(CONFIG, "--skypilot.use_spot", "false")
    assert "job_recovery" not in task["resources"]
    assert " ".join(command[:-1]) == "sky launch -c llm_finetune -y -d"


def test_each_machine_runs_the_command_that_starts_a_node_by_hand(rendered, write, tool, tmp_path):
    odd = 'cost $5, `id` and "quotes"'
    task, _ = rendered(CONFIG + EVERYTHING, "--generate.prompts.0", odd, "--optimizer.lr=2e-4")
    called = tool("python")
    machine = {"HOME": str(tmp_path), "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    machine |= {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "MY_TOKEN": "hf_abc"}
    subprocess.run(["bash", "-c", task["run"]], env=machine, check=True)
    assert "HF_TOKEN=hf_abc" in (tmp_path / "python.env").read_text().splitlines()
    words = called.read_text().splitlines()
    assert words[:4] == ["-m", "am_recipes.sft", "-c", f"{tmp_path}/automodel_job/one.yaml"]
    arguments = command_line.parse_arguments(words[2:])
    assert arguments.nodes == Nodes(2, 1, "10.0.0.1", 29500)
    assert arguments.processes == 8
    inside = configs.parse(write(CONFIG + EVERYTHING, "copy.yaml"), arguments.overrides)
    assert (inside.skypilot, inside.optimizer.lr, inside.generate.prompts) == (None, 2e-4, (odd,))


def test_a_machine_whose_gpus_are_not_known_here_has_a_rank_for_each(rendered):
    task, _ = rendered(CONFIG, "--skypilot.instance_type", "p5.48xlarge")
    assert "accelerators" not in task["resources"]
    arguments = command_line.parse_arguments(task["run"].split()[4:])
    assert (arguments.nodes, arguments.processes) == (None, None)


def test_a_recipe_of_ones_own_is_found_in_the_folder_that_is_copied(write, capsys, tmp_path):
    path, config = str(tmp_path / "mine" / "mysft.py"), write()
    assert cli.run_recipe("sft", path, ["-c", config, "--dry-run"]) == 0
    assert "exec python mine/mysft.py -c ~/automodel_job/one.yaml" in capsys.readouterr().out
    assert cli.run_recipe("sft", path, ["-c", config, "--dry-run", "--skypilot.workdir", "other"]) == 1
    assert f"skypilot.workdir: workdir=other must have {path}" in capsys.readouterr().err


def test_sky_gets_the_file_and_how_to_go_on_is_told(write, tool, capsys, tmp_path):
    called = tool("sky")
    assert cli.main([write(CONFIG + EVERYTHING)]) == 0
    told = capsys.readouterr().out
    (folder,) = (tmp_path / "skypilot_jobs").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["one.yaml"]
    assert called.read_text().splitlines()[-1] == f"{folder}/one.yaml"
    for line in ("sky jobs logs -n one", "sky jobs cancel -n one"):
        assert line in told
    assert cli.main([write(), "--skypilot.use_spot", "false"]) == 0
    assert "sky down llm_finetune; until then the machines are paid for" in capsys.readouterr().out


def test_a_launch_that_sky_refuses_ends_as_sky_did(write, tool, capsys):
    tool("sky", status=2)
    assert cli.main([write()]) == 2
    assert "one.yaml:7: skypilot: sky refused the job (2): " in capsys.readouterr().err


def test_without_sky_nothing_is_written(write, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([write()]) == 1
    assert "sky is not on PATH" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"),
    [
        ("cloud: aws", "region: us-east-1", 7, "", "the key 'cloud' is required"),
        ("cloud: aws", "cloud: aws\n  hf_token: hf_abc", 9, "hf_token", "a secret in clear"),
        ("cloud: aws", 'cloud: aws\n  wandb_key: "${WANDB_KEY,hf_abc}"', 9, "wandb_key", "a secret in clear"),
        ("cloud: aws", "cloud: aws\n  env_vars: {HF_TOKEN: hf_abc}", 9, "env_vars.HF_TOKEN", "secrets: [HF_TOKEN]"),
        ("cloud: aws", "cloud: aws\n  secrets: [A=hf_abc]", 9, "secrets.0", "name of an environment variable"),
        ("cloud: aws", "cloud: aws\n  secrets: [A]\n  env_vars: {A: 1}", 9, "secrets.0", "given twice"),
        ("cloud: aws", "cloud: aws\n  accelerators: 8xH100", 9, "accelerators", "a count: H100:8"),
        ("cloud: aws", "cloud: aws\n  num_nodes: 0", 9, "num_nodes", "at least 1"),
        ("cloud: aws", "cloud: aws\n  job_name: a b", 9, "job_name", "letters, digits"),
        ("cloud: aws", "cloud: aws\n  use_spot: false\n  max_restarts: 1", 10, "max_restarts", "managed: true"),
        ("cloud: aws", "cloud: aws\n  acelerators: H100", 9, "acelerators", "did you mean 'accelerators'?"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_key(write, capsys, old, new, line, key, words):
    assert cli.main([write(CONFIG.replace(old, new)), "--dry-run"]) == 2
    message = capsys.readouterr().err.removeprefix("error: ")
    assert message.startswith(f"one.yaml:{line}: skypilot{key and '.'}{key}: "), message
    assert words in message
    assert "hf_abc" not in message


def test_a_run_directory_that_is_lost_with_a_machine_is_refused(write, capsys):
    text = CONFIG.replace("/training/runs/one", "runs/one")
    assert cli.main([write(text), "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: one.yaml:2: run_dir: run_dir=runs/one is on the machine's own disk: a job that is")
    assert "use_spot: false" in error
    assert cli.main([write(text), "--dry-run", "--skypilot.use_spot", "false"]) == 0
    capsys.readouterr()
    assert cli.main([write(text), "--dry-run", "--skypilot.use_spot", "false", "--skypilot.num_nodes", "2"]) == 1
    assert "machines would not share it" in capsys.readouterr().err
    out_of_it = CONFIG.replace("/training/runs/one", "/training/../one")
    assert cli.main([write(out_of_it), "--dry-run"]) == 1
    assert "is on the machine's own disk" in capsys.readouterr().err


def test_the_shipped_config(capsys, monkeypatch, faults):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert cli.main([str(ROOT / "recipes/configs/skypilot.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "hf_abc" not in out
    assert faults(yaml.safe_load(out.partition("\n---\n")[2])) == []
