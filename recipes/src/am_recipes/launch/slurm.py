"""The sbatch script of a job, as text that a person can read: `script` is a pure function.

SLURM starts one process of ours on each node, which starts the ranks there through torchrun. The script waits for
them, and asks SLURM for the same job again where they were stopped and can be continued (status 75).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from am_recipes.launch.job import Refusal

# What sbatch says of a key of ours, and what helps; the first that fits.
REFUSALS = (
    Refusal(
        ("qos policy",),
        "",
        "sacctmgr show associations user=$USER and sacctmgr show qos have the limits of jobs, sizes and times; ask for "
        "less, or wait for jobs of yours to end",
    ),
    Refusal(("contact slurm controller",), "", "scontrol ping says whether it is up; type the same again once it is"),
    Refusal(("socket timed out",), "", "the controller is busy: squeue --me says whether it took the job; else again"),
    Refusal(("account",), "account", "sacctmgr show associations user=$USER lists yours; --slurm.account NAME"),
    Refusal(("partition",), "partition", "sinfo --summarize lists the partitions; --slurm.partition NAME"),
    Refusal(("qos",), "qos", "sacctmgr show qos lists what there is; --slurm.qos NAME"),
    Refusal(("time limit",), "time", "sinfo --summarize shows the longest of each partition; --slurm.time 01:00:00"),
    Refusal(("dependency",), "dependency", "such as afterok:JOB; man sbatch has the forms"),
    Refusal(("array",), "array", "such as 0-3 or 1-10%1; man sbatch has the forms"),
    Refusal(("gres",), "gpus_per_node", "sinfo --Format=nodehost,gres shows what nodes have; --slurm.gpus_per_node N"),
    Refusal(("node count",), "nodes", "sinfo --summarize shows how many there are; --slurm.nodes N"),
    Refusal(("more processors",), "ntasks_per_node", "ranks on a node have a core each; --slurm.ntasks_per_node N"),
    Refusal(("node configuration",), "", "sinfo --long shows what nodes have: nodes, ntasks_per_node, gpus_per_node"),
)


@dataclass(frozen=True)
class Container:
    """Where the ranks run, if not on the node itself.

    Args:
        runtime: `pyxis`, which is part of srun, or `apptainer`, a command.
        image: a path, or a name that the runtime knows.
        mounts: `SOURCE:DESTINATION`, each.
        mounts_run: whether the folder of the run is one more, at the place it has here.
        gpus: whether GPUs are to be seen in it.
    """

    runtime: str
    image: str
    mounts: tuple[str, ...]
    mounts_run: bool
    gpus: bool


@dataclass(frozen=True)
class Script:
    """What a script says.

    Args:
        name: of the job, also of its files.
        options: of sbatch, by their long names; None where one has no value.
        nodes, ranks: how many nodes, and ranks on each.
        cores: of each rank; None where nobody has said.
        folder: of the job: config, script, log. Every node sees it.
        directory: where the ranks run.
        run_dir: of the run, shell text that may name variables.
        watched: whether what the run commits is seen here: a job whose starts commit nothing is not requeued for ever.
        array: whether it is an array of jobs.
        requeue: whether a run that was stopped is started again.
        needed: environment variables that must be there.
        environment: other variables, as shell text that may name those.
        port: on which the first node meets the others.
        sources: a checkout of this repository that is to run instead of what is installed; shell text.
        command: shell text, what each node runs.
        container: None for the node itself.
    """

    name: str
    options: Mapping[str, str | None]
    nodes: int
    ranks: int
    cores: int | None
    folder: Path
    directory: Path
    run_dir: str
    watched: bool
    array: bool
    requeue: bool
    needed: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    sources: str | None
    command: str
    container: Container | None = None


_OF_ARRAY = """\
# The job as SLURM's commands name it: a task of an array has a number of its own.
job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
"""

_IDENTITY = """\
start=$((${SLURM_RESTART_COUNT:-0} + 1))
# What SLURM says of this job. Its controller may be away: it is asked again, for ten minutes.
about_job() {
  local given_up=$((SECONDS + 600)) text
  until text=$(scontrol show job "$job"); do
    [ "$SECONDS" -lt "$given_up" ] || return 1
    sleep 5
  done
  sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" <<<"$text" | head -n 1
}
"""

_TIME = """\
# When this job's time is up, in seconds since the epoch, so that the run can save before. Old SLURM does not say, and
# a job that was submitted from another job may have that one's.
until=''
if end=$(about_job EndTime); then
  if SLURM_JOB_END_TIME=$(date -d "$end" +%s 2>/dev/null); then
    export SLURM_JOB_END_TIME
    until=$(date -d "@$SLURM_JOB_END_TIME" '+ until %F %T')
  else
    unset SLURM_JOB_END_TIME
  fi
