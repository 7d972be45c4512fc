"""What a run is made of, for run.json: each value of the config and its origin, code, versions, data, weights, machine.

Everything here is cheap enough for the start of a run: files are read whole up to a size and in samples beyond, git is
asked for a diff and no more, and what somebody has digested already is not read again. Nothing here ends a run: what
cannot be found out says so in its place.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import socket
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import am_recipes
from am_recipes import sources
from am_recipes.run_config import RunConfig
from am_recipes.settings import command_line, is_secret, leaves, plain, written
from am_recipes.sinks.record import OURS, Launch

if TYPE_CHECKING:
    from am_recipes.build import Weights

# Up to here a file is read whole, which takes some milliseconds; beyond, as many blocks spread over it.
WHOLE_BYTES = 8 * 2**20
BLOCKS, BLOCK_BYTES = 16, 2**14
# More files than these are one line; of more than SAMPLED, so many are opened; more than LISTED are not even listed.
NAMED, SAMPLED, LISTED = 32, 256, 100_000
GIT_SECONDS = 5
# Folder and commit, on two lines.
_WHERE = ("rev-parse", "--show-toplevel", "HEAD")
# Variables that may change a number, a speed, or which machine part computes it.
_VARIABLES = re.compile(r"(OMP|MKL|CUDA|CUBLAS|NCCL|NVIDIA|TORCH|PYTORCH|TRITON)_\w+|HF_HUB_OFFLINE")
# What a scheduler calls the job, and how often it has started it.
_JOB = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    *("SLURM_RESTART_COUNT", "SKYPILOT_TASK_ID", "JOBSET_NAME", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


def launch(resume_step: int | None, world_size: int) -> Launch:
    """What this process knows of itself: command, code, versions, machine."""
    code = repositories()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "resume_step": resume_step,
        "world_size": world_size,
        "git": code.get("working directory"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "versions": versions(),
        "code": code | own_modules(),
        "environment": environment(),
    }


def of_ranks(config: RunConfig, weights: Weights, resume_step: int | None, world_size: int) -> Launch | None:
    """`of_run` on rank 0, None on the others; every rank calls it."""
    hosts = all_hosts()
    return None if torch.distributed.get_rank() else of_run(config, weights, resume_step, world_size, hosts)


def of_run(
    config: RunConfig, weights: Weights, resume_step: int | None, world_size: int, hosts: Mapping[str, int]
) -> Launch:
    """The same, with what a config says and names; `hosts` as `all_hosts` has them."""
    found = launch(resume_step, world_size)
    found["environment"] |= {"nodes": len(hosts), "hosts": dict(hosts)}
    values = plain(config)
    found["config"] = written(values, config.environment)
    found["origins"] = {path: _origin(config, path) for path, _ in leaves(values)}
    found["data"] = data_files(values) | weights_and_files(weights)
    return found


def _origin(config: RunConfig, path: str) -> str:
    """Where a value was set: `FILE:LINE`, `command line --FLAG` or `default`; behind it, where it refers to the
    environment, which variables.
    """
    if path not in config.places:
        return "default"
    where, _, flag = config.places[path].where.partition(" (--")
    origin = f"command line --{flag.removesuffix(')')}" if flag else where
    reference = config.environment.get(path)
    if reference is None:
        return origin
    names = dict.fromkeys(re.findall(r"(?<!\$)\$\{?(?:oc\.env:)?([A-Za-z_]\w*)", reference))
    told = (name if name in os.environ else f"{name} (not set)" for name in names)
    return f"{origin}, environment {', '.join(told)}"


def versions() -> dict[str, str]:
    """Python and every installed distribution."""
    found: dict[str, str] = {}
    for folder in map(Path, dict.fromkeys(sys.path)):
        # By the names of their folders (PEP 376): reading two hundred metadata files takes a quarter of a second.
        for name in sorted(entry.name for entry in _entries(folder) if entry.name.endswith(".dist-info")):
            distribution, _, version = name.removesuffix(".dist-info").partition("-")
            found.setdefault(re.sub(r"[-_.]+", "-", distribution).lower(), version)
    # Ours may lie elsewhere, as an editable installation that an import hook finds.
    ours = {name: found.get(name) or importlib.metadata.version(name) for name in OURS}
    return {"python": platform.python_version(), **ours, **dict(sorted(found.items()))}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def repositories() -> dict[str, str]:
    """The state of the git repositories of the `working directory` and, where this package is in one, of `am-recipes`:
    `COMMIT`, `COMMIT, changed: blake2b:...` (of the diff), or why that is not known. What git does not track is no part
    of it: see `own_modules`.
    """
    found, states = {}, dict[bytes | str, str]()
    for name, folder in {"working directory": Path.cwd(), "am-recipes": Path(am_recipes.__file__).parent}.items():
        if not _is_installed(folder) and any(os.path.lexists(each / ".git") for each in (folder, *folder.parents)):
            root = _git(folder, *_WHERE)
            states[root] = states.get(root) or _state(folder, root)
            found[name] = states[root]
    return found


def _state(folder: Path, root: bytes | str) -> str:
    """Of what git answers to `_WHERE` there."""
    if isinstance(root, str):
        # Of another user, as code that is mounted into a container may be: this runs nothing of the repository, while
        # a diff runs filters that its configuration may name.
        safe = _git(folder, "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *_WHERE)
        known = f"{safe.split()[-1].decode()}, changes " if isinstance(safe, bytes) else ""
        return f"{known}not known: {root}"
    commit = root.split()[-1].decode()
    options = ("--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative")
    diff = _git(folder, "diff", "HEAD", *options)
    if isinstance(diff, str):
        return f"{commit}, changes not known: {diff}"
    return f"{commit}, changed: {_digest(diff)}" if diff else commit


def _git(folder: Path, *arguments: str) -> bytes | str:
    """What git answers; text where it refuses, is not there, or takes too long."""
    # Without the locks that even reading takes, which somebody's commit may wait for.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    # Records of two machines are compared: in one language.
    environment = os.environ | {"LC_ALL": "C"}
    try:
        result = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return f"git took more than {GIT_SECONDS} s"
    except OSError as error:
        return f"git does not start: {error.strerror}"
    if result.returncode == 0:
        return result.stdout
    return next(iter(result.stderr.decode(errors="replace").splitlines()), f"git ended with {result.returncode}")


def own_modules() -> dict[str, str]:
    """The imported Python files in the working directory or beside the program, by their path from there, with their
    digests: a copied recipe, a user's dataset. Without what is installed, and our packages, which a repository tells.
    """
    folders = (Path.cwd(), Path(sys.argv[0]).absolute().parent)
    within, here = tuple(f"{folder}{os.sep}" for folder in folders), f"{Path(am_recipes.__file__).parent}{os.sep}"
    packages = {name.replace("-", "_") for name in OURS}
    found = {}
    for name, module in list(sys.modules.items()):
        # Anything may be put in there, and its attributes may be made when they are asked for.
        file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if not isinstance(file, str) or not file.startswith(within) or file.startswith(here):
            continue
        if file.endswith(".py") and name.partition(".")[0] not in packages and not _is_installed(Path(file)):
            root = next(folder for folder in folders if file.startswith(f"{folder}{os.sep}"))
            found[str(Path(file).relative_to(root))] = file_digest(Path(file))
    return dict(sorted(found.items()))


def _is_installed(path: Path) -> bool:
    return path.is_relative_to(sysconfig.get_path("stdlib")) or not {"site-packages", "dist-packages"}.isdisjoint(
        path.parts
    )


def environment() -> dict[str, Any]:
    """This machine and this process: host, processor or GPU with its libraries, variables, the job of a scheduler."""
    asked = (name for name in sorted(os.environ) if _VARIABLES.fullmatch(name) and not is_secret(name))
    variables = {name: os.environ[name] for name in asked}
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "variables": variables,
        "job": {name: os.environ[name] for name in _JOB if name in os.environ},
    }
    if not torch.cuda.is_available():
        return found
    driver = _first_match(Path("/proc/driver/nvidia/version"), r"(\d+\.\d+[.\d]*)")
    return found | {
        "gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}",
        "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }


def _processor() -> str:
    return _first_match(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()


def _first_match(file: Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, file.read_text(errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def all_hosts() -> dict[str, int]:
    """How many ranks each host has. Every rank calls it."""
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, socket.gethostname())
    return dict(sorted(Counter(names).items()))


def weights_and_files(weights: Weights) -> dict[str, str]:
    """Digests of the weights that a model starts from, and of the files that stand beside it as this run uses them:
    config, tokenizer, chat template.
    """
    found = {}
    for name, folder in weights.folders.items():
        try:
            digest = weights.fingerprints.get(name) or sources.fingerprint(folder)
        except OSError as error:
            found[f"{name} weights"] = f"not readable: {error.strerror}"
        else:
            found[f"{name} weights"] = f"blake2b of 16 blocks of each file:{digest}"
    for name, content in sorted(weights.files.items()):
        found[name] = _digest(content.encode() if isinstance(content, str) else content)
    return found


def data_files(values: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that `path`, anywhere in a dataset of the values of a config, names here."""
    found: dict[str, str] = {}
    for key in (key for key in values if key == "dataset" or key.startswith("validation_dataset")):
        for path, value in leaves(values[key]):
            # path, path.0 of a list, parts.1.path of a dataset in a dataset.
            if isinstance(value, str) and "path" in path.split(".")[-2:]:
                try:
                    found |= {f"{key}.{path}: {name}": digest for name, digest in _files_at(value)}
                except OSError as error:
                    found[f"{key}.{path}: {value}"] = f"not readable: {error.strerror}"
    return found


