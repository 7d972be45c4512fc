"""A SLURM of two nodes on this machine, with daemons, keys, ports and folders of its own: for tests that submit jobs.

Debian's packages run as they are (`PACKAGES`), as root, without systemd. Both nodes see this machine's files, as those
of a cluster see the shared ones. No other SLURM or munge here is used or touched, and all ends with the block. Of a
process that is killed in it the daemons end too, but not the jobs that run at that moment (each a slurmstepd), nor
does the folder go.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurm-wlm munge"
_PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "setpriv")
_CONFIG = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
SwitchType=switch/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no such cluster can run here; None where one can."""
    programs = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    if programs:
        return f"{', '.join(programs)} not installed: apt-get install {PACKAGES}"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For the commands of SLURM, to find this cluster."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str) -> str:
        """What a command prints; raises CalledProcessError where it fails."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, done: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
        """Return once `done` is true; raises TimeoutError with the daemons' last words."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text()[-2000:] for log in self.folder.glob("*.log"))
                raise TimeoutError(f"{what} did not happen in {seconds} s\n{logs}")
            time.sleep(0.1)

    def ended(self, number: str, seconds: float = 150.0) -> dict[str, str]:
        """Wait for the end of a job; what SLURM says of it then."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in states, f"the end of job {number}", seconds)
        return self.job(number)


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster whose two nodes are idle."""
    # Not pytest's folder: the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    ports = random.SystemRandom().sample([port for port in range(20000, 32000) if _is_free(port)], 3)
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            **dict(zip(("controller", "first", "second"), ports, strict=True)),
            folder=folder,
            host=socket.gethostname().split(".")[0],
        )
    )
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(random.SystemRandom().randbytes(128))
    key.chmod(0o400)
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    configured = ["-D", "-f", str(folder / "slurm.conf")]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_daemon(cluster, munged))
        cluster.wait((folder / "munge.socket").exists, "munge", 10)
        daemons.append(_daemon(cluster, ["slurmctld", *configured]))
        daemons += [_daemon(cluster, ["slurmd", *configured, "-N", node]) for node in ("n1", "n2")]
        cluster.wait(lambda: _are_idle(cluster), "a start of the cluster", 60)
        yield cluster
    finally:
        _stop(cluster, daemons)
        shutil.rmtree(folder)


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _daemon(cluster: Cluster, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a daemon that dies with this process, however that ends."""
    with (cluster.folder / f"{command[0]}{command[-1][-2:]}.log").open("w") as log:
        bound = ["setpriv", "--pdeathsig", "KILL", *command]
        return subprocess.Popen(bound, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _are_idle(cluster: Cluster) -> bool:
    command = ("sinfo", "--noheader", "--Node", "--format=%T")
    states = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    return states.stdout.split() == ["idle", "idle"]


def _stop(cluster: Cluster, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all jobs, then the daemons, those last that the others need."""

    def told(*command: str) -> str:
        return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False).stdout

    if len(daemons) == 4:
        jobs = set(told("squeue", "--noheader", "--format=%A").split())
        for job in jobs:
            # What runs ends at once, and nothing of it again.
            told("scancel", "--signal=KILL", "--full", job)
            told("scancel", job)
        if jobs:
            with contextlib.suppress(TimeoutError):
                cluster.wait(lambda: _are_idle(cluster), "the end of all jobs", 30)
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def main(command: Sequence[str]) -> int:
    """`python -m integration_tests.slurm_cluster [COMMAND ...]`: run a command, or a shell, with a cluster."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    with running() as cluster:
        print(cluster.run("sinfo"), end="", flush=True)
        return subprocess.run(
            command or [os.environ.get("SHELL", "bash")], env=cluster.environment, check=False
        ).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
