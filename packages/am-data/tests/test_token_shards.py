"""Token shards, written byte for byte by hand or by the writer, and their windows."""

from __future__ import annotations

import pickle
import resource
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch

import am_data

MAGIC, LEGACY_MAGIC = 278895051, 20240520
BOS = 7


def write_by_hand(path, tokens, *, magic=MAGIC, version=1, count=None, item_size=2, cut=0):
    """A shard as the nanoGPT scripts write it; `cut` bytes are missing at its end."""
    header = np.zeros(256, dtype="<i4")
    header[:4] = (magic, version, len(tokens) if count is None else count, 0 if magic == LEGACY_MAGIC else item_size)
    content = header.tobytes() + np.asarray(tokens, dtype=f"<u{2 if item_size == 2 else 4}").tobytes()
    path.write_bytes(content[: len(content) - cut])
    return path


def windows(dataset):
    return [
        (window["input_ids"].tolist(), window["labels"].tolist())
        for window in map(dataset.__getitem__, range(len(dataset)))
    ]


def stream(num_tokens, seed=0, bos_every=None):
    tokens = np.random.default_rng(seed).integers(8, 60_000, num_tokens)
    if bos_every:
        tokens[::bos_every] = BOS
    return tokens


@pytest.mark.parametrize("options", [{}, {"item_size": 4}, {"magic": LEGACY_MAGIC}])
def test_a_shard_written_by_hand(tmp_path, options):
    path = write_by_hand(tmp_path / "a.bin", [5, 6, 65_535, 8, 9, 10, 11, 12], **options)
    dataset = am_data.TokenShards(path, 3)
    assert windows(dataset) == [([5, 6, 65_535], [5, 6, 65_535, 8]), ([8, 9, 10], [8, 9, 10, 11])]
    assert dataset[0]["input_ids"].dtype == dataset[0]["labels"].dtype == np.int64
    assert windows(dataset)[-1][0] == dataset[-1]["input_ids"].tolist()
    assert dataset.lengths.tolist() == [3, 3]
    assert str(dataset.report) == (
        "8 tokens in 1 shards: 2 windows of 3, 6 targets\n1 tokens left out (12.50%), at the end"
    )
    assert dataset.report.samples == []


def test_four_bytes_hold_large_ids(tmp_path):
    path = write_by_hand(tmp_path / "a.bin", [1, 2**32 - 1, 3], item_size=4)
    assert am_data.TokenShards(path, 2)[0]["labels"].tolist() == [1, 2**32 - 1, 3]


