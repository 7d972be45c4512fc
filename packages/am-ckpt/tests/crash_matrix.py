"""What a writer of checkpoints leaves behind when any one of its file operations goes wrong, or the power.

`python crash_matrix.py WRITER.py... [--sample N] [--seed S] [--kinds kill,torn,...] [--power-cuts N] [--kills N]
[--json FILE]`; needs Linux and a C compiler. WRITER.py is any script with

- `save(folder: str, value: int)`: write a checkpoint whose content follows from `value`, or raise;
- `load(folder: str) -> int`: the value of the checkpoint that a restart would take, all of its content checked;
- optionally `setup(folder: str)`, what is there before (default: `save(folder, 1)`), and `RANKS = 4`: `save` is
  then called on four ranks of a gloo group, and the fault strikes one of them, another in turn.

For every operation that changes files and every kind of fault, `save(folder, 2)` runs in a process of its own, with
the fault. Violations are: *lost*, neither 1 nor 2 can be loaded (or something that is neither); *lied*, `save`
returned but 2 is not what is loaded; *stuck*, 1 is loaded, and saving again without a fault does not help. A short
write and an interrupted call must be absorbed or reported, like any error.

`--power-cuts N` records the operations of a save without a fault, and replays them: after each, the power is cut.
Then a file holds what it had at its last fsync and a folder the names of its own last fsync (the first of N cuts), or
any of the changes since, in any order (the others). *lied* is then a save that had returned before the cut.

`--kills N` kills a save of one process at N random moments, with SIGKILL, beside the points above.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import importlib
import itertools
import json
import os
import random
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("kill", "torn", "short", "ENOSPC", "EIO", "ESTALE", "EINTR")
SECONDS = 60


def compile_shim(folder: Path) -> Path:
    source = Path(__file__).with_name("faultshim.c")
    library = folder / "faultshim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def in_child(action: Callable[[], Any], kill_after: float | None = None) -> tuple[bool, Any]:
    """Fork, run `action`, and tell whether it returned, and what (or why not); killed after so many seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.alarm(SECONDS)
        try:
            answer = [True, action()]
        except BaseException:  # noqa: BLE001 - a child ends here, whatever happened
            answer = [False, traceback.format_exc(limit=-3)]
        os.write(write, json.dumps(answer).encode()[:60000])
        os._exit(0)
    os.close(write)
    if kill_after is not None and not select.select([read], [], [], kill_after)[0]:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if text:
        returned, value = json.loads(text)
        return returned, value
    return False, f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {status}"


def join_group(store: str, rank: int, ranks: int) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)


