"""What headers say becomes a plan: random layouts against arrays, and texts that other parsers read in two ways."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
from commit_seed import commit_seed
from safetensors.numpy import load_file, save_file

import am_ckpt

DTYPES = {"uint8": "U8", "int16": "I16", "float32": "F32", "float64": "F64"}
Part = tuple[str, tuple[int, ...], numpy.ndarray]


def write(
    folder: Path, rank: int, parts: list[Part], style: str = "torch", shapes: dict[str, Any] | None = None
) -> Path:
    """A shard file; headers of all styles are equally long and mean the same. `shapes`: to be said in the file."""
    entries: dict[str, Any] = {}
    info: dict[str, Any] = {}
    position = 0
    for name, offset, values in parts:
        place = [position, position + values.nbytes]
        entries[name] = {"dtype": DTYPES[str(values.dtype)], "shape": list(values.shape), "data_offsets": place}
        info[name] = {"saved_offsets": list(offset)} | ({"global_shape": shapes[name]} if shapes is not None else {})
        position += values.nbytes
    if style == "other order":
        info = dict(reversed(info.items()))
    said = json.dumps(info, indent=1) if style == "spread" else json.dumps(info)
    if style == "escaped":
        said = said.replace('"saved_offsets"', r'"\u0073aved_offsets"')
    metadata = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": said}}
    header = {**entries, **metadata} if style == "metadata last" else {**metadata, **entries}
    text = json.dumps(header, separators=None if style == "spread" else (",", ":"))
    if style == "escaped":
        text = text.replace('"dtype"', r'"\u0064type"')
    return write_text(folder, rank, text.ljust(2**16), b"".join(values.tobytes() for _, _, values in parts))


def write_text(folder: Path, rank: int, text: str, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return path


def cut(rng: random.Random, offset: tuple[int, ...], shape: tuple[int, ...], regular: bool) -> list[Any]:
    """Boxes that tile a tensor: pieces of pieces, or (`regular`) a grid."""
    boxes = [(offset, shape)]
    for dim in [dim for dim in range(len(shape)) if rng.random() < 0.7]:
        points = sorted(rng.sample(range(1, shape[dim]), min(rng.randrange(4), shape[dim] - 1)))
        found = []
        for place, size in boxes:
            if not regular:
                points = sorted(rng.sample(range(1, shape[dim]), min(rng.randrange(3), shape[dim] - 1)))
            for start, stop in zip([0, *points], [*points, shape[dim]], strict=True):
                found.append(((*place[:dim], start, *place[dim + 1 :]), (*size[:dim], stop - start, *size[dim + 1 :])))
        boxes = found
    return boxes


def layout(seed: int) -> tuple[dict[str, numpy.ndarray], list[list[Part]]]:
    """Random tensors, and the parts of them that the files of some ranks hold."""
    rng, values = random.Random(seed), numpy.random.default_rng(seed)
    tensors: dict[str, numpy.ndarray] = {}
    ranks: list[list[Part]] = [[] for _ in range(rng.randrange(1, 6))]
    for index in range(rng.randrange(1, 8)):
        shape = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(5)))
        dtype = rng.choice(list(DTYPES))
        tensor = values.integers(0, 256, numpy.prod(shape, dtype=int) * numpy.dtype(dtype).itemsize, numpy.uint8)
        name = f"model.layers.{index}.weight"
        tensors[name] = tensor.view(dtype).reshape(shape)
        boxes = cut(rng, (0,) * len(shape), shape, rng.random() < 0.5)
        rng.shuffle(boxes)
        free = list(range(len(ranks)))
        # One file has one part of a tensor: boxes that are too many make more files.
        while len(free) < len(boxes):
            ranks.append([])
            free.append(len(ranks) - 1)
        rng.shuffle(free)
        for (offset, size), rank in zip(boxes, free, strict=False):
            part = tensors[name][tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]
            ranks[rank].append((name, offset, numpy.ascontiguousarray(part).reshape(size)))
    return tensors, [parts for parts in ranks if parts]


def bits(tensors: dict[str, numpy.ndarray]) -> dict[str, Any]:
    return {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in tensors.items()}


# With each commit, others; more of them in slow.
NUMBERS = [*range(10), *(pytest.param(number, marks=pytest.mark.slow) for number in range(10, 100))]


@pytest.mark.parametrize("number", NUMBERS)
def test_random_layouts_are_put_together(number: int, tmp_path: Path) -> None:
    seed = commit_seed() + number
    tensors, ranks = layout(seed)
    shapes = {name: list(value.shape) for name, value in tensors.items()} if seed % 2 else None
    for rank, parts in enumerate(ranks):
        write(tmp_path / "shards", rank, parts, shapes=shapes)
    inventory = am_ckpt.inspect(tmp_path / "shards")
    assert inventory.problems == []
    assert inventory.exact_shapes == bool(seed % 2)
    if shapes is None:
        with pytest.raises(ValueError, match="nothing shows that the files of the last ranks are there, after shard-"):
            am_ckpt.merge(tmp_path / "shards", tmp_path / "merged")
    am_ckpt.merge(tmp_path / "shards", tmp_path / "merged", max_shard_size=200, assume_complete=shapes is None)
    found = {
        name: value for path in (tmp_path / "merged").glob("*.safetensors") for name, value in load_file(path).items()
    }
    assert bits(found) == bits(tensors)


@pytest.mark.parametrize("damage", ["hole", "twice", "outside"])
@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_whole_is_named(number: int, damage: str, tmp_path: Path) -> None:
    seed = commit_seed() + number
    candidates: list[tuple[int, int]] = []
    while not candidates:
        tensors, ranks = layout(seed)
        seed += 1000
        places = [(rank, index) for rank, parts in enumerate(ranks) for index in range(len(parts))]
        # Not of tensors that would be gone as a whole, or that have no outside.
        candidates = [(i, j) for i, j in places if ranks[i][j][2].size < tensors[ranks[i][j][0]].size]
    rank, index = random.Random(seed).choice(candidates)
    name, offset, part = ranks[rank][index]
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    held = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    box = "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(offset, part.shape, strict=True)) + "]"
    if damage == "hole":
        del ranks[rank][index]
        expected = f"{box} is in no file ({part.size} of {tensors[name].size} elements missing"
    elif damage == "twice":
        ranks.append([(name, offset, part)])
        expected = f"{box} is in two files, {held} and "
    else:
        moved = (shapes[name][0] - part.shape[0] + 1, *offset[1:])
        ranks[rank][index] = (name, moved, part)
        expected = f"in {tmp_path / 'shards' / held} lies outside"
    for number, parts in enumerate(ranks):
        write(tmp_path / "shards", number, parts, shapes=shapes)
    (problem,) = am_ckpt.inspect(tmp_path / "shards").problems
    what = f"{name!r} {DTYPES[str(part.dtype)]} {shapes[name]}: "
    assert str(problem).startswith(what)
    assert expected in str(problem)
    with pytest.raises(type(problem)) as refused:
        am_ckpt.merge(tmp_path / "shards", tmp_path / "merged")
    assert str(refused.value) == str(problem)
    assert not (tmp_path / "merged").exists()


def test_parts_that_only_begin_and_end_where_they_should(tmp_path: Path) -> None:
    values = numpy.arange(4, dtype=numpy.uint8).reshape(2, 2)
    write(tmp_path / "shards", 0, [("w", (0, 0), values[:1, :1])], shapes={"w": [2, 2]})
    write(tmp_path / "shards", 1, [("w", (0, 1), numpy.ascontiguousarray(values[:, 1:]))], shapes={"w": [2, 2]})
    (problem,) = am_ckpt.inspect(tmp_path / "shards").problems
    assert "'w' U8 [2, 2]: [1:2, 0:1] is in no file (1 of 4 elements missing" in str(problem)


@pytest.mark.parametrize("style", ["metadata last", "other order", "spread", "escaped"])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_said_otherwise_is_the_same(seed: int, style: str, tmp_path: Path) -> None:
    _, ranks = layout(seed)
    plain = []
    for each in ("torch", style):
        for rank, parts in enumerate(ranks):
            write(tmp_path / "shards", rank, parts, each)
        plain.append(am_ckpt.inspect(tmp_path / "shards").to_json())
    assert plain[0] == plain[1]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_tensor_of_many_parts(dim: int, tmp_path: Path) -> None:
    values = numpy.random.default_rng(0).integers(0, 2**15, (1100, 1200), numpy.int16)
    for rank, part in enumerate(numpy.array_split(values, 37, dim)):
        offset = [0, 0]
        offset[dim] = sum(piece.shape[dim] for piece in numpy.array_split(values, 37, dim)[:rank])
        halves = numpy.array_split(part, 2, 1 - dim)
        for half, piece in enumerate(halves):
            offset[1 - dim] = half * halves[0].shape[1 - dim]
            write(tmp_path / "shards", 2 * rank + half, [("w", tuple(offset), numpy.ascontiguousarray(piece))])
    am_ckpt.merge(tmp_path / "shards", tmp_path / "merged", assume_complete=True)
    assert bits(load_file(tmp_path / "merged" / "model.safetensors")) == bits({"w": values})
    am_ckpt.reshard(tmp_path / "merged", tmp_path / "again", mesh={"dp": 5, "tp": 3}, placements={"w": 1})
    assert am_ckpt.diff(tmp_path / "shards", tmp_path / "again").differences == []


def test_ranges_that_meet_are_one_copy_of_at_most_64_mib(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    half = 72 * 2**20
    entries = {
        name: {"dtype": "U8", "shape": [half], "data_offsets": [i * half, (i + 1) * half]}
        for i, name in enumerate("ab")
    }
    text = json.dumps(entries).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * half)
    done: list[int] = []
    am_ckpt.merge(source, tmp_path / "merged", threads=1, fsync=False, progress=lambda now, total: done.append(now))
    assert done == [64 * 2**20, 128 * 2**20, 144 * 2**20]


def filled(template: str, *values: object) -> str:
    """The template with its `@` replaced."""
    for value in values:
        template = template.replace("@", str(value), 1)
    return template


ENTRY = '{"dtype":"U8","shape":[2],"data_offsets":[@,@]}'
A, B = filled(ENTRY, 0, 2), filled(ENTRY, 2, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (filled('{"a":@,"a":@}', A, B), "the key 'a' occurs twice"),
        (filled(r'{"a":@,"\u0061":@}', A, B), "the key 'a' occurs twice"),
        (filled('{"__metadata__":{},"a":@,"a":@}', A, B), "the key 'a' occurs twice"),
        (filled(r'{"__metadata__":{"x":"\\\""},"a":@,"\u0061":@}', A, B), "the key 'a' occurs twice"),
        (filled('{"__metadata__":{},"a":@,"__metadata__":{},"b":@}', A, B), "'__metadata__' occurs twice"),
        (filled('{"__metadata__":{"x":"1","x":"1"},"a":@,"b":@}', A, B), "the key 'x' occurs twice"),
        (filled('{"a":@,"b":@,"__metadata__":{"x":"1","x":"1"}}', A, B), "the key 'x' occurs twice"),
        (filled('{"a":@,"b":@}', A, B.replace("{", '{"dtype":"U8",')), "the key 'dtype' occurs twice"),
        (filled('{"__metadata__":{},"a":@,"b":@}', A, B.replace("{", '{"shape":[2],')), "'shape' occurs twice"),
        # Names that end in a backslash hide nothing.
        (
            filled(r'{"__metadata__":{},"a\\":@,"b\\":@}', A, B.replace("{", '{"shape":[2],')),
            "the key 'shape' occurs twice",
        ),
        # A string in the place of a number does not hide the string of a dropped key.
        (filled('{"__metadata__":{},"a":@,"b":@}', A, B.replace("{", '{"dtype":"U8",').replace("[2]", '"2"')), "twice"),
        (
            filled('{"__metadata__":{},"a":@,"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4],"x":1}}', A),
            "exactly dtype",
        ),
        (filled('{"__metadata__":{},"a":@,"b":[1,2,3]}', A), "exactly dtype, shape and data_offsets"),
        (filled('{"__metadata__":{"x":1},"a":@,"b":@}', A, B), "__metadata__ must map strings to strings"),
        (filled('{"__metadata__":[],"a":@,"b":@}', A, B), "__metadata__ must map strings to strings"),
        ("[1]", "the header is list, not an object"),
        (filled('{"a":@,"b":@', A, B), "not valid JSON"),
        (filled('{"__metadata__":{},"a":@,"b":@}}', A, B), "not valid JSON"),
    ],
)
def test_headers_that_can_be_read_in_two_ways_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "shards", 0, text, bytes(4))
    with pytest.raises(ValueError, match="copy the file again") as refused:
        am_ckpt.inspect(tmp_path / "shards")
    assert str(refused.value).startswith(str(path))
    assert expected in str(refused.value)


@pytest.mark.parametrize("key", ["shape", "data_offsets"])
@pytest.mark.parametrize(
    "value",
    [
        "[true]",
        "[2.0]",
        "[2e0]",
        "[-2]",
        "[9223372036854775808]",
        '["2"]',
        "[null]",
        "[[2]]",
        "2",
        "{}",
        "[NaN]",
        "[Infinity]",
    ],
)
def test_numbers_that_are_no_sizes_are_refused(value: str, key: str, tmp_path: Path) -> None:
    for metadata in ("", '"__metadata__":{},'):
        bad = json.loads(B.replace("NaN", "0")) | {key: 0}
        entry = json.dumps(bad).replace(f'"{key}": 0', f'"{key}": {value}')
        write_text(tmp_path / "shards", 0, filled('{@"a":@,"b":@}', metadata, A, entry), bytes(4))
        with pytest.raises(ValueError, match=r"tensor 'b'.* is not a list of|is not JSON"):
            am_ckpt.inspect(tmp_path / "shards")


@pytest.mark.parametrize(
    ("shape", "end", "expected"),
    [
        ([2**32, 2**32], 4, "offsets .* do not fit"),
        ([2**62, 8], 4, "offsets .* do not fit"),
        ([2**63 - 1, 2, 0], 4, "offsets .* do not fit"),
        # 2 modulo 2 ** 64.
        ([7, 7905747460161236407, 2], 4, "offsets .* do not fit"),
        ([3], 4, "offsets .* do not fit"),
        ([1] * 65 + [2], 4, "has 66 dims, more than 64"),
        ([1], 3, "followed by bytes that belong to no tensor"),
        ([4], 6, "truncated: the header describes"),
    ],
)
def test_shapes_that_no_file_can_hold_are_refused(shape: list[int], end: int, expected: str, tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [2, end]}
    write_text(tmp_path / "shards", 0, filled('{"__metadata__":{},"a":@,"b":@}', A, json.dumps(entry)), bytes(4))
    with pytest.raises(ValueError, match=expected):
        am_ckpt.inspect(tmp_path / "shards")


def test_holes_and_overlaps_inside_of_a_file_are_named(tmp_path: Path) -> None:
    for begin, expected in ((1, "overlaps the tensor before it"), (3, "leaves a hole before it")):
        path = write_text(
            tmp_path / "shards", 0, filled('{"a":@,"b":@}', A, filled(ENTRY, begin, begin + 2)), bytes(begin + 2)
        )
        start = path.stat().st_size - begin - 2
        with pytest.raises(
            ValueError, match=rf"tensor 'b' {expected} \(begins at byte {start + begin}, expected {start + 2}\)"
        ):
            am_ckpt.inspect(tmp_path / "shards")


def sharded(folder: Path, info: str, names: tuple[str, str] = ("a", "b")) -> None:
    entries = ",".join(f"{json.dumps(name)}:{entry}" for name, entry in zip(names, (A, B), strict=True))
    text = filled('{"__metadata__":{"DCP_SHARDING_INFO":@},@}', json.dumps(info), entries)
    write_text(folder, 0, text, bytes(4))


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ('{"a": {"saved_offsets": [0]}, "a": {"saved_offsets": [0]}}', "the key 'a' occurs twice"),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0]}, "a": {"saved_offsets": [0]}}', "'a' occurs twice"),
        (r'{"a": {"saved_offsets": [0]}, "\u0061": {"saved_offsets": [0]}}', "the key 'a' occurs twice"),
        (
            '{"a": {"saved_offsets": [0], "saved_offsets": [0]}, "b": {"saved_offsets": [0]}}',
            "'saved_offsets' occurs twice",
        ),
        # What another entry is does not hide it.
        ('{"a": {"saved_offsets": [0], "saved_offsets": [0]}, "b": {"saved_offsets": [0]}, "c": "zz"}', "occurs twice"),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0]}} {}', "not valid JSON"),
        ('{"a": {"saved_offsets": [0]]}, "b": {"saved_offsets": [0]}}', "not valid JSON"),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [NaN]}}', "NaN is not JSON"),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [true]}}', "of 'b' is .* it needs 1 sizes"),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0.0]}}', "of 'b' is .* it needs 1 sizes"),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [-1]}}', "of 'b' is .* it needs 1 sizes"),
        (
            '{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [4611686018427387904]}}',
            "of 'b' is .* it needs 1 sizes",
        ),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0, 0]}}', "of 'b' is .* it needs 1 sizes"),
        (
            '{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0], "global_shape": [2, 2]}}',
            "of 'b' .* needs 1 sizes",
        ),
        ('{"a": {"saved_offsets": [0]}, "b": {"saved_offsets": null}}', "of 'b' is .* it needs saved_offsets"),
        ('{"a": {"saved_offsets": [0]}, "b": 1}', "of 'b' is .* it needs saved_offsets"),
        ('{"a": {"saved_offsets": [0]}, "b"x": {"saved_offsets": [0]}}', "not valid JSON"),
        ('{"a": {"saved_offsets": [0]}, "b\n": {"saved_offsets": [0]}}', "not valid JSON"),
        ("[]", "DCP_SHARDING_INFO is list, not an object"),
        ('{"a": {"saved_offsets": [1]}, "b": {"saved_offsets": [0]}}', r"\[0:1\] is in no file"),
    ],
)
def test_sharding_that_is_not_said_clearly_is_refused(info: str, expected: str, tmp_path: Path) -> None:
    sharded(tmp_path / "shards", info)
    with pytest.raises(ValueError, match=expected):
        am_ckpt.inspect(tmp_path / "shards").require_whole()


def test_an_entry_may_be_absent_or_say_more_than_others(tmp_path: Path) -> None:
    sharded(tmp_path / "shards", '{"b": {"saved_offsets": [0], "global_shape": [2], "more": "x"}, "c": {}}')
    inventory = am_ckpt.inspect(tmp_path / "shards")
    assert (inventory.problems, inventory.exact_shapes) == ([], False)
    assert {name: source.shape for name, source in inventory.tensors.items()} == {"a": (2,), "b": (2,)}


NAMES = [
    ('x"', 'y": {"saved_offsets": [0]}, "z'),
    ("a\\", "\\a"),
    ('"data_offsets"', '"dtype":"U8"'),
    ("__metadata", '"__metadata__": {'),
    ("é", "\u2028"),
    ('}, "', "]"),
    ("", " "),
    ("a\x00", "a"),
    ("a\nb", "a\\nb"),
]


@pytest.mark.parametrize("names", NAMES)
def test_names_that_look_like_a_header(names: tuple[str, str], tmp_path: Path) -> None:
    for ascii_only in (True, False):
        info = json.dumps({name: {"saved_offsets": [0]} for name in names}, ensure_ascii=ascii_only)
        sharded(tmp_path / "shards", info, names)
        inventory = am_ckpt.inspect(tmp_path / "shards")
        assert inventory.problems == []
        places = [(source.shape, source.chunks[0].begin) for source in inventory.tensors.values()]
        start = places[0][1]
        assert dict(zip(inventory.tensors, places, strict=True)) == {
            names[0]: ((2,), start),
            names[1]: ((2,), start + 2),
        }


def test_a_file_without_sharding_holds_whole_tensors(tmp_path: Path) -> None:
    write_text(tmp_path / "shards", 0, filled('{"a":@,"b":@}', A, B), b"wxyz")
    write(tmp_path / "shards", 1, [("c", (0,), numpy.arange(3, dtype=numpy.uint8))], shapes={"c": [3]})
    inventory = am_ckpt.inspect(tmp_path / "shards")
    assert (inventory.problems, inventory.exact_shapes) == ([], True)
    write_text(tmp_path / "shards", 2, filled('{"b":@}', A), b"yz")
    (problem,) = am_ckpt.inspect(tmp_path / "shards").problems
    assert "[0:2] is in two files" in str(problem)


@pytest.mark.parametrize(
    "name", ["_flat_param", "flat_param", "layers.0._fsdp_wrapped_module._flat_param", "flat_param_0"]
)
@pytest.mark.parametrize("kind", ["dcp-safetensors", "huggingface"])
def test_flattened_parameters_are_refused_in_every_kind_of_folder(kind: str, name: str, tmp_path: Path) -> None:
    values = numpy.arange(4, dtype=numpy.uint8)
    (tmp_path / "source").mkdir()
    if kind == "huggingface":
        save_file({name: values}, tmp_path / "source" / "model.safetensors")
    else:
        write(tmp_path / "source", 0, [(name, (0,), values)])
    assert am_ckpt.inspect(tmp_path / "source").kind == kind
    with pytest.raises(ValueError, match=r"flat_param.*' is a flattened FSDP1 parameter"):
        am_ckpt.merge(tmp_path / "source", tmp_path / "merged")


@pytest.mark.parametrize("content", ["{}", '{"format": "other"}', "[", ""])
def test_a_manifest_of_another_program_does_not_make_a_step(content: str, tmp_path: Path) -> None:
    tmp_path.joinpath("manifest.json").write_text(content)
    save_file({"a": numpy.arange(4, dtype=numpy.uint8)}, tmp_path / "model.safetensors")
    assert am_ckpt.inspect(tmp_path).kind == "huggingface"
    assert am_ckpt.verify(tmp_path).kind == "huggingface"


@pytest.mark.parametrize("content", ["{}", '{"format": "am-cjpt"}', "[", ""])
def test_a_damaged_manifest_of_ours_stays_an_error(content: str, tmp_path: Path) -> None:
    import torch

    am_ckpt.Checkpointer(tmp_path).save(1, {"model": torch.nn.Linear(2, 2)})
    (tmp_path / "step_000001" / "manifest.json").write_text(content)
    for folder in (tmp_path / "step_000001", tmp_path / "step_000001" / "model"):
        with pytest.raises(ValueError, match=r"manifest\.json"):
            am_ckpt.inspect(folder)