fi
"""

_MEETING = """\
# Where the nodes meet: the first of them, by the address at which SLURM itself reaches it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first}
"""

_TRAPS = """\
# Bash itself must not die of a signal. SIGUSR1 that comes here alone (--signal=B:USR1) is for the ranks; of the end of
# the job SLURM tells them itself.
ranks='' signalled=''
trap 'signalled=1; [ -z "$ranks" ] || kill -USR1 "$ranks"' USR1
trap 'signalled=1' TERM INT HUP
"""

_WAIT = """\
while
  signalled=''
  wait "$ranks"
  status=$?
  [ -n "$signalled" ] && [ "$status" -gt 128 ]
do :; done
# srun's status is the largest of all nodes, and 75 is larger than 1: a node that failed has said so.
if [ "$status" = 75 ] && [ -s "$FAILED" ]; then status=$(head -n 1 "$FAILED"); fi
"""

_REQUEUE = """\
# 75: stopped, committed, to be continued. Never a job that somebody has cancelled. What fails is tried again.
if [ "$status" = 75 ]; then
  asked='' tries=0
  while [ "$tries" -lt 12 ] && state=$(about_job JobState) && [ "$state" = RUNNING ]; do
    tries=$((tries + 1))
    if scontrol requeue "$job"; then
      asked=taken
      break
    fi
    asked='without an answer'
    sleep 5
  done
  case $asked:$state in
    taken:*) what='was stopped and is requeued' ;;
    *:) what='could not be requeued, since SLURM does not answer; submitted again, it continues' ;;
    *:RUNNING) what='could not be requeued; submitted again, it continues' ;;
    without*) what="was stopped, and SLURM was asked to requeue it, but has not answered; it is $state" ;;
    *) what="was cancelled or is at its end ($state) and is not requeued" ;;
  esac
  echo "$(date '+%F %T') job $job $what"
fi
"""

_BEFORE = """\
# What the run has committed so far, its newest checkpoint: nothing at first.
committed() { readlink "$run_dir/checkpoints/latest" 2>/dev/null || true; }
before=$(committed)
"""

_PROGRESS = """\
# A start that is stopped before it commits is begun again, but not twice in a row: that could go on for ever.
idle=$folder/idle.$job
if [ "$status" = 75 ] && [ "$(committed)" != "$before" ]; then
  rm -f "$idle"
elif [ "$status" = 75 ] && [ ! -e "$idle" ]; then
  : >"$idle"
elif [ "$status" = 75 ]; then
  echo "error: this start and the one before were stopped before they had committed anything in $run_dir. The job" \\
    "ends: give it more time (slurm.time), or less between signal and limit (slurm.signal_seconds), and submit it again"
  status=1
fi
"""


def script(given: Script) -> str:
    """The text of the sbatch script."""
    log = f"{given.name}_$job.log"
    return "\n".join(
        (
            _header(given),
            (_OF_ARRAY if given.array else "job=$SLURM_JOB_ID\n") + _IDENTITY,
            f"folder={shlex.quote(str(given.folder))}\nexport FAILED=$folder/failed.$job.$start\n",
            _TIME,
            "\n".join(
                (
                    f"echo \"$(date '+%F %T') job $job, start $start: {given.nodes} x {given.ranks} ranks on "
                    '$SLURM_JOB_NODELIST$until"',
                    f'echo "  follow  tail -F $folder/{log}"',
                    'echo "  cancel  scancel $job"',
                    'echo "  files   $folder"\n',
                )
            ),
            _environment(given),
            _run_dir(given),
            _MEETING,
            _on_each_node(given),
            _TRAPS,
            *([_BEFORE] if given.requeue and given.watched else []),
            _srun(given),
            _WAIT,
            *([_PROGRESS] if given.requeue and given.watched else []),
            *([_REQUEUE] if given.requeue else []),
            'exit "$status"\n',
        )
    )


def _header(given: Script) -> str:
    lines = ["#!/usr/bin/env bash"]
    for name, value in given.options.items():
        lines.append(f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(value)}"))
    lines += ["", "# Written by automodel: one torchrun on every node, and the same job again where it was stopped."]
    # Values are meant as they stand, and srun calls the function.
    lines += ["# shellcheck disable=SC2016,SC2317,SC2329", "set -uo pipefail"]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    """A value of an #SBATCH line, which sbatch reads as a shell would."""
    return value if value and all(letter.isalnum() or letter in "/._-+:,%@=[]*&|" for letter in value) else f'"{value}"'


