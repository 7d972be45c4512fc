"""The section that hands a run to SkyPilot; the task is made by `am_recipes.launch.skypilot`."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from am_recipes.launch import kubernetes, skypilot
from am_recipes.launch.job import Job, Refusal, Rendered, refusal
from am_recipes.sections.kinds import NonNegativeInt, PositiveInt, Text
from am_recipes.sections.variables import VARIABLE, require_distinct, require_there, require_variables, texts
from am_recipes.settings import ArgumentError, AsWritten, Check, variable

_ACCELERATORS = r"[A-Za-z][\w.-]*(:\d+)?"

# What sky says of a key of ours, and what helps.
_REFUSALS = (
    Refusal(
        ("is not set in local environment",),
        "secrets",
        "sky takes secrets from the environment it is called in; export them",
    ),
    Refusal(("invalid region",), "region", "sky gpus list --all-regions shows where there is what"),
    Refusal(("invalid zone",), "zone", "sky gpus list --all-regions shows where there is what"),
)

JobName = Annotated[
    str,
    Check(
        lambda text: re.fullmatch(r"[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?", text) is not None,
        "must be a name for SkyPilot: letters, digits, '-', '_' and '.', a letter first, a letter or digit last",
    ),
]
Accelerators = Annotated[
    str,
    Check(
        lambda text: re.fullmatch(_ACCELERATORS, text) is not None, "must be a name, with or without a count: H100:8"
    ),
]
Port = Annotated[int, Check(lambda port: 1024 <= port <= 65535, "must be in 1024 to 65535")]


@dataclass(frozen=True)
class SkyPilot:
    """Hands the run to SkyPilot, which rents machines of a cloud: submitted with sky."""

    cloud: Text
    """aws, gcp, azure, kubernetes, lambda, ...: what `sky check` lists."""
    accelerators: Accelerators | None = None
    """GPUs of a machine; null: T4:1, or what instance_type has."""
    num_nodes: PositiveInt = 1
    """Machines."""
    use_spot: bool = True
    """Cheaper machines that the cloud may take back."""
    disk_size: PositiveInt = 100
    """Of a machine, in GB."""
    instance_type: Text | None = None
    """The cloud's name of a machine; null: the cheapest with the accelerators."""
    region: Text | None = None
    """Null: any."""
    zone: Text | None = None
    """Null: any."""
    job_name: JobName | None = None
    """Of the job or cluster; null: by the recipe."""
    setup: Text | None = None
    """Shell commands run once on each machine, such as pip install am-recipes."""
    hf_home: Text | None = None
    """HF_HOME on the machines."""
    hf_token: Annotated[str, AsWritten()] | None = None
    """HF_TOKEN of the machines: a reference to a variable here, ${HF_TOKEN}."""
    wandb_key: Annotated[str, AsWritten()] | None = None
    """WANDB_API_KEY of the machines: a reference to a variable here, ${WANDB_API_KEY}."""
    env_vars: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the machines; no secrets."""
    secrets: tuple[Text, ...] = ()
    """Names of further variables that sky takes from the environment here."""
    workdir: Text | None = "."
    """Folder copied to the machines, in which the run starts; null: none."""
    file_mounts: Mapping[str, Any] = field(default_factory=dict)
    """Path there to path here, to a bucket, or to a mapping, as SkyPilot has it."""
    volumes: Mapping[str, Any] = field(default_factory=dict)
    """Path there to the name of a SkyPilot volume."""
    image_id: Text | None = None
    """An image of the cloud, or docker:IMAGE."""
    nproc_per_node: PositiveInt | None = None
    """Processes of a machine; null: one for each GPU."""
    managed: bool | None = None
    """Whether SkyPilot watches over the job and continues it elsewhere when a machine is lost; null: as use_spot."""
    max_restarts: NonNegativeInt = 0
    """How often a managed job that failed starts anew; being stopped and continued does not count."""
    master_port: Port = 29500
    """Of the rendezvous, on the first machine."""
    job_dir: Path = Path("skypilot_jobs")
    """Where what was submitted is kept."""

    def __post_init__(self) -> None:
        require_variables(
            "env_vars", self.env_vars, "name it in secrets: [{name}], and sky takes it from the environment"
        )
        for index, name in enumerate(self.secrets):
            if VARIABLE.fullmatch(name) is None:
                # What stands there is not shown: it may be the secret itself.
                raise ArgumentError(
                    f"secrets.{index}",
                    "must be the name of an environment variable here; a value in clear is never taken",
                )
        names = [("hf_home", "HF_HOME")] if self.hf_home else []
        names += [(f"env_vars.{name}", name) for name in self.env_vars]
        names += [("hf_token", "HF_TOKEN")] if self.hf_token else []
        names += [("wandb_key", "WANDB_API_KEY")] if self.wandb_key else []
        names += [(f"secrets.{index}", name) for index, name in enumerate(self.secrets)]
        require_distinct(names)
        if self.max_restarts and not self._is_managed:
            raise ArgumentError(
                "max_restarts",
                f"max_restarts={self.max_restarts} needs a managed job: who else would start it; set managed: true",
            )

    def _require_kept(self, run_dir: Path) -> None:
        """Refuse a run directory that goes with a machine that may go, or that machines would not share."""
        mounts = [*self.volumes, *(path for path, source in self.file_mounts.items() if isinstance(source, Mapping))]
        # As the machine reads it: /bucket/../x is in no bucket.
        path = PurePosixPath(posixpath.normpath(run_dir))
        if any(path.is_relative_to(mount) for mount in mounts):
            return
        if self.num_nodes == 1 and not self._is_managed:
            return
        reason = "machines would not share it" if self.num_nodes > 1 else "a job that is continued would not find it"
        other = "" if self.num_nodes > 1 else ", or set use_spot: false"
        raise ArgumentError(
            "run_dir",
            f"run_dir={run_dir} is on the machine's own disk: {reason}; choose a path in skypilot.volumes or in a "
            f"bucket of skypilot.file_mounts{other}",
        )

    @property
    def _is_managed(self) -> bool:
        return self.use_spot if self.managed is None else self.managed

    @property
    def same_python(self) -> bool:
        """Never: the machines are made for the job."""
        return False

    def render(self, job: Job, now: int) -> Rendered:
        """The task file of `job`, and the `sky` command that launches it."""
        self._require_kept(job.run_dir)
        folder = job.own_folder(self.job_dir, now)
        task = self._task(job, folder)
        require_there(job.variables, {*task.env, *task.secrets}, "add it to skypilot.env_vars or skypilot.secrets")
        file = f"{task.name}.yaml"
        text = kubernetes.dump([skypilot.describe(task)])
        command = skypilot.command_for(task, str(folder / file))
        return Rendered(folder, {job.config: job.text, file: text}, file, command)

    def submitted(self, rendered: Rendered, output: str) -> str:
        """What sky said, and how to follow and to cancel the job."""
        name = Path(rendered.shown).stem
        managed = self._is_managed
        machines = f"{self.num_nodes} machine{'s' if self.num_nodes > 1 else ''}"
        lines = [
            output.strip(),
            f"submitted {'job' if managed else 'cluster'} {name}: {machines} of {self.cloud}",
            f"  follow  sky {f'jobs logs -n {name}' if managed else f'logs {name}'}",
            f"  state   sky {'jobs queue' if managed else f'queue {name}'}",
            f"  cancel  sky {f'jobs cancel -n {name}' if managed else f'cancel {name} --all'}",
            f"  files   {rendered.folder}",
        ]
        # A managed job gives its machines back itself.
        return "\n".join(
            lines if managed else [*lines, f"  end     sky down {name}; until then the machines are paid for"]
        )

    def refused(self, errors: str) -> tuple[str, str]:
        """Which key sky may mean by its complaint, empty for none, and what helps."""
        return refusal(_REFUSALS, errors, "sky check shows the clouds that are set up, sky gpus list what they have")

    def _task(self, job: Job, folder: Path) -> skypilot.Task:
        accelerators = self.accelerators or (None if self.instance_type else "T4:1")
        count = int(accelerators.partition(":")[2] or 1) if accelerators else None
        resources = {
            "infra": self._infra(),
            "accelerators": accelerators,
            "instance_type": self.instance_type,
            "use_spot": self.use_spot,
            "disk_size": self.disk_size,
            "image_id": self.image_id,
        }
        references = {"HF_TOKEN": self.hf_token, "WANDB_API_KEY": self.wandb_key}
        secrets = {name: variable(text) for name, text in references.items() if text is not None}
        secrets |= {name: name for name in self.secrets}
        home = {"HF_HOME": self.hf_home} if self.hf_home else {}
        return skypilot.Task(
            name=self.job_name or job.name,
            command=("python", *self._program(job)),
            config=(str(folder), job.config),
            arguments=job.arguments,
            nodes=self.num_nodes,
            processes=job.processes or self.nproc_per_node or count,
            port=self.master_port,
            resources={key: value for key, value in resources.items() if value is not None},
            managed=self._is_managed,
            max_restarts=self.max_restarts,
            workdir=self.workdir,
            setup=self.setup,
            file_mounts=self.file_mounts,
            volumes=self.volumes,
            env={"PYTHONUNBUFFERED": "1"} | home | texts(self.env_vars),
            secrets={name: here for name, here in secrets.items() if here is not None},
        )

    def _program(self, job: Job) -> tuple[str, ...]:
        """What Python runs there: a module, or a file of the folder that is copied."""
        if job.program[0].startswith("-"):
            return job.program
        copied = job.folder / self.workdir if self.workdir else None
        if copied is None or not Path(job.program[0]).is_relative_to(copied):
            raise ArgumentError(
                "skypilot.workdir",
                f"workdir={self.workdir} must have {job.program[0]}, which runs on the machines, in it",
            )
        return (str(Path(job.program[0]).relative_to(copied)),)

    def _infra(self) -> str:
        """`cloud/region/zone`, with `*` for any region where the zone alone is given."""
        places = [self.region or ("*" if self.zone else None), self.zone]
        return "/".join([self.cloud, *(place for place in places if place)])
