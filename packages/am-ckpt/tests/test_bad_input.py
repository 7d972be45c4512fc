"""Every kind of damage to every kind of folder: the exit code, what the message names, and nothing else changed."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

import am_ckpt
from am_ckpt._cli import main
from am_ckpt._files.step import seal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHARD = "shard-00002-model-00001-of-00001.safetensors"
STEP_SHARD = "model/shard-00001-model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 4, generator=generator) for name in ("a", "b")}


def write_shard(folder: Path, rank: int, parts: dict[str, tuple[torch.Tensor, list[int]]], **metadata: str) -> None:
    """A file as torch's Hugging Face writer names and marks it."""
    info = {name: {"saved_offsets": offset} for name, (_, offset) in parts.items()}
    save_file(
        {name: tensor.contiguous() for name, (tensor, _) in parts.items()},
        folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors",
        metadata={"DCP_SHARDING_INFO": json.dumps(info), **metadata},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound folder of every kind, by its name."""
    root = tmp_path_factory.mktemp("whole")
    state = {"model": tensors(), "step": 3}
    dcp.save(state, storage_writer=FileSystemWriter(root / "distcp", single_file_per_rank=False), no_dist=True)
    (root / "shards").mkdir()
    for rank in range(3):
        parts = {name: (tensor[2 * rank : 2 * rank + 2], [2 * rank, 0]) for name, tensor in tensors().items()}
        write_shard(root / "shards", rank + 1, parts)
    model = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors().items()})
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    files = {"config.json": "{}"}
    am_ckpt.Checkpointer(root / "run", files=files).save(3, {"model": model, "optimizer": optimizer})
    (root / "run" / "step_000003").rename(root / "step")
    am_ckpt.merge(root / "distcp", root / "hf", max_shard_size=100)
    (root / "hf" / "config.json").write_text("{}")
    (root / "bin").mkdir()
    torch.save(tensors(), root / "bin" / "pytorch_model.bin")
    return root


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Times, sizes and contents; of huge files the size must do."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        small = path.is_file() and about.st_size < 2**20
        found[str(path.relative_to(folder))] = (about.st_mtime_ns, about.st_size, path.read_bytes() if small else b"")
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def change(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Damage one file; `*` is the first data file."""

    def damage(folder: Path) -> None:
        path = folder / file if "*" not in file else min(folder.glob(file))
        path.write_bytes(edit(path.read_bytes()))

    return damage


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Rewrite the header of a safetensors file; `edit` changes it in place or returns the bytes of another."""

    def rewrite(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        parsed = json.loads(content[8 : 8 + length])
        replaced = edit(parsed)
        text = replaced if isinstance(replaced, bytes) else json.dumps(parsed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return rewrite


def entry(name: str, **fields: Any) -> Callable[[bytes], bytes]:
    return header(lambda parsed: parsed[name].update(fields))


def info(name: str, **fields: Any) -> Callable[[bytes], bytes]:
    """Change what a shard says about the place of a tensor."""

    def edit(parsed: dict[str, Any]) -> None:
        said = json.loads(parsed["__metadata__"]["DCP_SHARDING_INFO"])
        said[name].update(fields)
        parsed["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(said)

    return header(edit)


def manifest(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrite the manifest of a step, with its right digest: damage that a writer made, not a disk."""

    def rewrite(content: bytes) -> bytes:
        parsed = json.loads(content)
        del parsed["xxh3_128"]
        edit(parsed)
        return seal(parsed)

    return change("manifest.json", rewrite)


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file if "*" not in file else min(folder.glob(file))).unlink()


