"""Manifests for Kubernetes: a JobSet that is complete by itself, or a TrainJob of Kubeflow Trainer.

Both run one pod for each node. In it `python -m am_recipes.RECIPE --nnodes ...` starts torchrun, whose own exit status
would be 1 whatever its workers returned. The rendezvous is the first pod, by the name that the headless service gives
it. Pure functions from values to mappings: a section of a config makes the `Pods`, `dump` the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from am_recipes.launch.nodes import PREEMPTED

# Kubeflow's names for the job and the container of the trainer; taken for both kinds, so that one way of asking works.
NODE = "node"
CONFIG_FOLDER = "/etc/automodel"
# The port of Kubeflow's torch runtime, which a TrainJob cannot choose.
PORT = 29500
# `<name>-node-0-<index>-<five letters>` is the name of a pod and may have 63 characters.
_LONGEST_POD = 63
# What may stand in YAML without quotes for every reader of it; PyYAML's own choice leaves 1e3 and y without.
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*[A-Za-z0-9_/]")


@dataclass(frozen=True)
class Claim:
    """A persistent volume claim in every pod."""

    name: str
    path: str
    sub_path: str | None = None
    read_only: bool = False


@dataclass(frozen=True)
class Pods:
    """What runs, the same on every node.

    Args:
        name: of the object, and of the ConfigMap with the config.
        command: before the options of the launch, with `-c` and the path of the config in the pod.
        processes: ranks of a pod.
        env, secrets: variables with their value, and with the name and key of the Secret that has it.
        requests, limits: resources of a pod, by name.
        shared_memory: size of /dev/shm; None leaves the container runtime's 64 MB.
        grace_seconds: between SIGTERM and SIGKILL.
    """

    name: str
    image: str
    command: Sequence[str]
    nodes: int
    processes: int
    grace_seconds: int
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    requests: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    shared_memory: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, str]] = ()
    service_account: str | None = None
    image_pull_secrets: Sequence[str] = ()

    def __post_init__(self) -> None:
        longest = len(f"{self.name}-{NODE}-0-{self.nodes - 1}-abcde")
        if longest > _LONGEST_POD:
            most = len(self.name) - (longest - _LONGEST_POD)
            raise ValueError(
                f"name={self.name} has {len(self.name)} characters, and the pods' names would have {longest} of at "
                f"most {_LONGEST_POD}; choose one of at most {most}",
            )


def config_map(pods: Pods, config: str, text: str) -> dict[str, Any]:
    """The ConfigMap with the config file, which is named as `config` is."""
    if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", config):
        raise ValueError(
            f"the file name {config!r} cannot be a key of a ConfigMap: letters, digits, '-', '_' and '.'; rename it"
        )
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(pods), "data": {config: text}}


def job_set(pods: Pods, max_restarts: int) -> dict[str, Any]:
    """A JobSet that starts all pods anew when one of them has failed, `max_restarts` times.

    Pods that end with 75, or that the cluster takes away (preemption, drain, a lost node), start it anew without being
    counted: the Job fails with the reason PodFailurePolicy, for which the JobSet has a rule of its own.
    """
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    exit_codes = {"containerName": NODE, "operator": "In", "values": [PREEMPTED]}
    again = {
        "name": "stopped",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    job = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": exit_codes},
                {"action": "FailJob", "onPodConditions": disrupted},
            ]
        },
        "template": {"spec": _pod(pods)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(pods),
        "spec": {
            "failurePolicy": {"maxRestarts": max_restarts, "rules": [again]},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": job}}],
        },
    }


def train_job(pods: Pods, runtime: str, runtime_kind: str) -> dict[str, Any]:
    """A TrainJob against a runtime of the cluster, which decides how often pods that have failed start anew.

    The runtime's torch policy tells each pod by its variables which node it is and where the first one is.
    """
    trainer = {
        "image": pods.image,
        "command": _command(pods, "$(PET_NODE_RANK)", "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"),
        "numNodes": pods.nodes,
        "numProcPerNode": pods.processes,
        "resourcesPerNode": _resources(pods),
        "env": _env(pods),
    }
    container = {"name": NODE, "volumeMounts": _mounts(pods)}
    patch = {"name": NODE, "template": {"spec": {"template": {"spec": _placed(pods) | {"containers": [container]}}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(pods),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": runtime_kind, "name": runtime},
            "trainer": _without_empty(trainer),
            "runtimePatches": [
                {
                    "manager": "automodel.am-recipes/launch",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                }
            ],
        },
    }


def dump(documents: Iterable[Mapping[str, Any]]) -> str:
    """One YAML file: what spans lines as a block, and in quotes what not every reader of YAML takes for text."""
    return "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000) for document in documents
    )


def escaped(text: str) -> str:
    """A word of a command or the value of a variable that Kubernetes passes on as `text`, which may have `$(NAME)`."""
    return text.replace("$", "$$")


def _command(pods: Pods, rank: str, endpoint: str) -> list[str]:
    several = ["--nnodes", str(pods.nodes), "--node-rank", rank, "--rdzv-endpoint", endpoint]
    options = [*(several if pods.nodes > 1 else []), "--nproc-per-node", str(pods.processes)]
    return [*map(escaped, pods.command), *options]


def _metadata(pods: Pods) -> dict[str, Any]:
    return _without_empty({"name": pods.name, "namespace": pods.namespace, "labels": dict(pods.labels)})


def _pod(pods: Pods) -> dict[str, Any]:
    container = {
        "name": NODE,
        "image": pods.image,
        # JOB_COMPLETION_INDEX is in every pod of an indexed Job.
        "command": _command(pods, "$(JOB_COMPLETION_INDEX)", f"{pods.name}-{NODE}-0-0.{pods.name}:{PORT}"),
        "env": _env(pods),
        "resources": _resources(pods),
        "volumeMounts": _mounts(pods),
    }
    return {"restartPolicy": "Never"} | _placed(pods) | {"containers": [_without_empty(container)]}


def _placed(pods: Pods) -> dict[str, Any]:
    """What of a pod is no matter of its container."""
    return _without_empty(
        {
            "terminationGracePeriodSeconds": pods.grace_seconds,
            "serviceAccountName": pods.service_account,
            "imagePullSecrets": [{"name": name} for name in pods.image_pull_secrets],
            "nodeSelector": dict(pods.node_selector),
            "tolerations": [dict(toleration) for toleration in pods.tolerations],
            "volumes": _volumes(pods),
        }
    )


def _resources(pods: Pods) -> dict[str, Any]:
    return _without_empty({"requests": dict(pods.requests), "limits": dict(pods.limits)})


def _env(pods: Pods) -> list[dict[str, Any]]:
    values = [{"name": name, "value": escaped(value)} for name, value in pods.env.items()]
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for name, (secret, key) in pods.secrets.items()
    ]
    return [*values, *secrets]


def _volumes(pods: Pods) -> list[dict[str, Any]]:
    claims = [
        {"name": volume, "persistentVolumeClaim": {"claimName": claim}}
        for claim, volume in _claim_volumes(pods).items()
    ]
    volumes = [{"name": "automodel-config", "configMap": {"name": pods.name}}, *claims]
    if pods.shared_memory is not None:
        memory = {"medium": "Memory", "sizeLimit": pods.shared_memory}
        volumes.append({"name": "automodel-shared-memory", "emptyDir": memory})
    return volumes


def _mounts(pods: Pods) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [{"name": "automodel-config", "mountPath": CONFIG_FOLDER, "readOnly": True}]
    volumes = _claim_volumes(pods)
    for claim in pods.claims:
        optional = {"subPath": claim.sub_path, "readOnly": True if claim.read_only else None}
        mounts.append({"name": volumes[claim.name], "mountPath": claim.path} | _without_empty(optional))
    if pods.shared_memory is not None:
        mounts.append({"name": "automodel-shared-memory", "mountPath": "/dev/shm"})
    return mounts


def _claim_volumes(pods: Pods) -> dict[str, str]:
    """The name of the volume of each claim, whose own name may be no label: longer, and with dots."""
    names = dict.fromkeys(claim.name for claim in pods.claims)
    return {name: f"automodel-claim-{index}" for index, name in enumerate(names)}


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, "", [], {}, ())}


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: a mapping that stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
