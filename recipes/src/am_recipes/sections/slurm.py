"""The section that hands a run to SLURM; the script is made by `am_recipes.launch.slurm`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from am_recipes.launch.job import Job, Rendered, refusal
from am_recipes.launch.slurm import REFUSALS, Container, Script, script
from am_recipes.sections.kinds import NonNegativeInt, PositiveInt, Text, Time, seconds
from am_recipes.sections.variables import require_distinct, require_names
from am_recipes.settings import ArgumentError, AsWritten, Check, references, rewritten

Name = Annotated[
    str, Check(lambda text: bool(re.fullmatch(r"[\w.+-]+", text)), "must be letters, digits, and any of _ . + -")
]
Absolute = Annotated[Path, Check(Path.is_absolute, "must be an absolute path")]
Volume = Annotated[
    str,
    Check(
        lambda text: bool(re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]*)?", text)),
        "must be two absolute paths with a colon between them",
    ),
]
Port = Annotated[int, Check(lambda port: 0 < port < 65536, "must be in 1..65535")]
# A text for the shell of another machine, which knows the variables it names.
Shell = Annotated[str, AsWritten()]
_NEVER = Annotated[
    bool,
    Check(
        lambda on: not on,
        "must be false: the recipes mark no part of a run for nsys to capture; a whole one is profiled by a command of "
        "your own, which --dry-run shows: nsys profile COMMAND",
    ),
]

# A word of an #SBATCH line, whatever stands in it: it cannot end the line, or its quotes.
Word = Annotated[
    str,
    Check(
        lambda text: bool(text) and _is_word(text),
        'must be text on one line, without " and \\',
    ),
]

# What stands in the header because of a key of ours.
_OURS = {
    "job-name": "job_name",
    "ntasks-per-node": "ntasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "signal": "signal_seconds",
    "output": "job_dir",
    "open-mode": "requeue",
    "no-requeue": "requeue",
} | {name: name for name in ("nodes", "time", "account", "partition", "qos", "array", "dependency", "requeue", "chdir")}


@dataclass(frozen=True)
class Mount:
    """A folder of the cluster, and where a container sees it."""

    source: Absolute
    """On the cluster; it must be there."""
    dest: Absolute
    """In the container."""


@dataclass(frozen=True)
class Slurm:
    """Submits the run to SLURM with sbatch, instead of training here; --dry-run shows the script."""

    job_name: Name | None = None
    """Null: the two words of the command, such as llm_finetune."""
    nodes: PositiveInt = 1
    """Machines."""
    ntasks_per_node: PositiveInt = 8
    """Ranks on each, one for a GPU; torchrun starts them. --nproc-per-node goes first."""
    time: Time = "00:05:00"
    """Limit of one start of the job, in SLURM's forms."""
    account: Word | None = None
    """Who pays."""
    partition: Word | None = "batch"
    """Null: the cluster's default."""
    qos: Word | None = None
    """Quality of service."""
    gpus_per_node: NonNegativeInt | None = None
    """Asked of SLURM; null: it is not asked, as where whole nodes are given."""
    cpus_per_task: PositiveInt | None = None
    """Cores of each rank."""
    exclusive: bool = True
    """Whether to share no node with other jobs."""
    array: Word | None = None
    """Many jobs, such as 0-3, which tell each other apart by ${SLURM_ARRAY_TASK_ID,0} in the config."""
    dependency: Word | None = None
    """What has to come first, such as afterok:1234."""
    signal_seconds: PositiveInt | None = 120
    """How long before the limit SLURM sends SIGUSR1, at which the run commits and exits with 75; null: it does not."""
    requeue: bool = True
    """Whether a run that was stopped and can be continued (75) is started again, as the same job."""
    directives: Mapping[str, Any] = field(default_factory=dict)
    """Any other option of sbatch by its long name: constraint: h100; null where it takes no value."""
    container_image: Text | None = None
    """Null: on the nodes themselves, with this Python."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis is Enroot as a part of srun; apptainer is a command."""
    nemo_mount: Mount | None = None
    """A checkout of this repository that is to run in the container, instead of what is installed there."""
    extra_mounts: Mapping[str, str] | tuple[Volume, ...] = ()
    """What else the container sees: SOURCE:DESTINATION each, or a mapping."""
    hf_home: Absolute | None = None
    """HF_HOME of the ranks; null: as it is, and .hf_home in job_dir for a container."""
    repo_root: Absolute | None = None
    """A checkout of this repository that is to run, instead of what is installed."""
    python: Text | None = None
    """Which Python; null: this one, and python in a container."""
    master_port: Port = 13742
    """Where the ranks meet, on the first node."""
    hf_token: Shell | None = None
    """HF_TOKEN of the ranks: a variable that is set where the job is submitted, ${HF_TOKEN}."""
    wandb_key: Shell | None = None
    """WANDB_API_KEY of the ranks, likewise."""
    env_vars: Mapping[str, Shell] = field(default_factory=dict)
    """Other variables; ${NAME} in them is read where the job runs."""
    command: Shell | None = None
    """What every node runs instead of the recipe, in bash; it has SLURM's variables, $MASTER_ADDR and $MASTER_PORT."""
    chdir: Path | None = None
    """Where the ranks run; null: where the job was submitted."""
    job_dir: Path = Path("slurm_jobs")
    """Every job has a folder there, with config, script and log; all nodes must see it."""
    nsys_enabled: _NEVER = False
    """Not supported."""

    def __post_init__(self) -> None:
        limit = seconds(self.time)
        if self.signal_seconds is not None and limit is not None and self.signal_seconds >= limit:
            raise ArgumentError(
                "signal_seconds",
                f"signal_seconds={self.signal_seconds} is not less than time={self.time}, so the job would be stopped "
                "as it starts; set a smaller one, or null",
            )
        require_names("env_vars", self.env_vars)
        given = [("hf_home", "HF_HOME", self.hf_home), ("hf_token", "HF_TOKEN", self.hf_token)]
        given += [("wandb_key", "WANDB_API_KEY", self.wandb_key)]
        given += [(f"env_vars.{name}", name, value) for name, value in self.env_vars.items()]
        require_distinct((key, name) for key, name, value in given if value is not None)
        if self.container_image is None:
            for key, value in (("nemo_mount", self.nemo_mount), ("extra_mounts", self.extra_mounts)):
                if value:
                    raise ArgumentError(
                        key, f"{key} is for a container, and container_image is null; set it, or remove {key}"
                    )

    @property
    def same_python(self) -> bool:
        """Whether the ranks run the Python and the packages that are here, so that targets can be checked here."""
        return not (self.container_image or self.python or self.repo_root or self.command)

    def render(self, job: Job, now: int) -> Rendered:
        """Files and command of a job, as `am_recipes.launch.job.Launcher` says."""
        name = self.job_name or job.name
        folder = job.own_folder(self.job_dir, now)
        self._require_apart(job)
        text = script(self._script(job, name, folder))
        files = {job.config: job.text, f"{name}.sbatch": text}
        return Rendered(folder, files, f"{name}.sbatch", ("sbatch", "--parsable", str(folder / f"{name}.sbatch")))

    def submitted(self, rendered: Rendered, output: str) -> str:
        """What is told of a job that sbatch has taken."""
        number, _, cluster = output.strip().partition(";")
        on = f" -M {cluster}" if cluster else ""
        log = rendered.shown.removesuffix(".sbatch") + (f"_{number}_*.log" if self.array else f"_{number}.log")
        where = f"partition {self.partition}" if self.partition else "the default partition"
        return (
            f"submitted job {number} to {where}: {self.nodes} node{'s' if self.nodes > 1 else ''}, "
            f"at most {self.time} at a time\n"
            f"  follow  tail -F {shlex.quote(str(rendered.folder))}/{log}\n"
            f"  state   squeue{on} -j {number}\n"
            f"  cancel  scancel{on} {number}\n"
            f"  files   {rendered.folder}"
        )

    def refused(self, errors: str) -> tuple[str, str]:
        """Which key sbatch may mean by its complaint, empty for none, and what helps."""
        return refusal(REFUSALS, errors, "man sbatch explains its options; directives passes any of them on")

    def _require_apart(self, job: Job) -> None:
        if self.array is None or self.array.endswith("%1"):
            return
        if not {"SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"} & {name for name, _ in references(job.run_dir_reference or "")}:
            raise ArgumentError(
                "slurm.array",
                f"array={self.array} would train the same run many times at once, in one run_dir; write run_dir: "
                "runs/${SLURM_ARRAY_TASK_ID,0} (and seed likewise), or array: 1-10%1 for one start after the other",
            )

    def _script(self, job: Job, name: str, folder: Path) -> Script:
        ranks = job.processes or self.ntasks_per_node
        directory = (job.folder / self.chdir if self.chdir else job.folder).absolute()
        # Those of SLURM itself are there in any case.
        needed = [variable for variable in job.variables if not variable.startswith("SLURM_")]
        given = dict(self._variables(folder))
        needed += [name for text in given.values() for name, default in references(text) if default is None]
        run_dir = _shell(job.run_dir_reference) if job.run_dir_reference else shlex.quote(str(job.run_dir))
        container = self._container(job, folder, directory) if self.container_image else None
        checkout = self.repo_root or (self.nemo_mount and self.nemo_mount.dest)
        return Script(
            name=name,
            options=self._options(name, ranks, folder, directory),
            nodes=self.nodes,
            ranks=ranks,
            cores=self.cpus_per_task,
            folder=folder,
            directory=directory,
            run_dir=run_dir,
            watched=self.command is None and (container is None or container.mounts_run),
            array=self.array is not None,
            requeue=self.requeue,
            needed=tuple(dict.fromkeys(needed)),
            environment={variable: _shell(text) for variable, text in given.items()},
            port=self.master_port,
            sources=shlex.quote(str(checkout)) if checkout else None,
            command=f"(\n{_in_bash(self.command)}\n)" if self.command else self._command(job, folder, ranks),
            container=container,
        )

    def _variables(self, folder: Path) -> Iterator[tuple[str, str]]:
        home = self.hf_home or (folder.parent / ".hf_home" if self.container_image else None)
        if home is not None:
            yield "HF_HOME", str(home)
        if self.hf_token is not None:
            yield "HF_TOKEN", self.hf_token
        if self.wandb_key is not None:
            yield "WANDB_API_KEY", self.wandb_key
        yield from self.env_vars.items()

    def _options(self, name: str, ranks: int, folder: Path, directory: Path) -> dict[str, str | None]:
        number = "%A_%a" if self.array else "%j"
        values: dict[str, object] = {
            "job-name": name,
            "nodes": self.nodes,
            "ntasks-per-node": ranks,
            "cpus-per-task": self.cpus_per_task,
            "gpus-per-node": self.gpus_per_node,
            "time": self.time,
            "account": self.account,
            "partition": self.partition,
            "qos": self.qos,
            "array": self.array,
            "dependency": self.dependency,
            "signal": f"USR1@{self.signal_seconds}" if self.signal_seconds else None,
            "chdir": directory,
            "output": f"{_percent(folder)}/{_percent(name)}_{number}.log",
            "open-mode": "append",
        }
        options: dict[str, str | None] = {key: str(value) for key, value in values.items() if value is not None}
        options["requeue" if self.requeue else "no-requeue"] = None
        if self.exclusive:
            options["exclusive"] = None
        return options | dict(self._directives())

    def _directives(self) -> Iterator[tuple[str, str | None]]:
        for key, value in self.directives.items():
            name = key.lstrip("-").replace("_", "-")
            if name in _OURS:
                raise ArgumentError(
                    "slurm.directives", f"directives={key!r} is the key slurm.{_OURS[name]} of its own; write it there"
                )
            if not re.fullmatch(r"[a-z][a-z-]+", name):
                raise ArgumentError(
                    "slurm.directives", f"directives={key!r} is no long name of an option of sbatch, such as constraint"
                )
            if isinstance(value, (dict, list)) or not _is_word(str(value)):
                raise ArgumentError(
                    "slurm.directives",
                    f"directives={key!r} must be one text or number, or null where the option takes none",
                )
            if value is not False:
                yield name, None if value is None or value is True else str(value)

    def _command(self, job: Job, folder: Path, ranks: int) -> str:
        """What nodes that were started by hand run too."""
        python = self.python or ("python" if self.container_image else sys.executable)
        lines = [
            shlex.join((python, *job.program, "-c", str(folder / job.config))),
            *((shlex.join(job.arguments),) if job.arguments else ()),
            f"--nproc-per-node {ranks}",
        ]
        if self.nodes > 1:
            lines.append(
                f'--nnodes {self.nodes} --node-rank "$SLURM_NODEID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"'
            )
        return " \\\n    ".join(lines)

    def _container(self, job: Job, folder: Path, directory: Path) -> Container:
        assert self.container_image is not None
        image, apptainer = self.container_image, self.container_runtime == "apptainer"
        is_path = "://" not in image if apptainer else image.startswith(("/", ".")) or image.endswith(".sqsh")
        if is_path:
            image = str((job.folder / image).absolute())
            if not Path(image).exists():
                raise ArgumentError(
                    "slurm.container_image",
                    f"container_image={self.container_image} is no file here; give the path of an image, or "
                    + (
                        "a URI such as docker://nvcr.io/nvidia/pytorch:TAG"
                        if apptainer
                        else "nvcr.io#nvidia/pytorch:TAG"
                    ),
                )
        mounts = self._mounts(job, folder, directory)
        return Container(
            self.container_runtime,
            image,
            tuple(mounts),
            mounts_run=not _is_elsewhere((directory / job.run_dir).absolute(), mounts),
            gpus=self.gpus_per_node != 0,
        )

    def _mounts(self, job: Job, folder: Path, directory: Path) -> list[str]:
        """What the container sees: what the run needs at the place it has here, and what the config asks for."""
        same = [folder, directory, Path(dict(self._variables(folder))["HF_HOME"])]
        if not job.program[0].startswith("-"):
            same.append(Path(job.program[0]).parent)
        if self.repo_root is not None:
            same.append(self.repo_root)
        mounts = [f"{path}:{path}" for path in same]
        if self.nemo_mount is not None:
            mounts.append(f"{_existing(self.nemo_mount.source, 'nemo_mount')}:{self.nemo_mount.dest}")
        extra = self.extra_mounts
        asked = [f"{source}:{dest}" for source, dest in extra.items()] if isinstance(extra, Mapping) else list(extra)
        for mount in asked:
            source, _, dest = mount.partition(":")
            if not (source.startswith("/") and dest.startswith("/")):
                raise ArgumentError(
                    "slurm.extra_mounts", f"extra_mounts={mount} must be SOURCE:DESTINATION, both absolute"
                )
            _existing(Path(source), "extra_mounts")
        return list(dict.fromkeys([*mounts, *asked]))


