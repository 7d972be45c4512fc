"""What Kubernetes is given: manifests against the published models, what runs in the pods, and what is refused."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api import models

from am_recipes import cli, command_line, configs
from am_recipes.launch import PREEMPTED, Nodes, kubernetes

ROOT = Path(__file__).parents[2]
CONFIG = """\
recipe: sft
run_dir: /training/runs/one
model: {name_or_path: some/model}
dataset: {path: /training/rows.jsonl}
optimizer: {lr: 1e-4}
step_scheduler: {max_steps: 10}
kubernetes:
  image: ghcr.io/example/automodel:1.0
  name: one
  nodes: 2
  gpus_per_node: 8
  volumes: [{claim: training, mount_path: /training}]
"""
EVERYTHING = """\
  kind: KIND
  namespace: research
  gpu_resource: amd.com/gpu
  resources:
    requests: {cpu: 1.5, memory: 64Gi, ephemeral-storage: 1e9}
    limits: {memory: 128Gi, rdma/hca: 1}
  env_vars: {NCCL_DEBUG: INFO, OMP_NUM_THREADS: 8, ODD: "1e3 $(HOME) yes"}
  secrets: [HF_TOKEN=hugging.face/token, WANDB_API_KEY=wandb/api.key]
  hf_home: /training/huggingface
  shared_memory: 16Gi
  node_selector: {cloud.example.com/gpu: h100}
  tolerations: ["nvidia.com/gpu:NoSchedule", "spot=yes:NoExecute", taken]
  labels: {kueue.x-k8s.io/queue-name: team}
  service_account: trainer
  image_pull_secrets: [registry]
  grace_seconds: 300
"""
MODELS = {
    "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}


def unknown(document):
    """The fields that the published model of the document's kind does not know; raises where a value has no place."""
    known = MODELS[document["kind"]].from_dict(document).to_dict()
    return list(lost(document, json.loads(json.dumps(known)), document["kind"]))


def lost(given, known, path):
    # The models drop what they do not know, so it is missing on the way back.
    if isinstance(given, dict):
        for key, value in given.items():
            yield from lost(value, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}"]
    elif isinstance(given, list):
        assert len(given) == len(known), path
        for index, pair in enumerate(zip(given, known)):
            yield from lost(*pair, f"{path}.{index}")
    else:
        assert given == known, path


def expanded(word, variables):
    """A word of a command as a container gets it: $$ is a dollar, $(NAME) a variable where there is one."""
    names = "|".join(map(re.escape, variables))
    return re.sub(rf"\$(\$|\(({names})\))", lambda m: "$" if m[1] == "$" else variables[m[2]], word)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text=CONFIG, name="one.yaml"):
        Path(name).write_text(text)
        return name

    return write