def test_windows_go_on_in_the_next_shard_and_every_token_is_a_target_once(tmp_path):
    tokens = stream(101)
    # Tokens of 2 and 4 bytes, a shard of a single token, and numbers that a plain sort would put out of order.
    for number, (begin, end) in enumerate([(0, 40), (40, 41), (41, 42), (42, 90), (90, 101)], start=8):
        write_by_hand(tmp_path / f"train_{number}.bin", tokens[begin:end], item_size=4 if number % 2 else 2)
    for paths in (
        tmp_path,
        str(tmp_path / "train_*.bin"),
        [tmp_path / f"train_{number}.bin" for number in range(8, 13)],
    ):
        dataset = am_data.TokenShards(paths, 10)
        assert len(dataset) == 10
        inputs, labels = zip(*windows(dataset))
        assert list(chain.from_iterable(inputs)) == tokens[:100].tolist()
        assert list(chain.from_iterable(label[1:] for label in labels)) == tokens[1:].tolist()
        assert dataset.report.num_left_out == 0
    batch = am_data.collate([dataset[0], dataset[1]], layout="padded")
    assert torch.equal(batch["shift_labels"].flatten(), torch.from_numpy(tokens[1:21]))
    assert batch["document_ids"].tolist() == [[1] * 10] * 2


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("shard_tokens", [1000, 17])
def test_aligned_windows_start_at_the_first_bos_after_the_one_before(tmp_path, indexed, shard_tokens):
    lengths = np.random.default_rng(1).integers(1, 12, 60)
    documents = [stream(length, seed) for seed, length in enumerate(lengths)]
    am_data.write_token_shards(documents, tmp_path, bos_token_id=BOS, shard_tokens=shard_tokens)
    if not indexed:
        for index in tmp_path.glob("*.bos.idx"):
            index.unlink()
    tokens = list(chain.from_iterable([BOS, *document] for document in documents))
    expected, seen, begin = [], set(), 0
    while begin + 6 < len(tokens) + 1:
        if tokens[begin] != BOS:
            begin += 1
            continue
        if begin + 6 > len(tokens):
            break
        expected.append((tokens[begin : begin + 5], tokens[begin : begin + 6]))
        seen.update(range(begin, begin + 6))
        begin += 5
    dataset = am_data.TokenShards(tmp_path, 5, bos_token_id=BOS, align_to_bos=True)
    assert windows(dataset) == expected
    assert len(expected) > 20
    assert dataset.report.num_left_out == len(tokens) - len(seen)
    assert f"{len(tokens) - len(seen)} tokens left out" in str(dataset.report)


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(6, 1), (7, 2)])
def test_the_last_aligned_window_needs_its_target(tmp_path, num_tokens, num_windows):
    path = write_by_hand(tmp_path / "a.bin", [BOS, 1, 2, BOS, 4, 5, 6][:num_tokens])
    dataset = am_data.TokenShards(path, 3, bos_token_id=BOS, align_to_bos=True)
    assert windows(dataset) == [([BOS, 1, 2], [BOS, 1, 2, BOS]), ([BOS, 4, 5], [BOS, 4, 5, 6])][:num_windows]
    assert dataset.report.num_left_out == num_tokens - (4, 7)[num_windows - 1]


def test_split_documents_keep_every_target(tmp_path):
    tokens = [1, BOS, 2, 3, BOS, BOS, 4, 5, BOS]
    path = write_by_hand(tmp_path / "a.bin", tokens)
    dataset = am_data.TokenShards(path, 8, bos_token_id=BOS, split_documents=True)
    pieces = [(piece["input_ids"].tolist(), piece["labels"].tolist()) for piece in dataset[0]]
    assert pieces == [
        ([1], [1, BOS]),
        ([BOS, 2, 3], [BOS, 2, 3, BOS]),
        ([BOS], [BOS, BOS]),
        ([BOS, 4, 5], [BOS, 4, 5, BOS]),
    ]
    batch = am_data.collate([dataset[0]], layout="padded")
    assert {name: tensor[0].tolist() for name, tensor in batch.items()} == {
        "input_ids": tokens[:-1],
        "position_ids": [0, 0, 1, 2, 0, 0, 1, 2],
        "shift_labels": tokens[1:],
        "document_ids": [1, 2, 2, 2, 3, 4, 4, 4],
    }


def test_the_tokenizer_gives_bos_and_vocabulary(tmp_path, tokenizer):
    path = write_by_hand(tmp_path / "a.bin", [tokenizer.bos_token_id, 20, tokenizer.bos_token_id, 21])
    assert len(am_data.TokenShards(path, 3, split_documents=True, tokenizer=tokenizer)[0]) == 2
    too_large = write_by_hand(tmp_path / "b.bin", [1, len(tokenizer), 3])
    with pytest.raises(ValueError, match=f"token 1, beyond the tokenizer's vocabulary of {len(tokenizer)} ids; tok"):
        am_data.TokenShards(too_large, 2, tokenizer=tokenizer)
    # The model's vocabulary wins, larger or smaller.
    assert len(am_data.TokenShards(too_large, 2, tokenizer=tokenizer, vocab_size=len(tokenizer) + 1)) == 1
    with pytest.raises(ValueError, match=r"a.bin has token id 20 at token 1, beyond vocab_size=20; .* of the model"):
        am_data.TokenShards(path, 2, tokenizer=tokenizer, vocab_size=20)


