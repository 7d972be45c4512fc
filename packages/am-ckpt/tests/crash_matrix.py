"""What a writer of checkpoints leaves behind when any one of its file operations goes wrong, or the power.

`python crash_matrix.py WRITER.py... [--share N] [--seed S] [--kinds kill,torn,...] [--power-cuts N] [--kills N]
[--json FILE]`; needs Linux and a C compiler. WRITER.py is any script with

- `save(folder: str, value: int)`: write a checkpoint whose content follows from `value`, or raise;
- `load(folder: str) -> int`: the value of the checkpoint that a restart would take, all of its content checked;
- optionally `setup(folder: str)`, what is there before (default: `save(folder, 1)`), and `RANKS = 4`: `save` is
  then called on four ranks of a gloo group, and the fault strikes one of them, another in turn.

All scripts are run by one process, which has imported what they need, and forks: what a script changes in other modules
it changes inside of these functions.

For every operation that changes files and every kind of fault, `save(folder, 2)` runs in a process of its own, with
the fault. Violations are: *lost*, neither 1 nor 2 can be loaded (or something that is neither); *lied*, `save`
returned but 2 is not what is loaded; *stuck*, 1 is loaded, and saving again without a fault does not help. A short
write and an interrupted call must be absorbed or reported, like any error.

`--share N` runs one of every N points, drawn with `--seed` (default: that of the commit, see commit_seed.py), so that
early, middle and late operations are always among them.

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
import gc
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from commit_seed import commit_seed, drawn_from

KINDS = ("kill", "torn", "short", "ENOSPC", "EIO", "ESTALE", "EINTR")
SECONDS = 60
AT_ONCE = 8


def can_inject() -> bool:
    """Whether operations can be made to fail here."""
    return sys.platform == "linux" and shutil.which("cc") is not None


def compile_shims(folder: Path) -> Path:
    sources = [Path(__file__).with_name(name) for name in ("faultshim.c", "staleshim.c")]
    library = folder / "shims.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, *sources, "-ldl"], check=True)
    return library


class Child:
    """A fork of this process that runs `action`, and is killed if that takes a minute."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._pipe, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._pipe)
            signal.alarm(SECONDS)
            try:
                answer = [True, action()]
            except BaseException:  # noqa: BLE001 - a child ends here, whatever happened
                answer = [False, traceback.format_exc(limit=-3)]
            os.write(write, json.dumps(answer).encode()[:60000])
            os._exit(0)
        os.close(write)

    def end(self, kill_after: float | None = None) -> tuple[bool, Any]:
        """Whether it returned, and what (or why not); killed after so many seconds."""
        if kill_after is not None and not select.select([self._pipe], [], [], kill_after)[0]:
            os.kill(self._pid, signal.SIGKILL)
        with os.fdopen(self._pipe, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(self._pid, 0)
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

        returned, _ = Child(use).end()
        for name in names.read_text().split() if returned else []:
            # Some are modules of nothing that can be found by name.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


class Writer:
    """A script in the process that forks for every point."""

    def __init__(self, script: str) -> None:
        self._functions = runpy.run_path(script)
        self.ranks: int = self._functions.get("RANKS", 1)
        import_lazy_modules(self._functions)

    def setup(self, folder: str) -> tuple[bool, Any]:
        setup = self._functions.get("setup", lambda folder: self._functions["save"](folder, 1))
        return Child(lambda: setup(folder)).end()

    def load(self, folder: str) -> tuple[bool, Any]:
        return Child(lambda: self._functions["load"](folder)).end()

    def killed(self, folder: str, seconds: float) -> tuple[bool, Any]:
        """Save, killed after so many seconds."""
        return Child(lambda: self._functions["save"](folder, 2)).end(seconds)

    def save(self, saves: list[tuple[str, int, str]], journal: str = "") -> list[tuple[bool, Any]]:
        """Save at the same time for each (folder, number, kind of fault): whether that returned, and how many
        operations of each rank there were, or why not.

        The number counts operations rank by rank: operation `number // ranks` of rank `number % ranks`.
        """
        with tempfile.TemporaryDirectory() as place:
            running = [
                [
                    Child(partial(self._rank, rank, *fault, journal, f"{place}/store-{index}"))
                    for rank in range(self.ranks)
                ]
                for index, fault in enumerate(saves)
            ]
            answers = [[child.end() for child in children] for children in running]
        # Where one rank says that it is saved, it is.
        return [
            (True, [value if returned else 0 for returned, value in ranks])
            if any(returned for returned, _ in ranks)
            else ranks[number % self.ranks]
            for (_, number, _), ranks in zip(saves, answers, strict=True)
        ]

    def _rank(self, rank: int, folder: str, number: int, kind: str, journal: str, store: str) -> int:
        shim = ctypes.CDLL(None)
        if self.ranks > 1:
            join_group(store, rank, self.ranks)
        struck = rank == number % self.ranks
        shim.faultshim_arm(folder.encode(), number // self.ranks if struck else 0, kind.encode())
        if journal:
            shim.faultshim_log(journal.encode())
        self._functions["save"](folder, 2)
        return shim.faultshim_count()

    def restart(self, places: list[tuple[str, bool]]) -> list[tuple[bool, Any, str]]:
        """For each (folder, whether to save again): whether it could be loaded, the value or why not, and where that is
        1 and 2 is to be saved again: why that is not possible. One process for all of them, if it lives."""
        if self.ranks == 1:
            ended, found = Child(lambda: [self._restart(*place) for place in places]).end()
            if ended:
                return found
            return [self.restart([place])[0] for place in places] if len(places) > 1 else [(False, found, "")]
        results = []
        for folder, again in places:
            loaded, value = self.load(folder)
            text = ""
            if again and loaded and value == 1:
                ((saved, reason),) = self.save([(folder, 0, "kill")])
                there = self.load(folder)
                text = "" if saved and there == (True, 2) else f"{reason}; load: {there}"
            results.append((loaded, value, text))
        return results

    def _restart(self, folder: str, again: bool) -> tuple[bool, Any, str]:
        value = None
        try:
            value = self._functions["load"](folder)
            if not again or value != 1:
                return True, value, ""
            self._functions["save"](folder, 2)
            there = self._functions["load"](folder)
            return True, value, "" if there == 2 else f"load: {there}"
        except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
            text = traceback.format_exc(limit=-3)
            return (False, text, "") if value is None else (True, value, text)


def serve() -> tuple[str, list[str]] | None:
    """The process that has imported the writers, and forks for every point: run with the shims preloaded.

    Returns in a fork that is to run a program of its own: its source and arguments.
    """
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "ready":
            answer: Any = True
        elif command == "run":
            source, *strings = arguments
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.dup2(write, 1)
                os.dup2(write, 2)
                return source, strings
            os.close(write)
            with os.fdopen(read, errors="replace") as pipe:
                text = pipe.read()
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
        elif command == "open":
            writer = Writer(*arguments)
            # Children then do not copy what only their collector would touch.
            gc.collect()
            gc.freeze()
            answer = writer.ranks
        else:
            answer = {
                "setup": writer.setup,
                "load": writer.load,
                "killed": writer.killed,
                "save": writer.save,
                "restart": writer.restart,
            }[command](*arguments)
        print(json.dumps(answer), flush=True)
    return None


class Server:
    """The process that runs writers, one after another, and other programs; it ends with the `with` statement."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory(prefix="crash-matrix-") as folder:
            preload = {"LD_PRELOAD": str(compile_shims(Path(folder)))} if can_inject() else {}
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **preload, "OMP_NUM_THREADS": "1"},
            )
            self.ranks = 1
            self.ask("ready")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def open(self, script: Path) -> None:
        """Use this script from now on."""
        self.ranks = self.ask("open", str(script.absolute()))

    def run(self, source: str, *arguments: str) -> tuple[int, str]:
        """Run a program as `python -c` does, but what is imported here is there already: exit code, all it printed."""
        code, text = self.ask("run", source, *arguments)
        return code, text

    def ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that runs the writers has ended at {command}")
        return json.loads(line)


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
    ((returned, text),) = server.ask("save", [(str(trial), 0, "kill")], str(journal))
    if not returned:
        raise RuntimeError(f"saving without a fault failed: {text}")
    shutil.rmtree(trial)
    chance = random.Random(seed)
    lines = journal.read_text().splitlines()

    def places() -> Iterator[Place]:
        for number in range(len(lines) + 1):
            if number:
                disk.apply(lines[number - 1])
            for index in range(cuts):
                folder = work / f"cut-{number}-{index}"
                disk.cut(folder, chance if index else None)
                yield Place(folder, number, "power", number == len(lines))

    return tally(server, places(), again=False)


def kill(server: Server, base: Path, work: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill `count` saves at random moments."""
    chance = random.Random(seed)

    def places() -> Iterator[Place]:
        seconds = []
        for index in range(3 + count):
            folder = work / f"killed-{index}"
            shutil.copytree(base, folder, symlinks=True)
            begin = time.monotonic()
            # The first three are not killed: they say how long a save takes.
            moment = chance.uniform(0, 1.1 * max(seconds)) if index >= 3 else SECONDS
            returned, text = server.ask("killed", str(folder), moment)
            if index < 3:
                seconds.append(time.monotonic() - begin)
                shutil.rmtree(folder)
            else:
                yield Place(folder, moment, "SIGKILL", returned, text)

    return tally(server, places())


@dataclass
class Place:
    """What a save that was disturbed has left in `folder`: at which operation (or second), how, whether it returned."""

    folder: Path
    operation: float
    kind: str
    returned: bool
    text: Any = ""


def tally(server: Server, places: Iterable[Place], *, again: bool = True) -> dict[str, Any]:
    """How often each verdict is given, and the violations; what has been judged is deleted."""
    verdicts: collections.Counter[str] = collections.Counter()
    violations = []
    rest = iter(places)
    while group := list(itertools.islice(rest, AT_ONCE)):
        asked = [(str(place.folder), again and not place.returned) for place in group]
        for place, found in zip(group, server.ask("restart", asked), strict=True):
            verdict, why = judge(place.returned, *found)
            verdicts[verdict] += 1
            if verdict not in ("old", "new"):
                ended = "save returned" if place.returned else f"save: {str(place.text)[-300:]}"
                what = {"operation": place.operation, "kind": place.kind, "verdict": verdict}
                violations.append({**what, "why": f"{ended}; {why}"})
            shutil.rmtree(place.folder)
    return {"points": verdicts.total(), "verdicts": dict(verdicts), "violations": violations}


def judge(returned: bool, loaded: bool, value: Any, text: str) -> tuple[str, str]:
    """The verdict after what `Writer.restart` has found: `old`, `new`, or a violation, and its description."""
    if not loaded or value not in (1, 2):
        return "lost", f"load: {value}"
    if value == 2:
        return "new", ""
    if returned:
        return "lied", "save returned, the old checkpoint is loaded"
    return ("stuck", f"saving again: {text}") if text else ("old", "")


def run_matrix(
    server: Server,
    script: Path,
    *,
    kinds: tuple[str, ...] = KINDS,
    share: int = 1,
    power_cuts: int = 0,
    kills: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """One of every `share` points; how often each verdict was given, and the violations."""
    with tempfile.TemporaryDirectory(prefix="crash-matrix-") as work_name:
        work = Path(work_name)
        server.open(script)
        base = work / "base"
        base.mkdir()
        prepared, text = server.ask("setup", str(base))
        if not prepared:
            raise RuntimeError(f"setup failed: {text}")
        counts = count_operations(server, base, work)
        numbers = [number * server.ranks + rank for rank, count in enumerate(counts) for number in range(1, count + 1)]
        every = [(number, kind) for number in numbers for kind in kinds]
        points = drawn_from(every, share, seed)

        def places() -> Iterator[Place]:
            rest = iter(points)
            # More ranks at a time would let others wait for longer than their timeout.
            while group := list(itertools.islice(rest, AT_ONCE if server.ranks == 1 else 3)):
                saves = [(work / f"{number}-{kind}", number, kind) for number, kind in group]
                for folder, _, _ in saves:
                    shutil.copytree(base, folder, symlinks=True)
                answers = server.ask("save", [(str(folder), number, kind) for folder, number, kind in saves])
                for save, (returned, text) in zip(saves, answers, strict=True):
                    yield Place(*save, returned, text)

        result = tally(server, places())
        power = cut_power(server, base, work, power_cuts, seed) if power_cuts else None
        killed = kill(server, base, work, kills, seed) if kills and server.ranks == 1 else None
    return {
        "writer": script.name,
        "operations": sum(counts),
        "all_points": len(every),
        "seed": seed,
        **result,
        "power_cuts": power,
        "kills": killed,
    }


def count_operations(server: Server, base: Path, work: Path) -> list[int]:
    """How many operations of each rank a save of `base` has; without a fault, it must work."""
    trial = work / "trial"
    shutil.copytree(base, trial, symlinks=True)
    ((returned, counts),) = server.ask("save", [(str(trial), 0, "kill")])
    if not returned or server.ask("load", str(trial)) != [True, 2]:
        raise RuntimeError(f"saving without a fault failed: {counts}")
    shutil.rmtree(trial)
    found: list[int] = counts
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="+", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--share", type=int, default=1)
    parser.add_argument("--power-cuts", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=commit_seed())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    bad = False
    print(f"seed {options.seed}", flush=True)
    with Server() as server:
        for script in options.writers:
            begin = time.monotonic()
            result = run_matrix(
                server,
                script,
                kinds=tuple(options.kinds.split(",")),
                share=options.share,
                power_cuts=options.power_cuts,
                kills=options.kills,
                seed=options.seed,
            )
            results.append(result)
            violations = []
            for what, part in (("points", result), ("power cuts", result["power_cuts"]), ("kills", result["kills"])):
                if part is not None:
                    told = f"{part['points']} of {part['all_points']}" if part is result else part["points"]
                    print(f"{script.stem}: {told} {what}: {_told(part['violations'])}")
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
        program = serve()
        if program is not None:
            code, sys.argv[1:] = program
            signal.alarm(SECONDS)
            # Else what ends with the interpreter would be told to have leaked.
            gc.unfreeze()
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    else:
        raise SystemExit(main())
