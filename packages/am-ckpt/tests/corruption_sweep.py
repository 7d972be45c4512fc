"""Damage checkpoints in many ways and count what the reader does: `python corruption_sweep.py`.

Every commit draws other damage, 200 flips of each kind of folder and 10,000 mutations, by a seed that is printed (see
commit_seed.py). `--seed` draws it again: what a flip or a mutation does follows from seed and number alone, whichever
process does it. Before a release, and after a change of what reads files:

    python corruption_sweep.py --flips 1000 --mutations 100000     # about five minutes on two cores
    python corruption_sweep.py --flips 1000 --mutations 1000000

Flips: single bits anywhere in folders of all kinds. `verify --full` must find every one of a step, of the weight
files of a merge with digests, and of what torch noted a CRC-32 of. In a plain Hugging Face folder there are no digests:
a flip of a weight is found only where it makes a NaN or infinity.

Mutations: headers, manifests (with the digest of their new content), indexes, configs, files of digests, `.metadata`
and archives, cut, spliced, or with one value replaced; the result is inspected, verified and merged. Every outcome but
a result, `ValueError` or `OSError` is a failure, and so is more than a second of processor time, more than 64 MiB
of new memory, and anything that the interpreter's audit hooks see beside the opening of files of the checkpoint itself.

Prints one JSON object; exits 1 after a failure, whose seed and input it prints.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from encodings import cp437, raw_unicode_escape  # noqa: F401 - loaded for names of old archives and old opcodes of text
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from commit_seed import commit_seed
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

import am_ckpt
from am_ckpt._files.step import seal

MEMORY = 64 * 2**20
SECONDS = 1.0
# What replaces a value: limits of integers and shapes, other types, other places.
WEIRD: tuple[Any, ...] = (
    *(0, 1, -1, 3, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 1.5, 1e308),
    *(None, True, "", "x", "../../etc/passwd", "/etc/passwd", ".", "\0", "a/b", "F32", "BF16", "I64", "F4", "é" * 300),
    *([], [0], [-1], [2**62, 2**62, 4], [1] * 70, [[]], {}, {"x": 1}, [None]),
)
# Audit events that a reader of checkpoints has no business with, by prefix; all opened files are looked at too.
FORBIDDEN = ("compile", "ctypes.", "exec", "marshal.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.system")
FORBIDDEN += ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.")


class TooLong(BaseException):
    """More than `SECONDS` of processor time."""


def make_step(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.1
    optimizer.step()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    files = {"config.json": '{"model_type": "x"}', "tokenizer.json": "{}", "chat_template.jinja": "x"}
    mapping = [{"file": "0.weight", "parameter": "0.weight", "slice": [[0, 30], [0, 40]], "transpose": False}]
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    am_ckpt.Checkpointer(folder / "run", files=files, mapping=mapping).save(3, state)
    return folder / "run" / "step_000003"


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {"embed_tokens.weight": (8, 4), "layers.0.up.weight": (6, 4), "layers.1.up.weight": (6, 4), "norm": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def make_distcp(folder: Path) -> Path:
    state = {"model": make_tensors(), "step": 3}
    dcp.save(state, storage_writer=FileSystemWriter(folder / "distcp", single_file_per_rank=False), no_dist=True)
    return folder / "distcp"


def make_shards(folder: Path) -> Path:
    target = folder / "shards"
    target.mkdir()
    for rank in range(2):
        halves = {name: tensor.chunk(2)[rank].contiguous() for name, tensor in make_tensors().items()}
        info = {
            name: {"saved_offsets": [rank * len(half)] + [0] * (half.dim() - 1), "global_shape": [2 * len(half), 4]}
            for name, half in halves.items()
        }
        info["norm"]["global_shape"] = [4]
        metadata = {"DCP_SHARDING_INFO": json.dumps(info)}
        save_file(halves, target / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=metadata)
    return target


def make_folder(folder: Path) -> Path:
    am_ckpt.merge(make_distcp(folder / "for_folder"), folder / "merged", max_shard_size=150)
    config = {"num_hidden_layers": 2, "vocab_size": 8, "hidden_size": 4, "tie_word_embeddings": True}
    (folder / "merged" / "config.json").write_text(json.dumps(config))
    (folder / "merged" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "merged" / "tokenizer.json").write_text("{}")
    return folder / "merged"


def make_digested(folder: Path) -> Path:
    """The same model, merged with digests."""
    am_ckpt.merge(folder / "merged", folder / "digested", max_shard_size=150, digest=True)
    return folder / "digested"


def make_bin(folder: Path) -> Path:
    target = folder / "bin"
    target.mkdir()
    whole = make_tensors()
    views = {"turned": whole["norm"].expand(3, 4).t(), "part": whole["embed_tokens.weight"][1:3, 2:]}
    torch.save({"model": {**whole, **views}, "step": 3}, target / "pytorch_model.bin")
    return target


def make_adapter(folder: Path) -> Path:
    target = folder / "adapter"
    target.mkdir()
    save_file(
        {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}, target / "adapter_model.safetensors"
    )
    (target / "adapter_config.json").write_text('{"r": 2}')
    return target


def part_of(path: Path, content: bytes, place: int) -> str:
    """What a byte of a file is."""
    if path.suffix == ".safetensors":
        start = 8 + struct.unpack("<Q", content[:8])[0]
        return "safetensors data" if place >= start else "safetensors header"
    if path.suffix not in (".bin", ".distcp"):
        return path.name
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data/0") for name in archive.namelist()):
            return f"{path.suffix} that holds no tensor"
        for info in archive.infolist():
            begin = info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26))
            if begin <= place < begin + info.file_size:
                return f"{path.suffix} member"
    return f"{path.suffix} beside the members"


def flips(count: int, seed: int) -> dict[str, Any]:
    """Flip `count` bits of each kind of folder, one at a time, half in files chosen alike whatever their size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folders = [make_step(folder), make_folder(folder), make_digested(folder), make_distcp(folder), make_bin(folder)]
        return _flips(folders, count, seed)