def test_an_id_beyond_the_vocabulary_is_found_when_its_window_is_read(tmp_path):
    tokens = np.full(100_000, 3)
    tokens[33_333] = 500
    path = write_by_hand(tmp_path / "a.bin", tokens)
    dataset = am_data.TokenShards(path, 100, vocab_size=500)
    assert dataset[332]["labels"].max() == 3
    with pytest.raises(ValueError, match=r"a.bin has token id 500 at token 33333, beyond vocab_size=500; tokenise"):
        dataset[333]


def global_steps(dataset, world_size, steps, state=None):
    """The windows of each step over all ranks, as their first tokens, and the state after them."""
    loaders = [
        am_data.DataLoader(
            dataset,
            collate=partial(am_data.collate, layout="padded"),
            global_batch_size=8,
            local_batch_size=2,
            rank=rank,
            world_size=world_size,
            seed=5,
        )
        for rank in range(world_size)
    ]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    iterators = [iter(loader) for loader in loaders]
    taken = []
    for _ in range(steps):
        batches = [batch for iterator in iterators for batch in next(iterator)]
        rows = [
            row for batch in batches for row in zip(batch["input_ids"], batch["shift_labels"], batch["document_ids"])
        ]
        taken.append(sorted((ids[0].item(), labels[-1].item()) for ids, labels, documents in rows if documents.any()))
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
    return taken, loaders[0].state_dict()


def test_a_run_goes_on_at_any_world_size_and_sees_every_window_once_an_epoch(tmp_path):
    # Distinct tokens, so that its first token names a window.
    tokens = np.random.default_rng(0).permutation(50_000)[: 53 * 20 + 4]
    am_data.write_token_shards([tokens], tmp_path, shard_tokens=333)
    dataset = am_data.TokenShards(tmp_path, 20)
    uninterrupted, end = global_steps(dataset, 1, 14)
    taken, state = [], None
    for world_size, steps in ((1, 3), (2, 4), (4, 7)):
        # What a rank holds travels to a new process, as at a restart.
        part, state = global_steps(pickle.loads(pickle.dumps(dataset)), world_size, steps, state)
        taken += part
    assert taken == uninterrupted
    assert state == end
    assert len(pickle.dumps(state)) < 500
    every_window = sorted((int(tokens[at]), int(tokens[at + 20])) for at in range(0, 53 * 20, 20))
    for epoch in (taken[:7], taken[7:]):
        assert sorted(chain.from_iterable(epoch)) == every_window


def test_hundreds_of_shards_keep_no_file_open(tmp_path):
    tokens = stream(900)
    am_data.write_token_shards([tokens], tmp_path, shard_tokens=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        dataset = am_data.TokenShards(tmp_path, 150)
        read = np.concatenate([dataset[index]["input_ids"] for index in range(len(dataset))])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert dataset.report.num_files == 300
    assert read.tolist() == tokens[:750].tolist()


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    tokens = stream(5000)

    def fingerprint(name, content, *arguments, **options):
        (tmp_path / name).mkdir()
        am_data.write_token_shards([content], tmp_path / name, prefix=name, shard_tokens=2000)
        return am_data.TokenShards(tmp_path / name, *(arguments or (10,)), **options).fingerprint

    first = fingerprint("a", tokens)
    assert fingerprint("b", tokens) == first
    others = [
        fingerprint("c", np.roll(tokens, 1)),
        fingerprint("d", tokens[:-1]),
        fingerprint("e", tokens, 11),
        fingerprint("f", tokens, bos_token_id=int(tokens[0]), align_to_bos=True),
        fingerprint("g", tokens, bos_token_id=int(tokens[0]), split_documents=True),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cut": 3},
            r"a.bin is truncated: 1041 bytes, but 10 tokens of 2 bytes and the header are 1044; copy or write",
        ),
        ({"cut": 500}, r"a.bin has 544 bytes, a shard's header alone 1024: truncated; write it again"),
        ({"count": 9}, r"a.bin is longer than its header says: 1044 bytes, but 9 tokens of 2 bytes"),
        ({"count": 0}, r"a.bin says it holds 0 tokens, at least 1"),
        ({"count": -1}, r"a.bin says it holds -1 tokens, at least 1"),
        ({"magic": 42}, r"a.bin starts with 42, a token shard with 278895051 or 20240520; give"),
        ({"version": 2}, r"a.bin has format version 2, only 1 is known"),
        ({"item_size": 8}, r"a.bin says 8 bytes per token, which must be 2 or 4"),
    ],
)
def test_broken_shards_are_named(tmp_path, options, message):
    write_by_hand(tmp_path / "a.bin", range(10), **options)
    with pytest.raises(ValueError, match=message):
        am_data.TokenShards(tmp_path / "a.bin", 3)


