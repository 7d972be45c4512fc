"""The section that hands a run to Kubernetes; the manifests are made by `am_recipes.launch.kubernetes`."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from am_recipes.launch import kubernetes
from am_recipes.launch.job import Job, Refusal, Rendered, refusal
from am_recipes.launch.nodes import MEETING_TIMEOUT
from am_recipes.sections.kinds import NonNegativeInt, PositiveInt, Text
from am_recipes.sections.variables import require_distinct, require_texts, require_there, require_variables, texts
from am_recipes.settings import ArgumentError, Check

_LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
_DNS_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_QUANTITY = r"\+?(\d+\.?\d*|\.\d+)([kMGTPE]|[KMGTPE]i|[num]|[eE][+-]?\d+)?"
_RESOURCE = rf"({_DNS_NAME}/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?"
_TOLERATION = r"(?P<key>[\w./-]+)(=(?P<value>[\w.-]*))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
_SECRET = rf"(?P<variable>[A-Za-z_]\w*)=(?P<secret>{_DNS_NAME})/(?P<key>[-\w.]+)"
# Pods come one by one where machines are added for them and pull an image of many GB.
_SECONDS_TO_MEET = 3600
# What Kubeflow's torch policy sets itself, and refuses in a TrainJob.
_OF_THE_RUNTIME = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")

# What kubectl says of a key of ours, and what helps.
_REFUSALS = (
    Refusal(
        ("no matches for kind", "jobset"),
        "kind",
        "the cluster has no JobSet controller; install it, or set kind: trainjob",
    ),
    Refusal(
        ("no matches for kind", "trainjob"),
        "kind",
        "the cluster has no Kubeflow Trainer; install it, or set kind: jobset",
    ),
    Refusal(
        ("already exists",),
        "name",
        "delete what has the name, or choose another; without one each submission has its own",
    ),
    Refusal(("namespaces", "not found"), "namespace", "kubectl get namespaces lists what there is"),
    Refusal(
        ("trainingruntime", "not found"),
        "runtime",
        "kubectl get clustertrainingruntimes,trainingruntimes lists what there is",
    ),
    Refusal(("forbidden",), "namespace", "kubectl auth can-i create jobsets says whether you may there"),
    Refusal(("connection refused",), "", "kubectl cluster-info shows which cluster it talks to"),
)


def _check(pattern: str, rule: str, longest: int = 253) -> Check:
    return Check(lambda text: len(text) <= longest and re.fullmatch(pattern, text, re.ASCII) is not None, rule)


# Names of pods and services begin with a letter; those of what only exists in a cluster may have dots.
Label = Annotated[
    str, _check(_LABEL, "must be a DNS label: lower-case letters, digits and '-', at most 63, a letter first")
]
Name = Annotated[str, _check(_DNS_NAME, "must be a DNS name: lower-case letters, digits, '-' and '.', at most 253")]
ResourceName = Annotated[str, _check(_RESOURCE, "must be the name of a resource")]
AbsolutePath = Annotated[str, _check(r"/[^:]*", "must be an absolute path: without ':'", longest=4096)]
Quantity = Annotated[str, _check(_QUANTITY, "must be a quantity of Kubernetes: such as 500m, 64Gi or 1.5e3")]
Toleration = Annotated[str, _check(_TOLERATION, "must be a taint: KEY=VALUE:EFFECT, KEY:EFFECT or KEY")]


@dataclass(frozen=True)
class Volume:
    """A persistent volume claim in every pod."""

    claim: Name
    """Name of the PersistentVolumeClaim; with several nodes it can be mounted by many (ReadWriteMany)."""
    mount_path: AbsolutePath
    """Where it is in the pods."""
    sub_path: Text | None = None
    """A folder of the volume to mount instead of all of it."""
    read_only: bool = False
    """Whether the pods may only read it."""


@dataclass(frozen=True)
class Resources:
    """What a pod asks for and may take, as Kubernetes has it; GPUs are gpus_per_node."""

    requests: Mapping[str, Any] = field(default_factory=dict)
    """Quantities that a node has to have free: cpu, memory, ephemeral-storage and others."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Quantities that a pod cannot exceed; also of devices, such as rdma/hca."""

    def __post_init__(self) -> None:
        for kind, quantities in (("requests", self.requests), ("limits", self.limits)):
            for name, quantity in quantities.items():
                number = isinstance(quantity, (int, float)) and not isinstance(quantity, bool)
                if not number and not (isinstance(quantity, str) and re.fullmatch(_QUANTITY, quantity, re.ASCII)):
                    raise ArgumentError(
                        f"{kind}.{name}", f"must be a quantity of Kubernetes, such as 8, 500m or 64Gi, got {quantity!r}"
                    )
                if number and quantity <= 0:
                    raise ArgumentError(f"{kind}.{name}", f"must be greater than 0, got {quantity}")