def _flips(folders: list[Path], count: int, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for folder in folders:
        name = folder.name.removesuffix("_000003")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        found: dict[str, list[int]] = {}
        for number in range(count):
            chance = random.Random(f"{seed} {name} {number}")
            path = chance.choice(files) if number % 2 else chance.choices(files, sizes)[0]
            original = path.read_bytes()
            place = chance.randrange(len(original))
            content = bytearray(original)
            content[place] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
            try:
                seen = am_ckpt.verify(folder, full=True, assume_complete=True).exit_code != 0
            except (ValueError, OSError):
                seen = True
            path.write_bytes(original)
            tally = found.setdefault(part_of(path, original, place), [0, 0])
            tally[0] += seen
            tally[1] += 1
        surely = {"step": list(found), "digested": [kind for kind in found if kind.startswith("safetensors")]}
        surely_found = surely.get(name, [kind for kind in found if kind.endswith(" member")])
        result[name] = {
            "missed": sum(found[kind][1] - found[kind][0] for kind in surely_found),
            "flips": count,
            "found": sum(seen for seen, _ in found.values()),
            "by part": {kind: f"{seen} of {total}" for kind, (seen, total) in sorted(found.items())},
        }
    return result


def spliced(content: bytes, chance: random.Random) -> bytes:
    """One to three changes of bytes: flipped, replaced, cut out, repeated, or the end cut off."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        here, there = chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)
        here, there = min(here, there), min(max(here, there), min(here, there) + 64)
        action = chance.randrange(6)
        if action == 0 and data:
            data[min(here, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif action == 1:
            data[here:there] = chance.randbytes(there - here)
        elif action == 2:
            del data[here:there]
        elif action == 3:
            data[here:here] = data[here:there]
        elif action == 4:
            del data[here:]
        else:
            data[here : here + 8] = chance.choice((b"\xff" * 8, b"\0" * 8, b"9" * 8, struct.pack("<q", 2**62)))
    return bytes(data)


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from nodes(inner)


def with_weird_value(value: Any, chance: random.Random) -> Any:
    """`value` (which is changed) with one of its parts replaced, removed, repeated or under another key."""
    places = list(nodes(value))
    if not places:
        return chance.choice(WEIRD)
    container, key = chance.choice(places)
    action = chance.randrange(6)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, list):
        container.append(container[key])
    elif action == 1:
        container[chance.choice([item for item in WEIRD if isinstance(item, str)])] = container.pop(key)
    elif action == 2:
        other, other_key = chance.choice(places)
        container[key] = json.loads(json.dumps(other[other_key]))
    else:
        container[key] = chance.choice(WEIRD)
    return value


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    return json.dumps(with_weird_value(json.loads(content), chance)).encode()


def mutated_header(content: bytes, chance: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    action = chance.randrange(3)
    if action == 0:
        return spliced(content[: 8 + length], chance) + data
    raw = json.loads(header)
    if action == 1 and "DCP_SHARDING_INFO" in raw.get("__metadata__", {}):
        info = with_weird_value(json.loads(raw["__metadata__"]["DCP_SHARDING_INFO"]), chance)
        raw["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    else:
        raw = with_weird_value(raw, chance)
    text = json.dumps(raw).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated_manifest(content: bytes, chance: random.Random) -> bytes:
    if not chance.randrange(4):
        return spliced(content, chance)
    manifest = json.loads(content)
    del manifest["xxh3_128"]
    changed = with_weird_value(manifest, chance)
    with contextlib.suppress(TypeError, ValueError):
        return seal(changed)
    return json.dumps(changed).encode()


def mutated_metadata(content: bytes, chance: random.Random) -> bytes:
    """A pickle with other bytes, or of the same objects with an attribute of one replaced."""
    if chance.randrange(2):
        return spliced(content, chance)
    root = pickle.loads(content)
    found: list[Any] = [root]
    for item in root.state_dict_metadata.values():
        found += [item, *vars(item).get("chunks", ())]
    found += [*root.storage_data.values(), *root.storage_data]
    target = chance.choice([item for item in found if vars(item)])
    key = chance.choice(list(vars(target)))
    value = torch.Size([2**62] * 3) if chance.randrange(8) == 0 else chance.choice(WEIRD)
    with contextlib.suppress(TypeError):
        # Not pickled by way of constructors, so frozen and hashed objects can be anything.
        object.__setattr__(target, key, value)
        return pickle.dumps(root)
    return pickle.dumps(value)


def mutated_archive(content: bytes, chance: random.Random) -> bytes:
    """An archive with other bytes, or of the same members with another pickle, or one of them twice."""
    action = chance.randrange(4)
    if not action:
        return spliced(content, chance)
    with zipfile.ZipFile(io.BytesIO(content)) as before:
        members = [(name, before.read(name)) for name in before.namelist()]
    members = [(name, spliced(data, chance) if name.endswith("data.pkl") else data) for name, data in members]
    if action == 1:
        members.append((chance.choice(members)[0], chance.choice(members)[1]))
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as after, warnings.catch_warnings(action="ignore"):
        for name, data in members:
            # Not by its name alone, which would be stored with the time.
            after.writestr(zipfile.ZipInfo(name), data)
    return result.getvalue()


Mutation = Callable[[bytes, random.Random], bytes]


def subjects(folder: Path) -> list[tuple[Path, Path, Mutation]]:
    """(checkpoint, file in it, how that is mutated)."""
    step, distcp, shards = make_step(folder), make_distcp(folder), make_shards(folder)
    merged, adapter = make_folder(folder), make_adapter(folder)
    digested, pickled = make_digested(folder), make_bin(folder)
    found: list[tuple[Path, Path, Mutation]] = [(step, step / "manifest.json", mutated_manifest)] * 3
    found += [(distcp, distcp / ".metadata", mutated_metadata)] * 3
    found += [(distcp, path, mutated_archive) for path in sorted(distcp.glob("*.distcp"))]
    found += [(pickled, pickled / "pytorch_model.bin", mutated_archive)] * 6
    for checkpoint in (shards, shards, merged, digested, adapter, step):
        found += [(checkpoint, path, mutated_header) for path in sorted(checkpoint.rglob("*.safetensors"))]
    digests = digested / "am_ckpt_digests.json"
    for path in (*sorted(merged.glob("*.json")), adapter / "adapter_config.json", digests, digests):
        found += [(path.parent, path, mutated_json), (path.parent, path, spliced)]
    return found


def attempt(checkpoint: Path, target: Path) -> str:
    """Inspect, verify and merge; the name of what happened."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        am_ckpt.inspect(checkpoint)
        am_ckpt.verify(checkpoint, full=True, assume_complete=True)
        am_ckpt.merge(checkpoint, target, threads=1, fsync=False, assume_complete=True)
        return "read"
    except (ValueError, OSError) as error:
        if not str(error).strip():
            raise AssertionError(f"{type(error).__name__} without a message") from error
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(target, ignore_errors=True)


def mutations(numbers: Sequence[int], seed: int) -> dict[str, Any]:
    """The mutations of these numbers, which go through all kinds of files; for a process of its own."""
    # To show a warning, modules are imported.
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        return _mutations(Path(name).resolve(), numbers, seed)


def _mutations(folder: Path, numbers: Sequence[int], seed: int) -> dict[str, Any]:
    inputs = subjects(folder)
    target = folder / "result"
    for checkpoint in {checkpoint for checkpoint, _, _ in inputs}:
        # Everything is imported and sound before limits are set.
        assert attempt(checkpoint, target) == "read", checkpoint
    watched: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event.startswith(FORBIDDEN) or (event == "import" and arguments[0] not in sys.modules):
            watched.append(f"{event} {arguments!r:.300}")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if not path.startswith((str(folder), "/proc/")):
                watched.append(f"open {path!r:.300}")

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong

    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, too_long)
    outcomes: dict[str, collections.Counter[str]] = {}
    failures: dict[str, str] = {}
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    done = 0
    for number in numbers:
        checkpoint, path, mutate = inputs[number % len(inputs)]
        original = path.read_bytes()
        content = mutate(original, random.Random(f"{seed} {number}"))
        path.write_bytes(content)
        problem = ""
        watching = True
        try:
            outcome = attempt(checkpoint, target)
        except (Exception, TooLong) as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            watching = False
            outcome, problem = "failed", "".join(traceback.format_exception(error, limit=-5))
        watching = False
        path.write_bytes(original)
        if watched:
            outcome, problem = "failed", "; ".join(watched)
            watched.clear()
        done += 1
        outcomes.setdefault(f"{checkpoint.name}/{path.suffix or path.name}", collections.Counter())[outcome] += 1
        if problem and problem not in failures:
            failures[problem] = f"number {number}, {path.name}: {content[:3000]!r}"
            if len(failures) == 20:
                break
        if done % 10_000 == 0:
            print(f"{done:,} of {len(numbers):,} mutations of this process", file=sys.stderr, flush=True)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"mutations": done, "outcomes": outcomes, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=commit_seed())
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that share the mutations")
    options = parser.parse_args()
    print(f"seed {options.seed}: {options.mutations:,} mutations", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"seed": options.seed}
    shares = [range(index, options.mutations, options.processes) for index in range(options.processes)]
    # Forks, before there are threads, have imported torch already.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("fork")) as pool:
        running = [pool.submit(mutations, share, options.seed) for share in shares if share]
        if options.flips:
            result |= flips(options.flips, options.seed)
        parts = [part.result() for part in running]
    outcomes: dict[str, collections.Counter[str]] = {}
    for part in parts:
        for kind, counts in part["outcomes"].items():
            outcomes.setdefault(kind, collections.Counter()).update(counts)
    result |= {
        "mutations": sum(part["mutations"] for part in parts),
        "outcomes": outcomes,
        "failures": {problem: where for part in parts for problem, where in part["failures"].items()},
    }
    print(json.dumps(result, indent=1))
    missed = any(part["missed"] for part in result.values() if isinstance(part, dict) and "missed" in part)
    return 1 if missed or result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