def test_impossible_arguments_are_errors(tmp_path):
    path = write_by_hand(tmp_path / "a.bin", range(10))
    for arguments, options, message in [
        ((path, 0), {}, "sequence_length=0 must be at least 1"),
        ((path, 10), {}, r"10 tokens in 1 shards, .*a.bin first, are fewer than one window of sequence_length=10"),
        ((path, 3), {"align_to_bos": True}, "align_to_bos=True needs bos_token_id"),
        ((path, 3), {"split_documents": True}, "split_documents=True needs bos_token_id"),
        ((path, 3), {"bos_token_id": 12, "vocab_size": 12}, r"bos_token_id=12 is not in 0\.\.11"),
        ((path, 3), {"bos_token_id": 99, "align_to_bos": True}, r"none of the 0 BOS tokens \(bos_token_id=99\)"),
        ((path, 3), {"bos_token_id": 8, "align_to_bos": True}, "none of the 1 BOS tokens .* lower sequence_length"),
        (([path, tmp_path / "*.bin"], 3), {}, "a.bin is given 2 times"),
    ]:
        with pytest.raises(ValueError, match=message):
            am_data.TokenShards(*arguments, **options)
    for paths in (tmp_path / "b.bin", str(tmp_path / "train_*.bin"), [], [path, tmp_path / "c_*"]):
        with pytest.raises(FileNotFoundError, match="a glob"):
            am_data.TokenShards(paths, 3)
    write_by_hand(tmp_path / "b_1.bin", range(10))
    with pytest.raises(ValueError, match=r"holds the shards of a, b; name one, as .*a_\*\.bin"):
        am_data.TokenShards(tmp_path, 3)


@pytest.mark.parametrize("positions", [[0, 4], [0, 20, 40], [1024, 1034], [0, 10, 5], [-5, 0, 10, 20]])
def test_a_wrong_bos_index_is_refused(tmp_path, positions):
    path = write_by_hand(tmp_path / "a.bin", stream(30, bos_every=10))
    np.array(positions, dtype="<i4").tofile(tmp_path / "a.bos.idx")
    with pytest.raises(ValueError, match=r"a.bos.idx .*; delete it"):
        am_data.TokenShards(path, 5, bos_token_id=BOS, align_to_bos=True)


def test_a_bos_index_that_is_wrong_in_the_middle_of_a_shard_is_refused(tmp_path):
    for name in ("a", "b"):
        write_by_hand(tmp_path / f"{name}_0.bin", stream(9000, bos_every=10))
        np.arange(0, 9000, 10, dtype="<i4").tofile(tmp_path / f"{name}_0.bos.idx")
    paths = [tmp_path / "a_0.bin", tmp_path / "b_0.bin"]
    options = {"bos_token_id": BOS, "align_to_bos": True}
    assert len(am_data.TokenShards(paths, 20, **options)) == 899
    positions = np.arange(0, 9000, 10, dtype="<i4")
    positions[440:460] += 3
    positions.tofile(tmp_path / "b_0.bos.idx")
    found = int(stream(9000, bos_every=10)[4403])
    with pytest.raises(
        ValueError,
        match=rf"b_0.bos.idx lists token 4403 of b_0.bin as BOS \(bos_token_id=7\), but it is {found}; delete it, or",
    ):
        am_data.TokenShards(paths, 20, **options)
    (tmp_path / "b_0.bos.idx").unlink()
    assert len(am_data.TokenShards(paths, 20, **options)) == 899


