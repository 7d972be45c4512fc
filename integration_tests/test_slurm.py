"""Runs under a real SLURM of two nodes: submitted by the command, stopped, started again, failed, cancelled.

One job trains and is stopped twice: by a signal, and by the limit of its time. What the script does with signals and
statuses is shown by jobs that train nothing (`slurm.command`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration_tests import runs, slurm_cluster
from integration_tests.slurm_cluster import Cluster

pytestmark = pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
MINE = "integration_tests.user_code"
# Ends with 75 when it is told to stop, as a run does; its third start has nothing left to do.
STOPPABLE = """\
trap 'exit 75' TERM USR1
echo ready
[ "$${SLURM_RESTART_COUNT:-0}" -lt 2 ] || exit 0
sleep 60 & wait"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster.running() as cluster:
        yield cluster


class Jobs:
    """Submits jobs of tiny.yaml on both nodes, from the repository, with their files in a folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def config(self, slurm: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Path:
        """A config with the section, whose steps cost next to nothing."""
        config = runs.changed(
            runs.shipped("tiny.yaml"), {"packed_sequence.packed_sequence_size": 512} | (changes or {})
        )
        small = {"nodes": 2, "ntasks_per_node": 1, "job_dir": str(self.folder / "jobs")}
        config["slurm"] = small | {"env_vars": {"OMP_NUM_THREADS": 1}} | dict(slurm)
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def submit(self, config: Path, *, new_process: bool = False) -> str:
        """The number of the job that the `automodel` command submits; a process for it costs a second."""
        arguments = (str(config), "--run_dir", str(self.folder / "run"))
        if new_process:
            command = shutil.which("automodel", path=str(Path(sys.executable).parent))
            assert command is not None
            submitted = subprocess.run((command, *arguments), capture_output=True, text=True, check=False)
            status, errors, output = submitted.returncode, submitted.stderr, submitted.stdout
        else:
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                status, errors = runs.command(*arguments)
            output = stdout.getvalue()
        assert status == 0, errors
        found = re.search(r"submitted job (\d+) to partition batch: 2 nodes", output)
        assert found is not None, output
        log = re.search(r"follow  tail -F (\S+)", output)
        assert log is not None
        self.file = Path(log[1])
        assert f"cancel  scancel {found[1]}" in output
        return found[1]

    def log(self) -> str:
        """What the job last submitted has said."""
        return self.file.read_text() if self.file.exists() else ""

    def until(self, text: str, count: int) -> None:
        """Wait until the log has `text` so many times."""
        self.cluster.wait(lambda: self.log().count(text) >= count, f"{text!r} in {self.log()}")


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    for name in (*os.environ, "SLURM_CONF", "PATH"):
        if name not in cluster.environment:
            monkeypatch.delenv(name)
        elif name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
    return Jobs(cluster, tmp_path)


def test_a_run_that_is_stopped_by_a_signal_and_by_the_limit_of_its_time_is_the_run_that_is_not(jobs: Jobs) -> None:
    slow = {"_target_": f"{MINE}.Slow", "seconds": [0.5, 4.0]}
    changes = {
        "step_scheduler.max_steps": 16,
        "step_scheduler.val_every_steps": 8,
        "step_scheduler.global_batch_size": 2,
        "step_scheduler.ckpt_every_steps": 50,
        "sinks": [slow],
    }
    # SLURM's own signal would come at once, where the limit is less than what it is to come before.
    config = jobs.config({"signal_seconds": None}, changes)
    number = jobs.submit(config, new_process=True)
    metrics = jobs.folder / "run" / "metrics.jsonl"
    jobs.cluster.wait(lambda: metrics.exists() and metrics.read_text().count("grad_norm") >= 2, "two steps")
    jobs.cluster.run("scancel", "--signal=USR1", number)
    # The second start has a minute, the least that SLURM knows, and needs more.
    for stops, minutes in ((1, 1), (2, 5)):
        jobs.until("was stopped and is requeued", stops)
        jobs.cluster.wait(lambda: jobs.cluster.job(number)["JobState"] == "PENDING", "a requeue")
        jobs.cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
    job = jobs.cluster.ended(number)
    log = jobs.log()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2"), log
    by_signal, by_time, _ = re.split("was stopped and is requeued", log)
    assert "SIGUSR1 received" in by_signal
    assert re.search("out of time: SLURM_JOB_END_TIME=.* leaves", by_time)
    starts = re.findall(r"job \d+, start (\d): 2 x 1 ranks on n\[1-2\] until \d", log)
    assert starts == ["1", "2", "3"]
    first, second = re.findall(r"resumed from step (\d+)", log)
    assert 2 <= int(first) < int(second) < 16
    launches = json.loads((jobs.folder / "run" / "run.json").read_text())["launches"]
    assert len(launches) == 3
    reference = runs.train(jobs.folder, "reference", config, {"sinks": "[]"}, world_size=2)
    runs.assert_same_run(jobs.folder / "run", reference)


def test_a_failure_on_one_node_is_that_of_the_job_with_its_traceback_first(jobs: Jobs) -> None:
    # Its targets are not looked at on submission, which saves seconds.
    config = jobs.config(
        {"python": sys.executable}, {"dataloader": {"collate": {"_target_": f"{MINE}.fails_on_the_second_rank"}}}
    )
    job = jobs.cluster.ended(jobs.submit(config))
    log = jobs.log()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0"), log
    assert "Traceback" in log, log
    traceback = log[log.index("Traceback") :]
    assert "integration_tests/user_code.py" in traceback
    assert re.search(r'^KeyError: "a bug of the second rank"', traceback.replace("'", '"'), re.MULTILINE)
    assert "Traceback" not in traceback.partition("KeyError")[0].removeprefix("Traceback")


def test_what_was_stopped_is_started_again(jobs: Jobs) -> None:
    number = jobs.submit(jobs.config({"command": STOPPABLE, "python": "python"}))
    # The second time the signal comes to the script alone.
    for start, options in ((1, ()), (2, ("--batch",))):
        jobs.until("ready", 2 * start)
        jobs.cluster.run("scancel", "--signal=USR1", *options, number)
        jobs.until(f"job {number} was stopped and is requeued", start)
    job = jobs.cluster.ended(number)
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "2"), jobs.log()
    assert jobs.log().count("ready") == 6


def test_tasks_of_an_array_are_started_again_by_themselves(jobs: Jobs) -> None:
    command = '[ "$${SLURM_RESTART_COUNT:-0}" != 0 ] || exit $((SLURM_ARRAY_TASK_ID ? 75 : 0))'
    number = jobs.submit(jobs.config({"command": command, "array": "0-1%1"}))
    jobs.cluster.wait(
        lambda: not jobs.cluster.run("squeue", "--noheader", f"--jobs={number}").strip(), "the end of all"
    )
    for task, restarts in ((0, "0"), (1, "1")):
        ended = jobs.cluster.job(f"{number}_{task}")
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", restarts)
    first, second = (jobs.file.parent / f"llm_finetune_{number}_{task}.log" for task in (0, 1))
    assert "requeued" not in first.read_text()
    assert f"job {number}_1, start 2: " in second.read_text()


def test_what_was_cancelled_is_not_started_again(jobs: Jobs) -> None:
    number = jobs.submit(jobs.config({"command": STOPPABLE, "python": "python"}))
    jobs.until("ready", 2)
    jobs.cluster.run("scancel", number)
    jobs.until("was cancelled or is at its end", 1)
    assert jobs.cluster.ended(number)["JobState"] == "CANCELLED"
    assert "requeued\n" in jobs.log()
    assert "was stopped and is requeued" not in jobs.log()
    assert jobs.log().count("task 1: Exited with exit code 75") == 1


@pytest.mark.parametrize(("first", "second", "status"), [(75, 3, 3), (2, 75, 2)])
def test_a_failure_outranks_a_stop(jobs: Jobs, first: int, second: int, status: int) -> None:
    command = f"exit $((SLURM_NODEID == 0 ? {first} : {second}))"
    job = jobs.cluster.ended(jobs.submit(jobs.config({"command": command})))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", f"{status}:0", "0"), jobs.log()


def test_the_nodes_have_what_the_script_says(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    command = 'echo "node $SLURM_NODEID of $SLURM_NNODES meets at $MASTER_ADDR:$MASTER_PORT with $HF_TOKEN in $PWD"'
    command += '; echo "left $((SLURM_JOB_END_TIME - $(date +%s)))"'
    number = jobs.submit(
        jobs.config({"command": command, "hf_token": "${MY_TOKEN}", "time": "2:30", "cpus_per_task": 1})
    )
    assert jobs.cluster.ended(number)["ExitCode"] == "0:0", jobs.log()
    for node in (0, 1):
        assert f"node {node} of 2 meets at 127.0.0.1:13742 with secret in {Path.cwd()}\n" in jobs.log()
    # SLURM rounds limits up to minutes.
    first, second = re.findall(r"left (\d+)\n", jobs.log())
    assert 150 <= int(first) <= 180
    assert 150 <= int(second) <= 180
    assert "secret" not in "".join(file.read_text() for file in jobs.file.parent.iterdir() if file != jobs.file)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"array": "0-3%1", "job_name": "an-array"},
        {"time": "1-12", "exclusive": False, "requeue": False, "signal_seconds": None, "partition": None},
        {"directives": {"mail-type": "FAIL", "comment": "a b", "mem": 0, "overcommit": None}, "cpus_per_task": 1},
        {"container_image": "docker://a/b", "container_runtime": "apptainer", "extra_mounts": ["/tmp:/data"]},
        {"chdir": "/tmp", "job_dir": "with space and 100%/jobs"},
    ],
)
def test_sbatch_takes_every_script(jobs: Jobs, section: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = jobs.config({"python": "python"} | section)
    assert runs.command(str(config), "--dry-run") == (0, "")
    script = jobs.folder / "job.sbatch"
    script.write_text(capsys.readouterr().out.partition("---\n")[2].partition("\n")[2])
    tested = subprocess.run(
        ("sbatch", "--test-only", str(script)),
        env=jobs.cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stderr
    assert re.search(r"Job \d+ to start at .* on nodes n\[1-2\] in partition batch", tested.stderr)


def test_a_refusal_of_slurm_names_the_key(jobs: Jobs) -> None:
    config = jobs.config({"partition": "gpu", "python": "python"})
    lines = config.read_text().splitlines()
    line = lines.index("  partition: gpu") + 1
    status, errors = runs.command(str(config))
    assert status == 1
    assert "sbatch: error: " in errors
    assert f"tiny.yaml:{line}: slurm.partition: sbatch refused the job (1): sinfo --summarize lists" in errors
    status, errors = runs.command(str(config), "--slurm.partition=batch", "--slurm.array=4-1%1")
    assert status == 1
    assert "(--slurm.array): slurm.array: sbatch refused the job (1): such as 0-3" in errors
