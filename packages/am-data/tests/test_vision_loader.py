"""Batches of images: how tensors are joined, and a loader that treats rows with images as any others."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from vision_processors import make_idefics3, make_image, make_llava

import am_data


def make_dataset(processor, num_rows=11, with_image=lambda number: number % 3 != 2):
    """Row `number` asks about an image of its own, or about none; its answer tells which it is."""
    rows = []
    for number in range(num_rows):
        content = [{"type": "text", "text": "Which one?" * (number % 4 + 1)}]
        if with_image(number):
            content.insert(0, {"type": "image", "image": make_image(seed=number)})
        rows.append(
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {number}."}]}
        )
    return am_data.VisionChatDataset(rows, processor=processor, on_bad_row="raise")


def make_loader(dataset, **options):
    options = {"global_batch_size": 8, "local_batch_size": 2, "num_epochs": 1, **options}
    layout = {name: options.pop(name) for name in ("layout", "position_ids") if name in options}
    collate = partial(am_data.collate, **{"layout": "padded", "join": dataset.processor_adapter.join, **layout})
    return am_data.DataLoader(dataset, collate=collate, **options)


def test_images_are_concatenated_over_rows():
    dataset = make_dataset(make_llava(), 4)
    examples = [dataset[index] for index in (1, 2, 0)]
    batch = am_data.collate(examples, layout="padded", join=dataset.processor_adapter.join)
    assert torch.equal(batch["pixel_values"], torch.cat([dataset[1]["pixel_values"], dataset[0]["pixel_values"]]))
    plain = [{name: example[name] for name in ("input_ids", "labels")} for example in examples]
    for name, tensor in am_data.collate(plain, layout="padded").items():
        assert torch.equal(batch[name], tensor)
    image_tokens = (batch["input_ids"] == dataset.processor_adapter.image_token_id).sum(1)
    assert image_tokens.tolist() == [16, 0, 16]
    assert (batch["shift_labels"] != dataset.processor_adapter.image_token_id).all()


def test_images_are_padded_with_zeros_to_the_row_with_most():
    join = am_data.vision_processor(make_idefics3()).join

    def example(num_images, height, width):
        shape = (num_images, 3, height, width)
        return {"pixel_values": torch.randn(shape), "pixel_attention_mask": torch.ones((num_images, height, width))}

    torch.manual_seed(0)
    small, large = example(1, 4, 6), example(3, 5, 2)
    joined = join([small, {}, large])
    assert joined["pixel_values"].shape == (3, 3, 3, 5, 6)
    assert joined["pixel_attention_mask"].shape == (3, 3, 5, 6)
    for name in joined:
        assert torch.equal(joined[name][0, :1, ..., :4, :6], small[name])
        assert torch.equal(joined[name][2, :3, ..., :5, :2], large[name])
        assert joined[name].dtype == small[name].dtype
        total = small[name].abs().sum() + large[name].abs().sum()
        # Float32 sums in two orders.
        torch.testing.assert_close(joined[name].abs().sum(), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [make_llava, make_idefics3])
def test_a_batch_without_images_has_no_image_keys(make):
    dataset = make_dataset(make(), 3)
    text = {"input_ids", "position_ids", "shift_labels", "document_ids"}
    for examples in ([dataset[2]], []):
        batch = am_data.collate(examples, layout="padded", join=dataset.processor_adapter.join)
        assert set(batch) == text
    assert batch["document_ids"].tolist() == [[0]]


def test_position_ids_are_made_of_the_finished_batch():
    dataset = make_dataset(make_llava(), 2)

    keys = []

    def three_axes(batch):
        keys.append(set(batch))
        return torch.stack([batch["position_ids"] * axis for axis in (1, 2, 3)])

    (step,) = make_loader(dataset, global_batch_size=2, position_ids=three_axes)
    text = {"input_ids", "position_ids", "shift_labels", "document_ids"}
    # Of no samples, of the first one, and of the step.
    assert keys == [text, text | {"pixel_values"}, text | {"pixel_values"}]
    (plain,) = make_loader(dataset, global_batch_size=2)
    batch_size, length = step[0]["input_ids"].shape
    assert step[0]["position_ids"].shape == (3, batch_size, length)
    assert torch.equal(step[0]["position_ids"][2], plain[0]["position_ids"] * 3)


def test_images_that_nobody_joins_are_errors():
    dataset = make_dataset(make_llava(), 2)
    join = dataset.processor_adapter.join
    examples = [dataset[0], dataset[1]]
    with pytest.raises(ValueError, match=r"examples hold pixel_values; .* join=dataset.processor_adapter.join"):
        am_data.collate(examples, layout="padded")
    with pytest.raises(ValueError, match="layout='packed' does not hold the tensors of join=; choose layout='padded'"):
        am_data.collate(examples, join=join)
    with pytest.raises(ValueError, match="layout='packed' does not hold the tensors of join="):
        make_loader(dataset, layout="packed")
    with pytest.raises(ValueError, match="join= takes one example a row; give the dataset itself, not its packs"):
        am_data.collate([examples], layout="padded", join=join)


def images_of(dataset, steps):
    """`(row, its images)` of all rows of each step, rows told by their answers."""
    found = []
    for micro_batches in steps:
        step = []
        for batch in micro_batches:
            images = list(batch["pixel_values"]) if "pixel_values" in batch else []
            for ids, labels, documents in zip(batch["input_ids"], batch["shift_labels"], batch["document_ids"]):
                if not documents.any():
                    continue
                answer = dataset.processor_adapter.processor.tokenizer.decode(labels[labels != -100])
                has_image = (ids == dataset.processor_adapter.image_token_id).any()
                step.append((int(answer.split()[2].rstrip(".</s>")), images.pop(0) if has_image else None))
            assert not images
        found.append(step)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_rows_with_their_own_images(world_size):
    dataset = make_dataset(make_llava())
    ranks = [list(make_loader(dataset, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({tuple(len(step) for step in steps) for steps in ranks}) == 1
    together = [list(chain(*shares)) for shares in zip(*(images_of(dataset, steps) for steps in ranks))]
    alone = images_of(dataset, make_loader(dataset))
    assert [sorted(number for number, _ in step) for step in together] == [
        sorted(number for number, _ in step) for step in alone
    ]
    assert sorted(number for step in together for number, _ in step) == list(range(11))
    for number, image in (pair for step in together for pair in step):
        expected = dataset[number]["pixel_values"][0] if number % 3 != 2 else None
        assert torch.equal(image, expected) if expected is not None else image is None


def test_a_stopped_loader_goes_on_with_the_same_images():
    dataset = make_dataset(make_idefics3())
    whole = list(make_loader(dataset, global_batch_size=4))
    first = make_loader(dataset, global_batch_size=4)
    next(iter(first))
    second = make_loader(make_dataset(make_idefics3()), global_batch_size=4)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == len(whole) - 1 == 2
    for step, expected in zip(rest, whole[1:]):
        for batch, other in zip(step, expected, strict=True):
            assert batch.keys() == other.keys()
            assert all(torch.equal(batch[name], other[name]) for name in batch)
    others = make_loader(make_dataset(make_idefics3(), with_image=lambda number: number % 3 == 0))
    with pytest.raises(ValueError, match="the saved position has fingerprint="):
        others.load_state_dict(first.state_dict())


def test_lengths_count_image_tokens():
    dataset = make_dataset(make_llava(), 3)
    assert dataset.lengths.dtype == np.int64
    assert dataset.lengths.tolist() == [len(dataset[index]["input_ids"]) for index in range(3)]


def test_pillow_is_imported_with_the_first_dataset_and_named_where_it_is_missing():
    code = """
import sys
import am_data
am_data.VisionChatDataset, am_data.vision_processor
assert not {"PIL", "transformers"} & set(sys.modules)
sys.modules["PIL"] = None  # as if it were not installed
try:
    am_data.VisionChatDataset([], processor=None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "am-data reads images with pillow; pip install am-data[vision]"


def test_the_processor_may_be_used_otherwise_while_steps_are_prepared():
    """A tokenizer that pads cannot be used by two threads at once: it is set and asked in two calls."""
    processor = make_llava()
    dataset = make_dataset(processor, 40, with_image=lambda number: True)
    expected = [dataset[index]["input_ids"].tolist() for index in range(40)]
    loader = make_loader(dataset, global_batch_size=1, local_batch_size=1, shuffle=False, prefetch=40)
    found = []
    for step in loader:
        found.append(step[0]["input_ids"][0].tolist())
        for _ in range(20):
            padded = processor.tokenizer(["two", "What is in the image? " * 50], padding=True)["input_ids"]
            assert len(padded[0]) == len(padded[1])
    assert found == expected