@dataclass(frozen=True)
class Kubernetes:
    """Hands the run to a Kubernetes cluster: one pod for each node, submitted with kubectl."""

    image: Text
    """Container image with Python and am-recipes; paths of the config are paths in it."""
    kind: Literal["jobset", "trainjob"] = "jobset"
    """A JobSet is complete by itself; a TrainJob is run by a runtime of Kubeflow Trainer."""
    name: Label | None = None
    """Of the object; null: recipe and time of the submission."""
    namespace: Label | None = None
    """Null: kubectl's current one."""
    nodes: PositiveInt = 1
    """Pods."""
    nproc_per_node: PositiveInt | None = None
    """Processes of a pod; null: gpus_per_node, or one without GPUs."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of a pod."""
    gpu_resource: ResourceName = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    resources: Resources = field(default_factory=Resources)
    env_vars: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the pods; no secrets."""
    secrets: tuple[Text, ...] = ()
    """Variables whose value is in a Secret of the namespace: HF_TOKEN=huggingface/token."""
    volumes: tuple[Volume, ...] = ()
    hf_home: AbsolutePath | None = None
    """HF_HOME, on a volume so that models are downloaded once; null: the image's."""
    shared_memory: Quantity | None = "8Gi"
    """Most that /dev/shm may hold, of the pod's memory; null: the container runtime's 64 MB."""
    node_selector: Mapping[str, Any] = field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that do not keep the pods away, written as kubectl taint has them: nvidia.com/gpu:NoSchedule."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Labels of the object, such as kueue.x-k8s.io/queue-name."""
    service_account: Name | None = None
    """Null: the namespace's default one."""
    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets of a private registry."""
    max_restarts: NonNegativeInt | None = None
    """How often failed pods start anew (jobset; null: never); being stopped and continued does not count."""
    grace_seconds: PositiveInt = 660
    """How long a pod that is told to stop has to finish its step and commit it."""
    runtime: Name = "torch-distributed"
    """The runtime of a trainjob."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """Whether the runtime is the cluster's or the namespace's."""
    job_dir: Path = Path("kubernetes_jobs")
    """Where what was submitted is kept."""

    def __post_init__(self) -> None:
        if self.kind == "trainjob" and self.max_restarts is not None:
            raise ArgumentError(
                "max_restarts",
                f"max_restarts={self.max_restarts} cannot be said in a TrainJob, whose runtime decides; remove it, or "
                "use kind: jobset",
            )
        require_variables(
            "env_vars", self.env_vars, "make a Secret and give its name and key: secrets: [{name}=SECRET/KEY]"
        )
        self._require_distinct_variables()
        for kind, quantities in (("requests", self.resources.requests), ("limits", self.resources.limits)):
            if self.gpu_resource in quantities:
                raise ArgumentError(
                    f"resources.{kind}.{self.gpu_resource}",
                    "GPUs are gpus_per_node, which is also the number of processes; write it there",
                )
        require_texts("node_selector", self.node_selector)
        require_texts("labels", self.labels)
        mounted = [kubernetes.CONFIG_FOLDER, "/dev/shm"]
        for index, volume in enumerate(self.volumes):
            path = volume.mount_path.rstrip("/")
            if path in mounted:
                raise ArgumentError(f"volumes.{index}.mount_path", f"{path} is mounted already; choose another path")
            mounted.append(path)

    def _require_distinct_variables(self) -> None:
        variables = [("hf_home", "HF_HOME")] if self.hf_home else []
        variables += [(f"env_vars.{name}", name) for name in self.env_vars]
        variables += [(f"secrets.{index}", secret["variable"]) for index, secret in enumerate(self._secrets())]
        require_distinct(variables)
        for path, name in variables:
            if self.kind == "trainjob" and name in _OF_THE_RUNTIME:
                raise ArgumentError(path, f"{name} is set by the runtime of a TrainJob; remove it")

    def _secrets(self) -> list[re.Match[str]]:
        found = [re.fullmatch(_SECRET, text, re.ASCII) for text in self.secrets]
        for index, secret in enumerate(found):
            if secret is None:
                # What stands there is not shown: it may be the secret itself.
                raise ArgumentError(
                    f"secrets.{index}",
                    "must be VARIABLE=SECRET/KEY: a variable of the pods, and the name and key of the Secret that has "
                    "its value; a value in clear is never taken",
                )
        return [secret for secret in found if secret is not None]

    def _require_kept(self, run_dir: Path) -> None:
        """Refuse a run directory on the disk of a pod, which goes with it and which other pods do not see."""
        kept = [volume.mount_path for volume in self.volumes if not volume.read_only]
        # As a pod reads it: /volume/../x is on no volume.
        path = PurePosixPath(posixpath.normpath(run_dir))
        if not any(path.is_relative_to(mount) for mount in kept):
            raise ArgumentError(
                "run_dir",
                f"run_dir={run_dir} is not on a volume: it would go with the pod, and pods would not share it; "
                + (f"choose a path below {' or '.join(kept)}" if kept else "add one to kubernetes.volumes"),
            )

    @property
    def same_python(self) -> bool:
        """Never: the ranks run in the image."""
        return False

    def render(self, job: Job, now: int) -> Rendered:
        """The manifests of `job`, and the kubectl command that creates what they describe."""
        self._require_kept(job.run_dir)
        pods = self._pods(job, now)
        require_there(job.variables, {*pods.env, *pods.secrets}, "add it to kubernetes.env_vars or kubernetes.secrets")
        if self.kind == "jobset":
            manifest = kubernetes.job_set(pods, self.max_restarts or 0)
        else:
            manifest = kubernetes.train_job(pods, self.runtime, self.runtime_kind)
        folder, file = job.own_folder(self.job_dir, now), f"{pods.name}.yaml"
        text = kubernetes.dump([kubernetes.config_map(pods, job.config, job.text), manifest])
        return Rendered(
            folder, {job.config: job.text, file: text}, file, (*self._kubectl(), "create", "-f", str(folder / file))
        )

    def submitted(self, rendered: Rendered, output: str) -> str:
        """What kubectl has created, and how to follow and to cancel it."""
        file, name = shlex.quote(str(rendered.folder / rendered.shown)), Path(rendered.shown).stem
        kubectl = " ".join(self._kubectl())
        pods = f"jobset.sigs.k8s.io/jobset-name={name}"
        return (
            f"{output.strip()}\n"
            f"submitted {self.kind} {name}: {self.nodes} pod{'s' if self.nodes > 1 else ''}\n"
            f"  follow  {kubectl} logs -f --tail=-1 -l {pods},batch.kubernetes.io/job-completion-index=0\n"
            f"  state   {kubectl} get {self.kind} {name}; {kubectl} get pods -l {pods}\n"
            f"  cancel  {kubectl} delete -f {file}\n"
            f"  files   {rendered.folder}"
        )

    def refused(self, errors: str) -> tuple[str, str]:
        """Which key kubectl may mean by its complaint, empty for none, and what helps."""
        return refusal(
            _REFUSALS,
            errors,
            "kubectl explain jobset (or trainjob) has the fields; kubectl auth can-i create jobsets what you may",
        )

    def _kubectl(self) -> tuple[str, ...]:
        return ("kubectl", *(("-n", self.namespace) if self.namespace else ()))

    def _pods(self, job: Job, now: int) -> kubernetes.Pods:
        name = self.name or f"{re.sub(r'[^a-z0-9]+', '-', job.name.lower()).strip('-')}-{now}"
        gpus = {self.gpu_resource: self.gpus_per_node} if self.gpus_per_node else {}
        home = {"HF_HOME": self.hf_home} if self.hf_home else {}
        meeting = {MEETING_TIMEOUT: str(_SECONDS_TO_MEET)} if self.nodes > 1 else {}
        return kubernetes.Pods(
            name=name,
            image=self.image,
            command=("python", *job.program, "-c", f"{kubernetes.CONFIG_FOLDER}/{job.config}", *job.arguments),
            nodes=self.nodes,
            processes=job.processes or self.nproc_per_node or self.gpus_per_node or 1,
            grace_seconds=self.grace_seconds,
            namespace=self.namespace,
            labels=self.labels,
            # Lines of the log come as they are written.
            env={"PYTHONUNBUFFERED": "1"} | meeting | home | texts(self.env_vars),
            secrets={secret["variable"]: (secret["secret"], secret["key"]) for secret in self._secrets()},
            requests=self.resources.requests,
            limits=gpus | dict(self.resources.limits),
            claims=[
                kubernetes.Claim(volume.claim, volume.mount_path, volume.sub_path, volume.read_only)
                for volume in self.volumes
            ],
            shared_memory=self.shared_memory,
            node_selector=self.node_selector,
            tolerations=[_toleration(text) for text in self.tolerations],
            service_account=self.service_account,
            image_pull_secrets=self.image_pull_secrets,
        )


def _toleration(text: str) -> dict[str, str]:
    """`KEY=VALUE:EFFECT` as Kubernetes has it; without an effect all of them, without a value any."""
    taint = re.fullmatch(_TOLERATION, text, re.ASCII)
    assert taint is not None
    operator = {"operator": "Exists"} if taint["value"] is None else {"operator": "Equal", "value": taint["value"]}
    return {"key": taint["key"]} | operator | ({"effect": taint["effect"]} if taint["effect"] else {})