def _files_at(path: str) -> Iterator[tuple[str, str]]:
    """The files that a path or pattern names, each with its digest; of many, all together. None for a Hub id."""
    place = Path(path).expanduser()
    if place.is_file():
        yield path, file_digest(place)
        return
    names = (str(file) for file in place.rglob("*")) if place.is_dir() else glob.iglob(str(place), recursive=True)
    first = sorted(itertools.islice(names, LISTED + 1))
    if len(first) > LISTED:
        yield path, f"more than {LISTED:,} files, not read"
        return
    files = [file for file in map(Path, first) if file.is_file()]
    if len(files) <= NAMED:
        for file in files:
            yield str(file), file_digest(file)
        return
    digest = hashlib.blake2b(digest_size=16)
    sizes = [file.stat().st_size for file in files]
    digest.update("".join(f"{file.name}:{size};" for file, size in zip(files, sizes, strict=True)).encode())
    opened = sorted({len(files) * part // SAMPLED for part in range(SAMPLED)})
    for index in opened:
        _add_blocks(digest, files[index], sizes[index], 3)
    kind = f"blake2b of all names and sizes and 3 blocks of {len(opened)} files"
    yield path, f"{len(files):,} files, {sum(sizes):,} bytes, {kind}:{digest.hexdigest()}"


def file_digest(file: Path) -> str:
    """`SIZE bytes, blake2b:HEX` of all of it or, of a large file, `blake2b of 16 blocks:HEX`."""
    try:
        size = file.stat().st_size
        if size <= WHOLE_BYTES:
            return f"{size:,} bytes, {_digest(file.read_bytes())}"
        digest = hashlib.blake2b(digest_size=16)
        _add_blocks(digest, file, size, BLOCKS)
    except OSError as error:
        return f"not readable: {error.strerror}"
    return f"{size:,} bytes, blake2b of {BLOCKS} blocks:{digest.hexdigest()}"


def _add_blocks(digest: hashlib.blake2b, file: Path, size: int, number: int) -> None:
    """Add so many blocks of the file, from its beginning to its end."""
    with file.open("rb", buffering=0) as stream:
        for block in range(number):
            stream.seek(max(0, size - BLOCK_BYTES) * block // (number - 1))
            digest.update(stream.read(BLOCK_BYTES))


def _digest(content: bytes) -> str:
    return f"blake2b:{hashlib.blake2b(content, digest_size=16).hexdigest()}"