def _existing(path: Path, key: str) -> Path:
    if not path.exists():
        raise ArgumentError(f"slurm.{key}", f"{key}={path} is not there to be mounted; correct it, or remove it")
    return path


def _is_elsewhere(path: Path, mounts: list[str]) -> bool:
    """Whether what a container sees at `path` is another folder outside of it."""
    places = [(Path(dest), source) for source, dest in (mount.split(":")[:2] for mount in mounts)]
    over = [(len(dest.parts), Path(source) != dest) for dest, source in places if path.is_relative_to(dest)]
    return max(over, default=(0, False))[1]


def _is_word(text: str) -> bool:
    return text.isprintable() and not set(text) & set('"\\')


def _percent(text: object) -> str:
    """A path in which sbatch replaces nothing."""
    return str(text).replace("%", "%%")


def _shell(text: str) -> str:
    """A value as bash reads it."""

    def variable(name: str, default: str | None) -> str:
        return f'"${{{name}}}"' if default is None else _with_default(name, default)

    return rewritten(text, lambda literal: shlex.quote(literal) if literal else "", variable) or "''"


def _in_bash(command: str) -> str:
    """A text for bash, in which our references are bash's own."""
    return rewritten(command, str, lambda name, default: _with_default(name, default) if default else f"${{{name}}}")


def _with_default(name: str, default: str) -> str:
    return f"${{{name}-{shlex.quote(default.strip())}}}"