def link(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / file
        path.rename(folder.parent / "elsewhere")
        path.symlink_to(folder.parent / "elsewhere")

    return damage


def pipe(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def metadata(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change what `.metadata` says."""

    def damage(folder: Path) -> None:
        parsed = FileSystemReader(folder).read_metadata()
        edit(parsed)
        (folder / ".metadata").write_bytes(pickle.dumps(parsed))

    return damage


def shift(parsed: Any) -> None:
    chunk = parsed.state_dict_metadata["model.a"].chunks[0]
    chunk.offsets = torch.Size([1, 0])
    for index in [index for index in parsed.storage_data if index.fqn == "model.a"]:
        place = parsed.storage_data.pop(index)
        parsed.storage_data[type(index)("model.a", torch.Size([1, 0]))] = place


def written(file: str, content: bytes) -> Callable[[Path], None]:
    return change(file, lambda _: content)


def archived(content: bytes) -> Callable[[Path], None]:
    """Weights whose pickle is `content`."""

    def damage(folder: Path) -> None:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", content)

    return damage


def nested(function: bytes, first: bytes, arguments: bytes) -> bytes:
    """A pickle of x = f(x, x, ...), again and again."""
    step = b"h\1" + arguments + b"Rq\0" + b"0"
    return b"\x80\2c" + function + b"q\1" + b"0" + first + b"q\0" + b"0" + step * 64


# As the key of a dict they are hashed.
sizes_of_sizes = nested(b"torch\nSize\n", b")", b"](h\0h\0e\x85") + b"}h\0K\1s."
tensors_of_tensors = nested(b"torch._utils\n_rebuild_tensor_v2\n", b"K\0", b"(h\0K\0h\0)t") + b"}(h\0K\1X\1\0\0\0wh\0u."
paths_of_paths = nested(b"pathlib\nPosixPath\n", b"X\1\0\0\0a", b"h\0h\0\x86") + b"h\0."
copies_of_dicts = nested(b"collections\nOrderedDict\n", b"}X\1\0\0\0aK\1s", b"h\0\x85") + b"h\0."
long_names = (
    b"\x80\2X" + struct.pack("<I", 2**16) + b"a" * 2**16 + b"q\0" + b"0" + b"}h\0" * 60 + b"K\1" + b"s" * 60 + b"."
)


def share_chunks(parsed: Any) -> None:
    parsed.state_dict_metadata["model.b"].chunks = parsed.state_dict_metadata["model.a"].chunks


def enlarge(parsed: Any) -> None:
    tensor = parsed.state_dict_metadata["model.a"]
    tensor.size = tensor.chunks[0].sizes = torch.Size([6, 2**40])


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@dataclass
class Row:
    """`kind` of folder, what is done to it, exit codes of merge and of verify, and what the messages say."""

    kind: str
    damage: Callable[[Path], None]
    code: int
    expected: tuple[str, ...]
    verify_code: int | None = None


AGAIN = ("copy",)
ROWS = {
    # Truncated, empty, too long.
    "shard cut": Row("shards", change(SHARD, lambda c: c[:-3]), 2, (SHARD, "truncated: the header describes", *AGAIN)),
    "shard empty": Row("shards", change(SHARD, lambda c: b""), 2, (SHARD, "0 bytes are too few", *AGAIN)),
    "shard longer": Row("shards", change(SHARD, lambda c: c + b"x"), 2, (SHARD, "belong to no tensor", *AGAIN)),
    "distcp cut": Row(
        "distcp",
        change("*.distcp", lambda c: c[:-3]),
        2,
        (".distcp is truncated: it has", "'model.", "is at bytes", *AGAIN),
    ),
    "distcp empty": Row(
        "distcp", change("*.distcp", lambda c: b""), 2, (".distcp is truncated: it has 0 bytes", *AGAIN)
    ),
    "step cut": Row("step", change(STEP_SHARD, lambda c: c[:-1]), 2, (STEP_SHARD, "bytes, ", "were written", *AGAIN)),
    "step longer": Row("step", change(STEP_SHARD, lambda c: c + b"x"), 2, (STEP_SHARD, "were written", *AGAIN)),
    "state cut": Row(
        "step", change("state/optimizer.json", lambda c: c[:-1]), 0, ("state/optimizer.json", "were written", *AGAIN), 2
    ),
    "weights cut": Row("hf", change(SECOND, lambda c: c[:-1]), 2, (SECOND, "truncated: the header describes", *AGAIN)),
    "bin cut": Row("bin", change("pytorch_model.bin", lambda c: c[:-9]), 2, ("pytorch_model.bin is damaged", *AGAIN)),
    # Missing, or of another save.
    "shard missing": Row(
        "shards", remove(SHARD), 3, ("'a' F32 [6, 4]: [2:4, 0:4] is in no file", "8 of 24 elements missing", *AGAIN)
    ),
    "distcp missing": Row(
        "distcp", remove("*.distcp"), 3, ("1 files that .metadata names are missing", "'model.", "Copy")
    ),
    "metadata missing": Row("distcp", remove(".metadata"), 3, ("but no .metadata", "take an earlier step")),
    "step file missing": Row("step", remove(STEP_SHARD), 3, (STEP_SHARD, "written by rank 0, is missing", *AGAIN)),
    "weights missing": Row("hf", remove(SECOND), 3, (f"{SECOND} is missing", "expects 2 files")),
    "manifest missing": Row("step", remove("manifest.json"), 3, ("without its manifest.json", "take an earlier step")),
    "stale shard": Row(
        "shards",
        lambda folder: write_shard(folder, 9, {"a": (torch.ones(2, 4), [1, 0])}),
        2,
        ("'a' F32 [6, 4]: [1:2, 0:4] is in two files", "remove the stale one"),
    ),
    "shards of two saves": Row(
        "shards",
        change(SHARD, header(lambda h: h["__metadata__"].update(am_ckpt_save_id="x"))),
        2,
        ("2 saves", "stale"),
    ),
    # Parts that do not fit together.
    "overlap": Row(
        "shards", change(SHARD, info("b", saved_offsets=[1, 0])), 2, ("'b' F32 [6, 4]: [1:2, 0:4]", "two files")
    ),
    "gap": Row(
        "shards", change(SHARD, info("b", saved_offsets=[4, 0])), 2, ("'b' F32 [6, 4]: [4:6, 0:4]", "two files")
    ),
    "gap alone": Row(
        "shards",
        lambda folder: write_shard(folder, 3, {"a": (torch.ones(2, 4), [4, 0]), "b": (torch.ones(1, 4), [5, 0])}),
        3,
        ("'b' F32 [6, 4]: [4:5, 0:4] is in no file", "4 of 24 elements missing"),
    ),
    "outside": Row(
        "shards",
        change(SHARD, info("b", saved_offsets=[2, 1], global_shape=[6, 4])),
        2,
        ("'b' F32 [6, 4]: [2:4, 1:5] in", SHARD, "lies outside"),
    ),
    "outside of distcp": Row("distcp", metadata(shift), 2, ("'a' F32 [6, 4]: [1:7, 0:4] in", "lies outside")),
    "dtypes": Row("shards", change(SHARD, entry("a", dtype="I32")), 2, (SHARD, "'a' is I32, the others say F32")),
    "other dims": Row("shards", change(SHARD, info("a", saved_offsets=[2])), 2, (SHARD, "'a'", "it needs 2 sizes")),
    # Headers.
    "header too long": Row(
        "hf", change(SECOND, lambda c: struct.pack("<Q", 2**63) + c[8:]), 2, (SECOND, f"claims {2**63} bytes", *AGAIN)
    ),
    "negative size": Row(
        "hf", change(SECOND, entry("b", shape=[-6, 4])), 2, (SECOND, "'b'", "[-6, 4]", "non-negative")
    ),
    "overflowing size": Row("hf", change(SECOND, entry("b", shape=[2**62, 4])), 2, (SECOND, "'b'", "do not fit F32")),
    "duplicate keys": Row(
        "hf", change(SECOND, header(lambda h: b'{"b":1,"b":2}')), 2, (SECOND, "the key 'b' occurs twice", *AGAIN)
    ),
    "NaN": Row("hf", change(SECOND, header(lambda h: b'{"b":NaN}')), 2, (SECOND, "NaN is not JSON", *AGAIN)),
    "nested": Row("hf", change(SECOND, header(lambda h: b"[" * 10**5)), 2, (SECOND, "not valid JSON", *AGAIN)),
    "hole": Row("hf", change(SECOND, entry("b", data_offsets=[8, 104])), 2, (SECOND, "'b' leaves a hole before it")),
    "index without names": Row("hf", change(INDEX, lambda c: b"{}"), 2, (INDEX, "no weight_map", *AGAIN)),
    "index cut": Row("hf", change(INDEX, lambda c: c[:-9]), 2, (INDEX, "not valid JSON", *AGAIN)),
    "index of other tensors": Row(
        "hf", change(INDEX, lambda c: c.replace(b'"b"', b'"c"')), 2, (INDEX, "'c'", "lacks it")
    ),
    # Manifests.
    "manifest cut": Row(
        "step", change("manifest.json", lambda c: c[:-5]), 2, ("manifest.json: not valid JSON", *AGAIN)
    ),
    "manifest empty": Row("step", change("manifest.json", lambda c: b""), 2, ("manifest.json: not valid JSON", *AGAIN)),
    "manifest changed": Row(
        "step",
        change("manifest.json", lambda c: c.replace(b'"step": 3', b'"step": 4')),
        2,
        ("the digest it carries", *AGAIN),
    ),
    "manifest of the future": Row(
        "step",
        manifest(lambda m: m.update(version=2)),
        8,
        ("has format version 2, this release reads 1", "take the release that wrote it"),
    ),
    "manifest of nothing": Row("step", manifest(lambda m: m.update(files=3)), 2, ("it has files=3",)),
    "huge manifest": Row(
        "step", lambda folder: os.truncate(folder / "manifest.json", 2**40), 2, (f"{2**40} bytes, more than",)
    ),
    "huge metadata": Row("distcp", lambda folder: os.truncate(folder / ".metadata", 2**40), 2, ("bytes, more than",)),
    "huge index": Row("hf", lambda folder: os.truncate(folder / INDEX, 2**40), 2, (INDEX, "bytes, more than")),
    # Leading elsewhere.
    "manifest leads out": Row(
        "step", manifest(lambda m: m["files"][0].update(path="../x/y")), 4, ("names the file '../x/y'", "only files")
    ),
    "index leads out": Row(
        "hf",
        change(INDEX, lambda c: c.replace(SECOND.encode(), b"../secret.safetensors")),
        4,
        ("'../secret.safe", "only"),
    ),
    "index absolute": Row(
        "hf", change(INDEX, lambda c: c.replace(SECOND.encode(), b"/etc/passwd")), 4, ("'/etc/passwd'",)
    ),
    "linked shard": Row("shards", link(SHARD), 4, (SHARD, "is a symbolic link", "cp -L")),
    "linked step": Row("step", link(STEP_SHARD), 4, (STEP_SHARD, "is a symbolic link", "cp -L")),
    "linked manifest": Row("step", link("manifest.json"), 4, ("manifest.json is a symbolic link",)),
    "linked metadata": Row("distcp", link(".metadata"), 4, (".metadata is a symbolic link",)),
    "pipe": Row("shards", pipe(SHARD), 4, (SHARD, "is not a regular file")),
    "pipe as metadata": Row("distcp", pipe(".metadata"), 4, (".metadata is not a regular file",)),
    "pipe as manifest": Row("step", pipe("manifest.json"), 4, ("manifest.json is not a regular file",)),
    "name that leads out": Row(
        "distcp",
        metadata(lambda m: [setattr(place, "relative_path", "../x.distcp") for place in m.storage_data.values()]),
        4,
        ("in '../x.distcp'; only files of the folder itself",),
    ),
    # A few bytes that speak of much.
    "sizes of sizes": Row("distcp", written(".metadata", sizes_of_sizes), 2, ("a torch.Size that no tensor has",)),
    "weights under sizes of sizes": Row("bin", archived(sizes_of_sizes), 2, ("a torch.Size that no tensor has",)),
    "paths of paths": Row("distcp", written(".metadata", paths_of_paths), 2, ("holds str instead of",)),
    "weights in weights": Row("bin", archived(tensors_of_tensors), 1, ("holds no tensors",)),
    "copies of dicts": Row("bin", archived(copies_of_dicts), 2, ("its pickle cannot be read",)),
    "sets of sets": Row("bin", archived(b"\x80\x04(\x91."), 4, ("the pickle has a set",)),
    "keys again and again": Row("bin", archived(long_names), 2, ("its dicts are", "as a name")),
    "dicts in dicts": Row(
        "bin", archived(b"\x80\x02" + b"}X\1\0\0\0a" * 99 + b"K\1" + b"s" * 99 + b"."), 2, ("65 deep",)
    ),
    "chunks of many tensors": Row("distcp", metadata(share_chunks), 2, ("and another tensor have the same chunks",)),
    "tensor of too few bytes": Row("distcp", metadata(enlarge), 2, ("'model.a' [6, 1099511627776] of F32 is in",)),
    # Code.
    "code in metadata": Row(
        "distcp",
        change(".metadata", lambda c: pickle.dumps(Code())),
        4,
        ("refers to posix.mkdir", "nothing was executed"),
    ),
    "code in an entry": Row(
        "distcp",
        # What is no tensor is never opened, so it can hold anything.
        metadata(lambda m: m.planner_data.update({"x": Code()})),
        4,
        ("refers to posix.mkdir", "nothing was executed"),
    ),
    "code in an archive": Row(
        "distcp",
        # With --full, the changed bytes are found too; they are not what matters most.
        change("*.distcp", lambda c: c.replace(b"torch._utils\n_rebuild", b"posix.system\n_rebuild")),
        4,
        ("refers to posix.system._rebuild_tensor_v2", "nothing was executed"),
    ),
    "code in weights": Row(
        "bin",
        lambda folder: torch.save({"a": torch.ones(2), "args": Code()}, folder / "pytorch_model.bin"),
        4,
        ("pytorch_model.bin", "refers to posix.mkdir", "nothing was executed"),
    ),
    "a side file of pickles": Row(
        "step",
        lambda folder: (folder / "state" / "rng.pt").write_bytes(pickle.dumps(Code())),
        0,
        ("ok",),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_table(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ROWS[name]
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    shutil.copytree(whole / row.kind, source)
    row.damage(source)
    around, before = names_in(tmp_path), snapshot(source)
    assert main(["merge", "source", "merged"]) == row.code
    first = capsys.readouterr()
    if row.code:
        # Nothing is visible, nor hidden.
        assert names_in(tmp_path) == around
    else:
        shutil.rmtree("merged")
    code = row.code if row.verify_code is None else row.verify_code
    assert main(["verify", "source", "--full"]) == code
    second = capsys.readouterr()
    said = [first.out + first.err] if row.code else []
    for text in [*said, second.out + second.err]:
        assert all(part in text for part in row.expected), text
    # Neither the source nor its times, and nothing was executed.
    assert (names_in(tmp_path), snapshot(source)) == (around, before)


def model_of(value: float) -> dict[str, Any]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    return {"model": model}


MANIFESTS = ["manifest cut", "manifest empty", "manifest changed", "huge manifest"]


@pytest.mark.parametrize("name", [*MANIFESTS, "manifest of nothing", "manifest missing", "pipe as manifest"])
def test_a_step_with_such_a_manifest_is_skipped_loudly_and_an_error_by_name(name: str, tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    for step in (2, 3):
        checkpoints.save(step, model_of(step))
    ROWS[name].damage(tmp_path / "step_000003")
    state = model_of(0)
    with pytest.warns(UserWarning, match=r"SKIPPED a damaged checkpoint, going back to step_000002: .*step_000003"):
        assert checkpoints.load(state) == 2
    assert state["model"].weight[0, 0] == 2
    with pytest.raises(ValueError, match="step_000003"):
        checkpoints.load(state, "step_000003")


def test_times_and_the_way_of_copying_mean_nothing(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path / "run")
    for step in (1, 2, 3):
        checkpoints.save(step, model_of(step))
    # As cp -r without -p, in any order, on a machine whose clock is wrong.
    copied = tmp_path / "copied"
    for number, step in enumerate(("step_000003", "step_000001", "step_000002")):
        shutil.copytree(tmp_path / "run" / step, copied / step, copy_function=shutil.copyfile)
        for path in (*copied.rglob("*"), copied / step):
            os.utime(path, (10**9 * number, 10**9 * number))
        assert am_ckpt.verify(copied / step, full=True).problems == []
    state = model_of(0)
    assert am_ckpt.Checkpointer(copied, keep_last=2).load(state) == 3
    am_ckpt.Checkpointer(copied, keep_last=2).save(4, model_of(4))
    assert [name for name in names_in(copied) if name != "latest"] == ["step_000003", "step_000004"]


def test_what_a_crash_left_of_a_delete_is_removed_by_the_next_save(tmp_path: Path) -> None:
    checkpoints = am_ckpt.Checkpointer(tmp_path)
    checkpoints.save(1, model_of(1))
    (tmp_path / "step_000001").rename(tmp_path / ".trash-step_000001-0123abcd")
    (tmp_path / ".trash-talk").mkdir()
    checkpoints.save(2, model_of(2))
    # Only what has the name of a delete of ours.
    assert names_in(tmp_path) == [".trash-talk", "latest", "step_000002"]


def test_a_source_that_is_deleted_while_it_is_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "hf", tmp_path / "source")

    def delete(done: int, total: int) -> None:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)

    # Files that are open stay readable; the first that is not is named.
    with pytest.raises(FileNotFoundError, match=SECOND):
        am_ckpt.merge(tmp_path / "source", tmp_path / "merged", threads=1, progress=delete)
    assert not (tmp_path / "merged").exists()


def test_a_destination_that_appears_while_merging_is_not_replaced(whole: Path, tmp_path: Path) -> None:
    def appear(done: int, total: int) -> None:
        (tmp_path / "merged").mkdir(exist_ok=True)
        (tmp_path / "merged" / "thesis.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="was made by someone else in the meantime"):
        am_ckpt.merge(whole / "shards", tmp_path / "merged", progress=appear, assume_complete=True)
    assert names_in(tmp_path / "merged") == ["thesis.txt"]
    (tmp_path / "merged" / "thesis.txt").unlink()
    # And whoever comes next does not have to wait for anything.
    am_ckpt.merge(whole / "shards", tmp_path / "merged", assume_complete=True)
    assert names_in(tmp_path) == ["merged"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_merge_that_could_not_be_published_blocks_nobody(resume: bool, whole: Path, tmp_path: Path) -> None:
    merge = functools.partial(am_ckpt.merge, whole / "shards", tmp_path / "merged", assume_complete=True)
    with pytest.raises(OSError, match="merged"):
        merge(progress=lambda done, total: (tmp_path / "merged").touch())
    (tmp_path / "merged").unlink()
    merge(resume=resume)
    assert names_in(tmp_path) == ["merged"]


def test_values_that_a_cast_makes_infinite_are_counted_and_named(tmp_path: Path, capsys: Any) -> None:
    large = torch.ones(3, 5)
    large[1, 2], large[2, 4], large[0, 0] = 7e4, -1e30, torch.inf
    (tmp_path / "source").mkdir()
    save_file({"large": large, "small": torch.full((4,), 65504.0)}, tmp_path / "source" / "model.safetensors")
    assert main(["merge", str(tmp_path / "source"), str(tmp_path / "merged"), "--dtype", "float16"]) == 0
    assert "note: 2 values of 1 tensors are too large for the new dtype and are infinite now: large (2)" in (
        capsys.readouterr().out
    )
    assert main(["merge", str(tmp_path / "source"), str(tmp_path / "again"), "--dtype", "bfloat16"]) == 0
    assert "infinite" not in capsys.readouterr().out


def test_a_like_of_other_shapes_throughout(whole: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text("{}")
    save_file({"a": torch.ones(6, 5), "b": torch.ones(6, 5)}, tmp_path / "like" / "model.safetensors")
    arguments = ["merge", str(whole / "distcp"), str(tmp_path / "merged"), "--like", str(tmp_path / "like")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "is of another shape: 'a' is [6, 4], there [6, 5]; 'b' is" in error
    assert "give the folder of the model that was trained" in error
    # One that was enlarged is not another model.
    save_file({"a": torch.ones(6, 5), "b": torch.ones(6, 4)}, tmp_path / "like" / "model.safetensors")
    assert main(arguments) == 0
    assert "note: 1 tensors of other shape than in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["merge", "out"], "am-ckpt: interrupted; the same command with --resume goes on\n"),
        (["merge", "out", "--no-fsync"], "am-ckpt: interrupted\n"),
        (["verify", "--full"], "am-ckpt: interrupted\n"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    command: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    count = 2**31
    text = json.dumps({"w": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    with open("source/model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        # Sparse: to read it takes longer than the interrupt needs.
        file.truncate(8 + len(text) + count)
    Path("source/config.json").write_text("{}")
    assert main(["inspect", "source"]) == 0
    capsys.readouterr()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert main([command[0], "source", *command[1:]]) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert capsys.readouterr().err == expected
    assert not Path("out").exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Any:
    """A folder in which nothing can be written, whoever asks."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("root can write everywhere, and here it cannot mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_folders_in_which_nothing_can_be_written(read_only: Path, whole: Path, capsys: Any) -> None:
    for command in (["merge"], ["reshard", "--mesh", "dp=2"], ["convert", "--to", "dcp"]):
        arguments = [command[0], str(whole / "distcp"), str(read_only / "out"), *command[1:]]
        assert main(arguments) == 5
        assert str(read_only) in capsys.readouterr().err
    with pytest.raises(OSError, match=f"step 1 was not saved in .*{read_only}"):
        am_ckpt.Checkpointer(read_only).save(1, model_of(1))


def test_long_names_and_names_in_every_script(tmp_path: Path, capsys: Any) -> None:
    names = ["слой/0 вес", "層 重み", "with\ttab", "x" * 1000, "emoji 🙂", "quote\"'"]
    model = nn.Module()
    for index, name in enumerate(names):
        model.register_parameter(name, nn.Parameter(torch.full((2, 3), float(index))))
    am_ckpt.Checkpointer(tmp_path / "run").save(1, {"model": model})
    step = tmp_path / "run" / "step_000001"
    assert main(["verify", str(step), "--full"]) == 0
    assert main(["merge", str(step), str(tmp_path / "merged")]) == 0
    assert main(["diff", str(step), str(tmp_path / "merged"), "--json"]) == 0
    assert main(["inspect", str(step), "--tensors", "*"]) == 0
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: int(value[0, 0]) for name, value in found.items()} == {name: i for i, name in enumerate(names)}
    assert "層 重み  F32 [2, 3]" in capsys.readouterr().out
