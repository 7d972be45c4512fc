"""A pod of Kubernetes and a machine of SkyPilot, both here: what each is given trains, as two ranks of one run do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from am_recipes import configs, submission
from am_testing import free_port
from integration_tests import runs
from integration_tests.test_resume import CONFIG, SHORT

KUBERNETES = (
    "{kind: trainjob, image: none, name: one, nodes: 2, nproc_per_node: 1, volumes: [{claim: a, mount_path: %s}]}"
)
SKYPILOT = "{cloud: kubernetes, num_nodes: 2, nproc_per_node: 1, master_port: %d, volumes: {%s: a}}"


def given(target: Path, section: str, text: str) -> tuple[list[dict], str]:
    """The documents that a section makes of the tiny config, and the config that goes with them."""
    overrides = (("run_dir", str(target)), *SHORT.items(), (section, text))
    asked = submission.Asked(CONFIG, overrides, (), "am_recipes.sft", None)
    rendered = submission.rendered(configs.parse(CONFIG, overrides), asked)
    return list(yaml.safe_load_all(rendered.files[rendered.shown])), rendered.files[CONFIG.name]


def test_a_pod_and_a_rented_machine_train_one_run(tmp_path: Path) -> None:
    whole = runs.train(tmp_path, "whole", CONFIG, SHORT, world_size=2)
    target, port = tmp_path / "run", free_port()
    (config_map, train_job), _ = given(target, "kubernetes", KUBERNETES % tmp_path)
    (task,), text = given(target, "skypilot", SKYPILOT % (port, tmp_path))
    # The folder of the ConfigMap, and the home of the machine.
    for folder, content in (("pod", config_map["data"][CONFIG.name]), ("automodel_job", text)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / CONFIG.name).write_text(content)
    # What Kubeflow's torch policy sets in a pod, which torchrun reads too.
    pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "0"}
    pod |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    command = [
        word.replace("/etc/automodel", str(tmp_path / "pod")) for word in train_job["spec"]["trainer"]["command"]
    ]
    for name, value in pod.items():
        command = [word.replace(f"$({name})", value) for word in command]
    machine = {"HOME": str(tmp_path), "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    processes = []
    for words, variables, output in zip((command, ["bash", "-c", task["run"]]), (pod, machine), outputs, strict=True):
        with output.open("w") as stream:
            environment = os.environ | path | variables
            processes.append(subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=stream, stderr=stream))
    assert [process.wait(180) for process in processes] == [0, 0], [output.read_text() for output in outputs]
    runs.assert_same_run(target, whole)