def test_a_shard_that_shrinks_later_is_an_error_not_a_crash(tmp_path):
    path = write_by_hand(tmp_path / "a.bin", range(5000))
    dataset = am_data.TokenShards(path, 100)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="greater than file size"):
        dataset[40]


@pytest.mark.parametrize(("dtype", "legacy"), [("uint16", False), ("uint16", True), ("uint32", False)])
def test_the_writer_writes_the_format(tmp_path, dtype, legacy):
    documents = [[BOS, 1, 2], np.array([3, 4, 5, 6]), [8], list(range(10, 16))]
    paths = am_data.write_token_shards(
        iter(documents), tmp_path / "out", prefix="web", shard_tokens=6, dtype=dtype, bos_token_id=BOS, legacy=legacy
    )
    shards = [[BOS, 1, 2, BOS, 3, 4], [5, 6, BOS, 8, BOS, 10], [11, 12, 13, 14, 15]]
    assert [path.name for path in paths] == ["web_000000.bin", "web_000001.bin", "web_000002.bin"]
    item_size = 2 if dtype == "uint16" else 4
    for path, tokens in zip(paths, shards):
        options = {"magic": LEGACY_MAGIC} if legacy else {"item_size": item_size}
        assert path.read_bytes() == write_by_hand(tmp_path / "expected", tokens, **options).read_bytes()
        index = np.fromfile(path.with_suffix(".bos.idx"), dtype="<i4")
        assert index.tolist() == [at for at, token in enumerate(tokens) if token == BOS]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_without_bos_there_is_no_index(tmp_path):
    paths = am_data.write_token_shards([[1, 2], [3]], tmp_path)
    assert list(tmp_path.iterdir()) == paths
    assert am_data.TokenShards(paths[0], 2)[0]["labels"].tolist() == [1, 2, 3]


def test_a_failed_write_leaves_nothing_and_shards_are_never_overwritten(tmp_path):
    def documents():
        yield [1, 2, 3]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        am_data.write_token_shards(documents(), tmp_path, shard_tokens=2)
    assert list(tmp_path.iterdir()) == []
    am_data.write_token_shards([[1, 2, 3]], tmp_path)
    with pytest.raises(FileExistsError, match=r"train_000000.bin exists; move the 1 shards of prefix 'train' away"):
        am_data.write_token_shards([[4]], tmp_path)
    am_data.write_token_shards([[4]], tmp_path, prefix="val")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[1], [2, 65_536]], {}, r"document 1 has token id 65536; uint16 holds 0\.\.65535; write uint32 shards"),
        ([[1, -1]], {}, r"document 0 has token id -1; .*; mend the ids"),
        ([[1], []], {}, r"document 1 is .* of shape \(0,\); give integer token ids"),
        ([[[1]]], {}, r"document 0 is .* of shape \(1, 1\)"),
        ([[1.0]], {}, r"document 0 is float64"),
        ([], {}, "there are no documents"),
        ([[1]], {"dtype": "int8"}, "dtype='int8' is unknown; choose 'uint16' or 'uint32'"),
        ([[1]], {"dtype": "uint32", "legacy": True}, "dtype='uint32', but legacy shards hold uint16 alone"),
        ([[1]], {"shard_tokens": 0}, r"shard_tokens=0 must be in 1\.\.2147483647"),
        ([[1]], {"shard_tokens": 2**31}, r"shard_tokens=2147483648 must be in"),
        ([[1]], {"prefix": "../x"}, r"prefix='\.\./x' must be letters"),
        ([[1]], {"prefix": "train_1"}, r"prefix='train_1' .* not ending in a digit"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, documents, options, message):
    with pytest.raises(ValueError, match=message):
        am_data.write_token_shards(documents, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