@pytest.fixture
def rendered(write, capsys):
    """The documents that a dry run shows."""

    def rendered(text=CONFIG, *arguments):
        assert cli.main([write(text), "--dry-run", *arguments]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out.partition("\n---\n# kubectl ")[2]
        return list(yaml.safe_load_all("# " + shown))

    return rendered


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A kubectl on PATH that writes down how it was called and ends as it is told."""

    def kubectl(says="", complains="", status=0):
        tool = tmp_path / "bin" / "kubectl"
        tool.parent.mkdir(exist_ok=True)
        lines = (
            "#!/bin/sh",
            f'echo "$PWD" "$@" > "{tmp_path}/called"',
            f'printf "{says}"',
            f'printf "{complains}" >&2',
        )
        tool.write_text("\n".join([*lines, f"exit {status}\n"]))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")

    return kubectl


def everything(kind):
    return CONFIG + EVERYTHING.replace("KIND", kind) + ("  max_restarts: 3\n" if kind == "jobset" else "")


def pod_of(document):
    """The pod and its container, of either kind."""
    if document["kind"] == "JobSet":
        pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        return pod, pod["containers"][0]
    (patch,) = document["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod, trainer = job["template"]["spec"]["template"]["spec"], document["spec"]["trainer"]
    return pod, pod["containers"][0] | trainer | {"resources": trainer["resourcesPerNode"]}


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_published_models_know_every_field(rendered, kind, nodes):
    for text in (CONFIG, everything(kind)):
        documents = rendered(text, "--kubernetes.kind", kind, "--kubernetes.nodes", nodes)
        assert [document["kind"].lower() for document in documents] == ["configmap", kind]
        assert [unknown(document) for document in documents] == [[], []]


def test_a_field_that_nobody_knows_would_be_noticed(rendered):
    _, document = rendered(everything("jobset"))
    pod, container = pod_of(document)
    container["resources"]["request"] = {"cpu": 1}
    pod["tolerations"][0]["efect"] = "NoSchedule"
    pod_path = "JobSet.spec.replicatedJobs.0.template.spec.template.spec"
    assert unknown(document) == [f"{pod_path}.tolerations.0.efect", f"{pod_path}.containers.0.resources.request"]
    container["command"] = "python"
    with pytest.raises(ValueError, match="command"):
        unknown(document)


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_every_key_of_the_section_is_where_kubernetes_looks_for_it(rendered, kind):
    _, document = rendered(everything(kind))
    pod, container = pod_of(document)
    assert document["metadata"] == {
        "name": "one", "namespace": "research", "labels": {"kueue.x-k8s.io/queue-name": "team"},
    }  # fmt: skip
    assert container["image"] == "ghcr.io/example/automodel:1.0"
    assert container["resources"] == {
        "requests": {"cpu": 1.5, "memory": "64Gi", "ephemeral-storage": 1e9},
        "limits": {"amd.com/gpu": 8, "memory": "128Gi", "rdma/hca": 1},
    }
    assert {entry["name"]: entry.get("value") or entry["valueFrom"]["secretKeyRef"] for entry in container["env"]} == {
        "PYTHONUNBUFFERED": "1",
        "AUTOMODEL_MEETING_TIMEOUT": "3600",
        "HF_HOME": "/training/huggingface",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "8",
        "ODD": "1e3 $$(HOME) yes",
        "HF_TOKEN": {"name": "hugging.face", "key": "token"},
        "WANDB_API_KEY": {"name": "wandb", "key": "api.key"},
    }
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/etc/automodel"]]["configMap"] == {"name": "one"}
    assert volumes[mounts["/training"]]["persistentVolumeClaim"] == {"claimName": "training"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert pod["nodeSelector"] == {"cloud.example.com/gpu": "h100"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoExecute"},
        {"key": "taken", "operator": "Exists"},
    ]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["terminationGracePeriodSeconds"] == 300


def test_one_claim_may_be_mounted_in_parts(rendered):
    parts = "[{claim: a.b, mount_path: /training}, {claim: a.b, mount_path: /data, sub_path: x/y, read_only: true}]"
    documents = rendered(CONFIG.replace("[{claim: training, mount_path: /training}]", parts))
    assert [unknown(document) for document in documents] == [[], []]
    pod, container = pod_of(documents[1])
    claims = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert [claim["persistentVolumeClaim"]["claimName"] for claim in claims] == ["a.b"]
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] == claims[0]["name"]]
    assert mounts[1] == {"name": claims[0]["name"], "mountPath": "/data", "subPath": "x/y", "readOnly": True}


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_each_pod_runs_the_command_that_starts_a_node_by_hand(rendered, write, kind):
    odd = 'cost $5, $(HOME) and "quotes"'
    config, document = rendered(CONFIG, "--kubernetes.kind", kind, "--generate.prompts.0", odd, "--optimizer.lr=2e-4")
    _, container = pod_of(document)
    # What a pod has: of an indexed Job, and of the torch policy of Kubeflow Trainer.
    variables = {"HOME": "/root", "JOB_COMPLETION_INDEX": "1", "PET_NODE_RANK": "1"}
    variables |= {"PET_MASTER_ADDR": "one-node-0-0.one", "PET_MASTER_PORT": "29500"}
    command = [expanded(word, variables) for word in container["command"]]
    assert command[:5] == ["python", "-m", "am_recipes.sft", "-c", "/etc/automodel/one.yaml"]
    arguments = command_line.parse_arguments(command[3:])
    assert arguments.nodes == Nodes(2, 1, "one-node-0-0.one", 29500)
    assert arguments.processes == 8
    inside = configs.parse(write(config["data"]["one.yaml"], "copy.yaml"), arguments.overrides)
    assert inside.kubernetes is None
    assert inside.optimizer.lr == 2e-4
    assert inside.generate.prompts == (odd,)


def test_one_node_needs_no_rendezvous(rendered):
    _, document = rendered(CONFIG, "--kubernetes.nodes", "1", "--kubernetes.gpus_per_node", "0")
    _, container = pod_of(document)
    arguments = command_line.parse_arguments(container["command"][3:])
    assert (arguments.nodes, arguments.processes) == (None, 1)
    assert "resources" not in container


def test_the_config_arrives_as_it_was_written(rendered):
    text = CONFIG + "# a\ttab, a space at the end \n# 1e3: yes, ünïcode\n\n---\n".replace("---\n", "# ---\n")
    config, _ = rendered(text)
    assert config["data"]["one.yaml"] == text


def test_a_run_that_was_stopped_starts_again_without_being_counted(rendered):
    _, document = rendered(CONFIG, "--kubernetes.max_restarts", "4")
    spec = document["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    # Such a pod fails its Job with the reason PodFailurePolicy; any other failure has the reason BackoffLimitExceeded.
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [PREEMPTED]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    assert job["backoffLimit"] == 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 4
    pod, _ = pod_of(document)
    # A pod failure policy needs it.
    assert pod["restartPolicy"] == "Never"
    # The launcher gives its ranks ten minutes.
    assert pod["terminationGracePeriodSeconds"] > 600


def test_without_a_name_each_submission_has_its_own(rendered):
    config, document = rendered(CONFIG.replace("  name: one\n", ""))
    assert re.fullmatch(r"llm-finetune-\d{10}", document["metadata"]["name"])
    assert config["metadata"]["name"] == document["metadata"]["name"]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"),
    [
        ("image: ghcr.io/example/automodel:1.0", "kind: jobset", 7, "", "the key 'image' is required"),
        ("name: one", "name: My_Run", 9, "name", "DNS label"),
        ("name: one", "name: 1st", 9, "name", "a letter first"),
        ("name: one", f"name: {'a' * 50}", 9, "name", "choose one of at most 48"),
        ("nodes: 2", "nodes: 0", 10, "nodes", "at least 1"),
        ("nodes: 2", "shared_memory: 10Gb", 10, "shared_memory", "quantity of Kubernetes"),
        ("nodes: 2", "resources:\n    requests:\n      memory: 10Gb", 12, "resources.requests.memory", "got '10Gb'"),
        ("nodes: 2", "resources:\n    limits: {cpu: 0}", 11, "resources.limits.cpu", "greater than 0, got 0"),
        ("nodes: 2", "resources: {limits: {nvidia.com/gpu: 4}}", 10, "resources.limits.nvidia.com/gpu", "gpus_"),
        ("nodes: 2", "resources: {limit: {}}", 10, "resources.limit", "did you mean 'limits'?"),
        ("nodes: 2", "env_vars:\n    A: 1\n    HF_TOKEN: hf_abc", 12, "env_vars.HF_TOKEN", "[HF_TOKEN=SECRET/KEY]"),
        ("nodes: 2", "env_vars: {A-B: 1}", 10, "env_vars.A-B", "environment variable"),
        ("nodes: 2", "env_vars: {A: true}", 10, "env_vars.A", "in quotes"),
        ("nodes: 2", "secrets:\n    - HF_TOKEN=hf_abc", 11, "secrets.0", "VARIABLE=SECRET/KEY"),
        ("nodes: 2", "secrets: [A=b/c, A=b/d]", 10, "secrets.1", "given twice"),
        ("nodes: 2", "node_selector: {pool: 1}", 10, "node_selector.pool", "must be text, got 1"),
        ("nodes: 2", "tolerations: ['a b']", 10, "tolerations.0", "must be a taint"),
        ("mount_path: /training", "mount_path: training", 12, "volumes.0.mount_path", "absolute"),
        ("mount_path: /training", "mount_path: /dev/shm", 12, "volumes.0.mount_path", "mounted already"),
        ("nodes: 2", "kind: trainjob\n  max_restarts: 3", 11, "max_restarts", "use kind: jobset"),
        ("nodes: 2", "kind: trainjob\n  env_vars: {PET_NNODES: 2}", 11, "env_vars.PET_NNODES", "set by the runtime"),
        ("nodes: 2", "kind: pytorchjob", 10, "kind", "must be one of 'jobset', 'trainjob'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_line_and_key(write, capsys, old, new, line, key, words):
    assert old in CONFIG
    assert cli.main([write(CONFIG.replace(old, new)), "--dry-run"]) in (1, 2)
    message = capsys.readouterr().err.removeprefix("error: ")
    assert message.startswith(f"one.yaml:{line}: kubernetes{key and '.'}{key}: "), message
    assert words in message
    assert "hf_abc" not in message


def test_a_run_directory_that_goes_with_the_pod_is_refused(write, capsys):
    for run_dir in ("runs/one", "/trainings/one", "/training/../one"):
        assert cli.main([write(CONFIG.replace("/training/runs/one", run_dir)), "--dry-run"]) == 1
        message = f"error: one.yaml:2: run_dir: run_dir={run_dir} is not on a volume"
        assert capsys.readouterr().err.startswith(message)


def test_two_launchers_are_one_too_many(write, capsys):
    assert cli.main([write(f"{CONFIG}skypilot: {{cloud: aws}}\n"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("one.yaml:13: skypilot: kubernetes hands the run to a scheduler too")


@pytest.mark.parametrize(
    "override",
    [
        "--dataset.token=12345678",
        "--dataset.auth=[{token: 1.5}]",
        "--kubernetes.env_vars.DB_URL=postgres://u:token@h/db",
        "--dataset.uri=https://token@h/rows",
    ],
)
def test_a_number_or_an_address_may_be_a_secret_too(write, capsys, override):
    text = CONFIG.replace("{path: /training/rows.jsonl}", "{_target_: mine.Rows}")
    assert cli.main([write(text), "--dry-run", override]) == 2
    errors = capsys.readouterr().err
    assert re.search(": a secret in clear|: has a password in clear", errors)
    assert override.partition("=")[2] not in errors


def test_no_secret_of_the_config_goes_to_the_cluster(write, capsys, monkeypatch):
    text = CONFIG.replace("{path: /training/rows.jsonl}", "{_target_: mine.Rows, api_key: abc123}")
    assert cli.main([write(text), "--dry-run"]) == 2
    errors = capsys.readouterr().err
    assert "one.yaml:4: dataset.api_key: a secret in clear" in errors
    assert "abc123" not in errors
    monkeypatch.setenv("ROWS_KEY", "abc123")
    text = text.replace("abc123", '"${ROWS_KEY}"')
    assert cli.main([write(text), "--dry-run"]) == 1
    assert "one.yaml:4: dataset.api_key: the environment variable ROWS_KEY is not set" in capsys.readouterr().err
    assert cli.main([write(f"{text}  secrets: [ROWS_KEY=rows/key]\n"), "--dry-run"]) == 0
    assert "abc123" not in capsys.readouterr().out


def test_kubectl_gets_the_file_and_how_to_go_on_is_told(write, kubectl, capsys, tmp_path):
    kubectl(says="configmap/one created\\njobset.jobset.x-k8s.io/one created\\n")
    assert cli.main([write(everything("jobset"))]) == 0
    told = capsys.readouterr().out
    (folder,) = (tmp_path / "kubernetes_jobs").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["one.yaml"]
    assert [document["kind"] for document in yaml.safe_load_all((folder / "one.yaml").read_text())] == [
        "ConfigMap",
        "JobSet",
    ]
    assert (tmp_path / "called").read_text() == f"{tmp_path} -n research create -f {folder}/one.yaml\n"
    assert "jobset.jobset.x-k8s.io/one created" in told
    assert "kubectl -n research logs -f --tail=-1 -l jobset.sigs.k8s.io/jobset-name=one" in told
    assert f"kubectl -n research delete -f {folder}/one.yaml" in told


@pytest.mark.parametrize(
    ("complaint", "place"),
    [
        ("no matches for kind JobSet in version jobset.x-k8s.io/v1alpha2", "one.yaml:7: kubernetes.kind: "),
        ("jobsets.jobset.x-k8s.io one already exists", "one.yaml:9: kubernetes.name: "),
        ("something else", "one.yaml:7: kubernetes: "),
    ],
)
def test_what_kubectl_refuses_is_passed_on_with_its_status(write, kubectl, capsys, complaint, place):
    kubectl(complains=f"error: {complaint}", status=3)
    assert cli.main([write()]) == 3
    errors = capsys.readouterr().err
    assert complaint in errors
    assert f"{place}kubectl refused the job (3): " in errors


def test_without_kubectl_nothing_is_written(write, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([write()]) == 1
    assert "kubectl is not on PATH" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one.yaml"]


def test_a_file_name_that_no_config_map_takes(write, capsys):
    assert cli.main([write(name="my config.yaml"), "--dry-run"]) == 1
    assert "'my config.yaml' cannot be a key of a ConfigMap" in capsys.readouterr().err


def test_text_that_some_readers_of_yaml_take_for_something_else_is_quoted():
    odd = ["1e3", "y", "no", "on", "0x10", "1_000", "12:30", "~", "null", "", "2026-11-29", "=", "a: b", "# c", "- d"]
    text = kubernetes.dump([{"values": odd}])
    assert yaml.safe_load(text)["values"] == odd
    for line in text.splitlines()[1:]:
        assert line.removeprefix("- ")[0] in "'\"", line


@pytest.fixture
def api_server(tmp_path, monkeypatch):
    """What a kubectl sends to a cluster, which here only says which kinds it has and takes everything."""
    kinds = {"jobset.x-k8s.io/v1alpha2": "JobSet", "trainer.kubeflow.org/v1alpha1": "TrainJob"}
    versions = [{"groupVersion": group, "version": group.partition("/")[2]} for group in kinds]
    groups = [{"name": v["groupVersion"].partition("/")[0], "versions": [v], "preferredVersion": v} for v in versions]
    answers = {"/api": {"kind": "APIVersions", "versions": ["v1"]}, "/apis": {"kind": "APIGroupList", "groups": groups}}
    for group, kind in {"v1": "ConfigMap", **kinds}.items():
        resource = {"name": f"{kind.lower()}s", "namespaced": True, "kind": kind, "verbs": ["create"]}
        path = "/api/v1" if group == "v1" else f"/apis/{group}"
        answers[path] = {"kind": "APIResourceList", "groupVersion": group, "resources": [resource]}
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            self.answer(200, answers[path]) if path in answers else self.answer(404, {"kind": "Status", "code": 404})

        def do_POST(self):
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(201, sent[-1])

        def answer(self, status, values):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cluster = {"name": "a", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        context = {"name": "a", "context": {"cluster": "a", "user": "a"}}
        config = {"clusters": [cluster], "contexts": [context], "current-context": "a"}
        (tmp_path / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config"} | config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield sent
        server.shutdown()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_a_real_kubectl_reads_and_sends_what_was_meant(rendered, api_server, kind):
    odd = [
        "y",
        "no",
        "off",
        "1e3",
        "0x10",
        "0o17",
        "017",
        "1_000",
        "12:30",
        "~",
        " a ",
        "a: b #c",
        "2026-11-29",
        "=",
        "",
    ]
    variables = ", ".join(f"V{number}: {json.dumps(value)}" for number, value in enumerate(odd))
    text = f"{everything(kind).replace('{NCCL_DEBUG', '{' + variables + ', NCCL_DEBUG')}# \ttab, ünïcode, space \n"
    documents = rendered(text)
    _, container = pod_of(documents[1])
    assert [entry["value"] for entry in container["env"] if entry["name"].startswith("V")] == odd
    Path("sent.yaml").write_text(kubernetes.dump(documents))
    # It knows the kinds by asking, and would check fields against an OpenAPI document of the cluster.
    subprocess.run(["kubectl", "create", "--validate=false", "-f", "sent.yaml"], check=True, timeout=60)
    assert api_server == documents
    assert api_server[0]["data"]["one.yaml"] == text


def test_the_shipped_config_and_the_runtime_of_the_guide(capsys):
    assert cli.main([str(ROOT / "recipes/configs/kubernetes.yaml"), "--dry-run"]) == 0
    for document in yaml.safe_load_all(capsys.readouterr().out.partition("\n---\n")[2]):
        assert unknown(document) == []
    guide = (ROOT / "docs/kubernetes.md").read_text()
    (runtime,) = [block for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "TrainingRuntime" in block]
    assert unknown(yaml.safe_load(runtime)) == []