def _environment(given: Script) -> str:
    lines = ["# The environment of every rank, beside what the job was submitted with."]
    for name in given.needed:
        lines.append(f': "${{{name}:?is not set here: submit the job where it is, and with its environment}}"')
    for name, value in given.environment.items():
        lines.append(f"export {name}={value}")
    if given.container is not None:
        lines.append('mkdir -p "$HF_HOME"')
    # Tasks of an array may share a node.
    offset = " + ${SLURM_ARRAY_TASK_ID:-0} % 1000" if given.array else ""
    lines.append(f"export MASTER_PORT=$(({given.port}{offset}))" if offset else f"export MASTER_PORT={given.port}")
    return "\n".join(lines) + "\n"


def _run_dir(given: Script) -> str:
    """Where the run is, which is relative to where the ranks run."""
    lines = [f"run_dir={given.run_dir}"]
    lines.append(f"case $run_dir in /*) ;; *) run_dir={shlex.quote(str(given.directory))}/$run_dir ;; esac")
    lines.append('echo "  run     $run_dir"')
    if given.container is not None and given.container.mounts_run:
        lines.append('mkdir -p "$run_dir"')
    return "\n".join(lines) + "\n"


def _on_each_node(given: Script) -> str:
    lines = ["# What every node runs. SLURM signals this shell together with its child, which it waits for."]
    lines += [
        "# shellcheck disable=SC2317,SC2329",
        "on_each_node() {",
        "  trap : TERM INT HUP USR1",
        f"  cd {shlex.quote(str(given.directory))} || return 1",
    ]
    if given.sources is not None:
        lines += [
            "  # The checkout that is to run, instead of what is installed.",
            f"  for source in {given.sources}/packages/*/src {given.sources}/recipes/src; do",
            "    export PYTHONPATH=$source${PYTHONPATH:+:$PYTHONPATH}",
            "  done",
        ]
    # As it is: further lines may be in quotes, or a document, and are not to be moved.
    lines.append(f"  {given.command}")
    lines += ["  status=$?", '  case $status in 0 | 75) ;; *) echo "$status" >>"$FAILED" ;; esac']
    lines += ['  return "$status"', "}"]
    return "\n".join(lines) + "\n"


def _srun(given: Script) -> str:
    """One task a node, whose end is not that of the others: they may be committing, or export alone.

    After a failure they end by themselves: their ranks miss those of the node, and the launchers miss each other.
    """
    options = [f"--nodes={given.nodes} --ntasks={given.nodes} --ntasks-per-node=1 --mpi=none --export=ALL"]
    if given.cores is not None:
        # Else srun would take the cores of one rank for the whole task.
        options.append(f"--cpus-per-task={given.cores * given.ranks}")
    options.append("--cpu-bind=none --kill-on-bad-exit=0 --wait=0")
    inside = 'bash -c "$(declare -f on_each_node); on_each_node"'
    if given.container is not None and given.container.runtime == "pyxis":
        options += [
            f"--container-image={shlex.quote(given.container.image)}",
            f"--container-mounts={shlex.quote(','.join(given.container.mounts))}"
            + ',"$run_dir:$run_dir"' * given.container.mounts_run,
            "--no-container-mount-home",
        ]
    elif given.container is not None:
        options.append("apptainer exec" + (" --nv" if given.container.gpus else ""))
        options += [f"--bind {shlex.quote(mount)}" for mount in given.container.mounts]
        options += ['--bind "$run_dir:$run_dir"'] * given.container.mounts_run
        options.append(shlex.quote(given.container.image))
    return " \\\n  ".join(["srun", *options, inside + " &"]) + "\nranks=$!"