def import_lazy_modules(writer: dict[str, Any]) -> None:
    """Import here what the writer imports when it is used: else every child would, and most kills would fall there."""
    before = set(sys.modules)
    with tempfile.TemporaryDirectory() as place:
        folder, store, names = f"{place}/folder", f"{place}/store", Path(place, "names")
        os.mkdir(folder)

        def use() -> None:
            writer.get("setup", lambda folder: writer["save"](folder, 1))(folder)
            if "RANKS" in writer:
                join_group(store, 0, 1)
            writer["save"](folder, 2)
            writer["load"](folder)
            names.write_text("\n".join(sorted(set(sys.modules) - before)))

        returned, _ = in_child(use)
        for name in names.read_text().split() if returned else []:
            # Some are modules of nothing that can be found by name.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def serve() -> None:
    """The process that has imported the writer, and forks for every point: run with the shim preloaded."""
    writer = runpy.run_path(sys.argv[2])
    import_lazy_modules(writer)
    shim = ctypes.CDLL(None)
    ranks = writer.get("RANKS", 1)

    def run_rank(rank: int, folder: str, number: int, kind: str, journal: str, store: str) -> int:
        if ranks > 1:
            join_group(store, rank, ranks)
        if rank == number % ranks:
            shim.faultshim_arm(folder.encode(), number // ranks, kind.encode())
        elif journal:
            shim.faultshim_arm(folder.encode(), 0, b"kill")
        if journal:
            shim.faultshim_log(journal.encode())
        writer["save"](folder, 2)
        return shim.faultshim_count()

    def save(folder: str, number: int, kind: str, journal: str = "") -> tuple[bool, Any]:
        """`number` counts operations rank by rank: operation `number // ranks` of rank `number % ranks`."""
        if ranks == 1:
            return in_child(lambda: run_rank(0, folder, number, kind, journal, ""))
        with tempfile.TemporaryDirectory() as place:
            helpers = []
            for rank in range(ranks):
                pid = os.fork()
                if pid == 0:
                    answer = in_child(lambda rank=rank: run_rank(rank, folder, number, kind, journal, f"{place}/store"))
                    Path(place, f"{rank}.json").write_text(json.dumps(answer))
                    os._exit(0)
                helpers.append(pid)
            for pid in helpers:
                os.waitpid(pid, 0)
            answers = [json.loads(Path(place, f"{rank}.json").read_text()) for rank in range(ranks)]
        failed = [answer for answer in answers if not answer[0]]
        # Where one rank says that it is saved, it is.
        if len(failed) == ranks:
            return False, failed[number % ranks][1]
        return True, [value if returned else 0 for returned, value in answers]

    print(json.dumps(ranks), flush=True)
    for line in sys.stdin:
        command, folder, *rest = json.loads(line)
        if command == "setup":
            answer = in_child(lambda folder=folder: writer.get("setup", lambda f: writer["save"](f, 1))(folder))
        elif command == "load":
            answer = in_child(lambda folder=folder: writer["load"](folder))
        elif command == "killed":
            answer = in_child(lambda folder=folder: writer["save"](folder, 2), rest[0])
        else:
            answer = save(folder, *rest)
        print(json.dumps(answer), flush=True)


class Server:
    """A running writer."""

    def __init__(self, script: Path, shim: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        )
        self.ranks: int = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the writer's script could not be run")
        return json.loads(line)

    def ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()


@dataclass
class File:
    data: bytes = b""
    durable: bytes = b""


@dataclass
class Link:
    target: str


@dataclass
class Folder:
    now: dict[str, File | Folder | Link] = field(default_factory=dict)
    durable: dict[str, File | Folder | Link] = field(default_factory=dict)


class Disk:
    """A folder whose files and names survive a power cut if they were synced."""

    def __init__(self, path: Path) -> None:
        self._root = path
        self.top = self._read(path)

    def _read(self, path: Path) -> Folder:
        folder = Folder()
        for entry in path.iterdir():
            if entry.is_symlink():
                folder.now[entry.name] = Link(os.readlink(entry))
            elif entry.is_dir():
                folder.now[entry.name] = self._read(entry)
            else:
                folder.now[entry.name] = File(entry.read_bytes(), entry.read_bytes())
        folder.durable = dict(folder.now)
        return folder

    def _find(self, path: str) -> Any:
        node: Any = self.top
        for part in Path(path).relative_to(self._root).parts:
            node = node.now[part]
        return node

    def apply(self, line: str) -> None:
        """One line of the journal."""
        what, path, other, number_text, hexadecimal = line.split("\t")
        number, data = int(number_text), bytes.fromhex(hexadecimal)
        name = Path(path).name
        if what in ("write", "extend", "truncate"):
            file = self._find(path)
            if what == "write":
                file.data = file.data[:number].ljust(number, b"\0") + data + file.data[number + len(data) :]
            else:
                file.data = (file.data if what == "extend" else file.data[:number]).ljust(number, b"\0")
        elif what == "sync":
            node = self._find(path)
            if isinstance(node, File):
                node.durable = node.data
            else:
                node.durable = dict(node.now)
        else:
            names = self._find(str(Path(path).parent)).now
            if what == "open":
                file = names.setdefault(name, File())
                file.data = b"" if number else file.data
            elif what == "mkdir":
                names[name] = Folder()
            elif what == "symlink":
                names[name] = Link(other)
            elif what == "link":
                names[name] = self._find(other)
            elif what == "remove":
                del names[name]
            elif what == "rename":
                names[name] = self._find(other)
                del self._find(str(Path(other).parent)).now[Path(other).name]
            elif what == "exchange":
                others = self._find(str(Path(other).parent)).now
                names[name], others[Path(other).name] = others[Path(other).name], names[name]
            else:
                raise RuntimeError(f"{path}: written in a way that cannot be replayed")

    def cut(self, target: Path, chance: random.Random | None) -> None:
        """Write to `target` what a power cut leaves: without `chance`, nothing that was not synced."""
        self._cut(self.top, target, chance)

    def _cut(self, folder: Folder, target: Path, chance: random.Random | None) -> None:
        target.mkdir()
        for name in {**folder.durable, **folder.now}:
            node = folder.durable.get(name)
            if chance is not None and chance.random() < 0.5:
                node = folder.now.get(name)
            if isinstance(node, Folder):
                self._cut(node, target / name, chance)
            elif isinstance(node, Link):
                os.symlink(node.target, target / name)
            elif isinstance(node, File):
                data = node.durable
                if chance is not None and node.data != node.durable and chance.random() < 0.7:
                    data = node.data[: chance.choice((len(node.data), chance.randint(0, len(node.data))))]
                (target / name).write_bytes(data)


def cut_power(server: Server, base: Path, work: Path, cuts: int, seed: int) -> dict[str, Any]:
    """Replay a save of `base` up to every operation, and cut the power there in `cuts` ways."""
    trial, journal = work / "trial", work / "journal"
    shutil.copytree(base, trial, symlinks=True)
    disk = Disk(trial)
    returned, text = server.ask("save", str(trial), 0, "kill", str(journal))
    if not returned:
        raise RuntimeError(f"saving without a fault failed: {text}")
    shutil.rmtree(trial)
    chance = random.Random(seed)
    verdicts: collections.Counter[str] = collections.Counter()
    violations = []
    lines = journal.read_text().splitlines()
    for number in range(len(lines) + 1):
        if number:
            disk.apply(lines[number - 1])
        for index in range(cuts):
            disk.cut(trial, chance if index else None)
            verdict, why = judge(server, trial, number == len(lines), again=False)
            verdicts[verdict] += 1
            if verdict not in ("old", "new"):
                violations.append({"operation": number, "kind": "power", "verdict": verdict, "why": why})
            shutil.rmtree(trial)
    return {"points": verdicts.total(), "verdicts": dict(verdicts), "violations": violations}


def kill(server: Server, base: Path, work: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill `count` saves at random moments."""
    chance = random.Random(seed)
    verdicts: collections.Counter[str] = collections.Counter()
    violations = []
    trial = work / "trial"
    seconds = []
    for index in range(3 + count):
        shutil.copytree(base, trial, symlinks=True)
        begin = time.monotonic()
        # The first three are not killed: they say how long a save takes.
        moment = chance.uniform(0, 1.1 * max(seconds)) if index >= 3 else SECONDS
        returned, text = server.ask("killed", str(trial), moment)
        if index < 3:
            seconds.append(time.monotonic() - begin)
        else:
            verdict, why = judge(server, trial, returned)
            verdicts[verdict] += 1
            if verdict not in ("old", "new"):
                violations.append({"operation": moment, "kind": "SIGKILL", "verdict": verdict, "why": f"{text}; {why}"})
        shutil.rmtree(trial)
    return {"points": count, "verdicts": dict(verdicts), "violations": violations}


def judge(server: Server, folder: Path, returned: bool, *, again: bool = True) -> tuple[str, str]:
    """The verdict on what is left in `folder`: `old`, `new`, or a violation, and its description."""
    loaded, value = server.ask("load", str(folder))
    if not loaded or value not in (1, 2):
        return "lost", f"load: {value}"
    if value == 2:
        return "new", ""
    if returned:
        return "lied", "save returned, the old checkpoint is loaded"
    if not again:
        return "old", ""
    saved, text = server.ask("save", str(folder), 0, "kill")
    loaded, value = server.ask("load", str(folder))
    if not saved or value != 2:
        return "stuck", f"saving again: {text}; load: {value}"
    return "old", ""


def run_matrix(
    script: Path,
    kinds: tuple[str, ...] = KINDS,
    sample: int | None = None,
    power_cuts: int = 0,
    kills: int = 0,
    seed: int = 0,
    place: Path | None = None,
) -> dict[str, Any]:
    """Every point, or a random `sample` of them; how often each verdict was given, and the violations."""
    with tempfile.TemporaryDirectory(prefix="crash-matrix-", dir=place) as work_name:
        work = Path(work_name)
        server = Server(script, compile_shim(work))
        try:
            base = work / "base"
            base.mkdir()
            prepared, text = server.ask("setup", str(base))
            if not prepared:
                raise RuntimeError(f"setup failed: {text}")
            counts = []
            for rank in range(server.ranks):
                trial = work / "trial"
                shutil.copytree(base, trial, symlinks=True)
                returned, count = server.ask("save", str(trial), rank, "kill")
                if not returned or server.ask("load", str(trial)) != [True, 2]:
                    raise RuntimeError(f"saving without a fault failed: {count}")
                counts.append(count if server.ranks == 1 else count[rank])
                shutil.rmtree(trial)
            numbers = [
                number * server.ranks + rank for rank in range(server.ranks) for number in range(1, counts[rank] + 1)
            ]
            points = [(number, kind) for number in numbers for kind in kinds]
            if sample is not None and sample < len(points):
                # One of each of so many equal runs: early, middle and late operations are always among them.
                ends = [len(points) * index // sample for index in range(sample + 1)]
                chance = random.Random(seed)
                points = [points[chance.randrange(*run)] for run in itertools.pairwise(ends)]
            verdicts: collections.Counter[str] = collections.Counter()
            violations = []
            for index, (number, kind) in enumerate(points):
                folder = work / str(index)
                shutil.copytree(base, folder, symlinks=True)
                returned, text = server.ask("save", str(folder), number, kind)
                verdict, why = judge(server, folder, returned)
                verdicts[verdict] += 1
                if verdict not in ("old", "new"):
                    ended = "save returned" if returned else f"save: {str(text)[-300:]}"
                    violations.append({"operation": number, "kind": kind, "verdict": verdict, "why": f"{ended}; {why}"})
                shutil.rmtree(folder)
            power = cut_power(server, base, work, power_cuts, seed) if power_cuts else None
            killed = kill(server, base, work, kills, seed) if kills and server.ranks == 1 else None
        finally:
            server.close()
    return {
        "writer": script.name,
        "operations": sum(counts),
        "points": len(points),
        "verdicts": dict(verdicts),
        "violations": violations,
        "power_cuts": power,
        "kills": killed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="+", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--power-cuts", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    bad = False
    for script in options.writers:
        begin = time.monotonic()
        result = run_matrix(
            script.absolute(),
            tuple(options.kinds.split(",")),
            options.sample,
            options.power_cuts,
            options.kills,
            options.seed,
        )
        results.append(result)
        violations = []
        for what, part in (("points", result), ("power cuts", result["power_cuts"]), ("kills", result["kills"])):
            if part is not None:
                print(f"{script.stem}: {part['points']} {what}: {_told(part['violations'])}")
                violations += part["violations"][:2]
        bad = bad or bool(violations)
        print(f"{script.stem}: {time.monotonic() - begin:.0f} s", flush=True)
        for violation in violations:
            print("  ", json.dumps(violation)[:600])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(bad)


def _told(violations: list[dict[str, Any]]) -> str:
    kinds = collections.Counter(f"{violation['verdict']} ({violation['kind']})" for violation in violations)
    return f"{len(violations)} violations" + "".join(f", {count} {what}" for what, count in kinds.most_common())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    else:
        raise SystemExit(main())
