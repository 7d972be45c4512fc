"""Conversations with images: tokens and tensors are the processor's, labels the answers', bad images refused."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from vision_processors import (
    LLAVA_TEMPLATE,
    make_idefics3,
    make_idefics3_torchvision,
    make_image,
    make_llava,
    make_llava_siglip,
    make_qwen,
)

import am_data

PROCESSORS = {"idefics3": make_idefics3, "llava": make_llava, "llava_siglip": make_llava_siglip}
ANSWER = "It is a red square."


def row(*images, answer=ANSWER, **columns):
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": "What is in the image?"})
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **columns}


def check_against_processor(dataset, rows, processor):
    """Tokens and tensors of every row equal those of one call of the processor."""
    for index, own in enumerate(rows):
        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
        expected = processor.apply_chat_template(
            [own["messages"][0], answer],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        example = dataset[index]
        assert example["input_ids"].tolist() == expected["input_ids"][0].tolist()
        assert dataset.lengths[index] == len(example["input_ids"])
        names = set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert set(example) == {"input_ids", "labels"} | names
        for name in names:
            tensor = expected[name][0] if dataset.processor_adapter.joined == "pad_images" else expected[name]
            assert torch.equal(example[name], tensor)


@pytest.mark.parametrize("family", PROCESSORS)
def test_tokens_and_tensors_are_those_of_the_processor(family):
    processor = PROCESSORS[family]()
    rows = [row(make_image()), row(), row(make_image(30, 30), make_image(40, 10, seed=1))]
    check_against_processor(am_data.VisionChatDataset(rows, processor=processor, on_bad_row="raise"), rows, processor)


@pytest.mark.parametrize("family", PROCESSORS)
def test_labels_are_the_answer_and_its_end(family):
    processor = PROCESSORS[family]()
    example = am_data.VisionChatDataset([row(make_image())], processor=processor)[0]
    ids, labels = example["input_ids"], example["labels"]
    end = "<end_of_utterance>" if family == "idefics3" else "</s>"
    assert processor.tokenizer.decode(ids[labels != -100]) == f" {ANSWER}{end}"
    assert np.array_equal(labels[labels != -100], ids[labels != -100])
    assert not (labels == processor.image_token_id).any()


def test_a_template_does_not_see_which_answers_are_to_be_learned():
    turns = [*row(make_image())["messages"], *row()["messages"]]
    processor = make_llava()
    # A question begins with the number of keys of the answer before it.
    keys = "{% if message['role'] == 'user' and not loop.first %}{{ loop.previtem | length }} {% endif %}"
    template = LLAVA_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages %}" + keys)
    assert template != LLAVA_TEMPLATE
    ids = []
    for weight in ({}, {"train": False}):
        rows = [{"messages": [turns[0], turns[1] | weight, *turns[2:]]}]
        example = am_data.VisionChatDataset(rows, processor=processor, chat_template=template, on_bad_row="raise")[0]
        ids.append(example["input_ids"].tolist())
    assert ids[0] == ids[1]
    assert processor.tokenizer.decode(example["input_ids"][example["labels"] != -100]).count(ANSWER) == 1


def test_the_report_counts_images_and_shows_them_short():
    rows = [row(make_image()), row(make_image(30, 30), make_image(), id="two"), row("missing.png", id="bad")]
    dataset = am_data.VisionChatDataset(rows, processor=make_llava())
    report = dataset.report
    assert (report.rows_read, report.rows_kept, report.num_images, report.num_image_tokens) == (3, 2, 3, 48)
    assert report.samples[0] == [
        ("<s>USER: <image x 16>\nWhat is in the image?\nASSISTANT:", False),
        (f" {ANSWER}</s>", True),
    ]
    assert report.dropped["an image is missing"].examples == ["bad"]
    assert "3 images, 48 image tokens" in str(report)
    assert report.num_tokens == dataset.lengths.sum()
    assert dataset.processor_adapter.image_token_id == dataset.processor_adapter.processor.image_token_id


def saved(image, path, **options):
    image.save(path, **options)
    return str(path)


def contents(example):
    return {name: values.tolist() for name, values in example.items()}


def test_every_way_to_hold_an_image_gives_the_same_example(tmp_path):
    image = make_image()
    path = saved(image, tmp_path / "one.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": row("one.png")["messages"]}))
    question, answer = {"type": "text", "text": "What is in the image?"}, {"role": "assistant", "content": ANSWER}
    bare = [{"role": "user", "content": [{"type": "image"}, question]}, answer]
    by_path = [{"role": "user", "content": [{"type": "image", "path": path}, question]}, answer]
    answer_part = {"type": "text", "text": ANSWER}
    turns = [{"from": "human", "value": "<image>What is in the image?"}, {"from": "gpt", "value": ANSWER}]
    ways = [
        [row(image)],
        [row(path)],
        [row(Path(path).read_bytes())],
        [row({"bytes": Path(path).read_bytes(), "path": "gone.png"})],
        [row({"bytes": None, "path": path})],
        [{"messages": by_path}],
        [{"messages": bare, "images": [image]}],
        [{"messages": bare, "image": path}],
        [{"conversations": turns, "images": [path]}],
        [{"conversations": turns, "image": path}],
        datasets.Dataset.from_list([{"messages": [by_path[0], {"role": "assistant", "content": [answer_part]}]}]),
        datasets.Dataset.from_dict({"conversations": [turns], "image": [path]}).cast_column("image", datasets.Image()),
        datasets.Dataset.from_dict({"conversations": [turns], "images": [[path]]}).cast_column(
            "images", datasets.List(datasets.Image())
        ),
        tmp_path / "rows.jsonl",
    ]
    datasets.Dataset.from_dict({"conversations": [turns], "image": [path]}).cast_column(
        "image", datasets.Image()
    ).to_parquet(tmp_path / "rows.parquet")
    processor = make_idefics3()
    expected = contents(am_data.VisionChatDataset(ways[0], processor=processor)[0])
    for rows in [*ways, tmp_path / "rows.parquet"]:
        assert contents(am_data.VisionChatDataset(rows, processor=processor, on_bad_row="raise")[0]) == expected
    relative = am_data.VisionChatDataset([row("one.png")], processor=processor, images=tmp_path)
    assert contents(relative[0]) == expected
    with pytest.raises(FileNotFoundError, match=r"images=.*nowhere' is not a folder"):
        am_data.VisionChatDataset([row("one.png")], processor=processor, images=tmp_path / "nowhere")


def test_text_around_placeholders_stays_as_it_is():
    turns = [{"from": "human", "value": "First <image>\nthen <image>."}, {"from": "gpt", "value": ANSWER}]
    rows = [{"conversations": turns, "images": [make_image(), make_image(seed=1)]}]
    dataset = am_data.VisionChatDataset(rows, processor=make_idefics3(splitting=False))
    image = "<fake_token_around_image><global-img><image x 4><fake_token_around_image>"
    assert dataset.report.samples[0][0][0] == (
        f"<|im_start|>User: First {image}\nthen {image}.<end_of_utterance>\nAssistant:"
    )


def test_a_transform_of_a_dataset_is_honoured():
    table = datasets.Dataset.from_dict({"seed": [1, 2]})
    table.set_transform(lambda batch: {"messages": [row(make_image(seed=s))["messages"] for s in batch["seed"]]})
    made = am_data.VisionChatDataset(table, processor=make_llava())
    plain = am_data.VisionChatDataset([row(make_image(seed=s)) for s in (1, 2)], processor=make_llava())
    assert [contents(made[i]) for i in (0, 1)] == [contents(plain[i]) for i in (0, 1)]


def exif_rotated(path):
    """An image that a viewer turns by 90 degrees, and how it is seen."""
    image = make_image(12, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, path, exif=exif), image.transpose(Image.Transpose.ROTATE_270)


def half_transparent(path):
    pixels = np.asarray(make_image()).astype(np.float64)
    alpha = np.full((12, 20, 1), 128, dtype=np.uint8)
    image = Image.fromarray(np.concatenate([pixels.astype(np.uint8), alpha], axis=2))
    share = 128 / 255
    return saved(image, path), Image.fromarray(np.round(share * pixels + (1 - share) * 255).astype(np.uint8))


def palette(path):
    image = make_image().quantize(16)
    return saved(image, path), image.convert("RGB")


def transparent_palette(path):
    image = make_image().quantize(4)
    seen = np.asarray(image.convert("RGB")).copy()
    seen[np.asarray(image) == 2] = 255
    return saved(image, path, transparency=2), Image.fromarray(seen)


def grey(path):
    image = make_image().convert("L")
    return saved(image, path), Image.merge("RGB", [image] * 3)


@pytest.mark.parametrize("make", [exif_rotated, half_transparent, palette, transparent_palette, grey])
def test_images_become_rgb_as_they_are_seen(tmp_path, make):
    path, seen = make(tmp_path / "image.png")
    processor = make_idefics3()
    got = am_data.VisionChatDataset([row(path)], processor=processor, on_bad_row="raise")[0]
    expected = am_data.VisionChatDataset([row(seen)], processor=processor)[0]
    assert got["input_ids"].tolist() == expected["input_ids"].tolist()
    # Blending rounds to whole steps of 1/255, which normalising doubles.
    assert (got["pixel_values"] - expected["pixel_values"]).abs().max() <= 2.01 / 255
    assert (got["pixel_values"] - expected["pixel_values"]).abs().mean() <= 0.2 / 255


def test_images_of_a_row_for_people(tmp_path):
    path, seen = half_transparent(tmp_path / "image.png")
    dataset = am_data.VisionChatDataset([row(path), row()], processor=make_idefics3(), on_bad_row="raise")
    (image,) = dataset.images(0)
    assert image.mode == "RGB"
    assert image.size == seen.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(seen).astype(int)).max() <= 1
    assert dataset.images(1) == []


def bad_images(folder):
    """Each bad image with the reason of its refusal and what its detail says."""
    frames = [make_image(seed=seed) for seed in range(2)]
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.ppm").write_text("P6 20000 20000 255\n")
    whole = Path(saved(make_image(64, 64), folder / "whole.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = Path(saved(make_image(64, 64), folder / "whole.png")).read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    animated = [
        saved(frames[0], folder / f"frames.{suffix}", save_all=True, append_images=frames[1:])
        for suffix in ("gif", "webp", "png", "tiff")
    ]
    deep = Image.fromarray(np.zeros((4, 4), dtype=np.uint16))
    return [
        ("missing.png", "an image is missing", "missing.png is not a file"),
        (str(folder), "an image is missing", "is not a file"),
        ("text.png", "an image is unreadable", "text.png: cannot identify"),
        ("cut.jpg", "an image is unreadable", "cut.jpg: .*truncated"),
        ("cut.png", "an image is unreadable", "cut.png: "),
        ("bomb.ppm", "an image is unreadable", "bomb.ppm: .*decompression bomb"),
        ("empty.png", "an image is zero-sized", "empty.png has 0 bytes"),
        (Image.new("RGB", (0, 5)), "an image is zero-sized", "0 x 5 pixels"),
        *((path, "an image is animated", "frames.* has more than one frame") for path in animated),
        (saved(deep, folder / "deep.png"), "an image has more than 8 bits a channel", "mode 'I;16'"),
        (Image.new("F", (4, 4)), "an image has more than 8 bits a channel", "mode 'F'"),
        ("https://example.org/one.png", "an image is a URL", "download it and give its path"),
        (7, "an image is of an unknown kind", "it is a int; a path, bytes"),
    ]


def test_bad_images_are_refused_with_path_and_reason(tmp_path):
    processor = make_llava()
    images = bad_images(tmp_path)
    rows = [row(make_image()), *(row(image) for image, _, _ in images)]
    dropped = am_data.VisionChatDataset(rows, processor=processor, images=tmp_path).report.dropped
    assert {reason: entry.count for reason, entry in dropped.items()} == Counter(reason for _, reason, _ in images)
    for number, (image, reason, detail) in enumerate(images):
        with pytest.raises(ValueError, match=f"row {number}: {reason}: .*{detail}"):
            am_data.VisionChatDataset([row(image, id=number)], processor=processor, images=tmp_path, on_bad_row="raise")


def test_one_bad_image_of_a_table_costs_its_row_alone(tmp_path):
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": ANSWER}]
    images = [{"bytes": Path(saved(make_image(), tmp_path / "one.png")).read_bytes()}, {"bytes": b"text"}]
    table = datasets.Dataset.from_dict({"conversations": [turns, turns], "image": images})
    dataset = am_data.VisionChatDataset(table.cast_column("image", datasets.Image()), processor=make_llava())
    assert (len(dataset), dataset.report.dropped["an image is unreadable"].examples) == (1, ["1"])


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": ANSWER}]}


TEXT, IMAGE = {"type": "text", "text": "What is it?"}, {"type": "image"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**user(TEXT, IMAGE), "images": [1, 2]},
         "images and placeholders differ in number: 2 images, 1 placeholders"),
        ({**user(TEXT, IMAGE, IMAGE), "images": [1]},
         "images and placeholders differ in number: 1 images, 2 placeholders"),
        (user(TEXT, IMAGE), "images and placeholders differ in number: 0 images, 1 placeholders"),
        ({**user(TEXT), "image": 1}, "images and placeholders differ in number: 1 images, 0 placeholders"),
        ({"prompt": "An <image> tag", "completion": ANSWER}, "0 images, 1 placeholders"),
        (user({"type": "text", "text": "The <image> tag"}), "a text holds the image token: turn 0 has '<image>'"),
        (user(TEXT, {"type": "image", "url": "https://example.org"}), "an image is a URL: turn 0; download it"),
        (user(TEXT, {"type": "image_url", "image_url": {"url": "x"}}), "an image is a URL: turn 0; download it"),
        (user(TEXT, {"type": "video", "video": "x.mp4"}), "content of an unknown kind: turn 0 has a part of type 'vid"),
        (user(TEXT, "text"), "content of an unknown kind: turn 0 has a part of type None"),
        (user({"type": "text"}), "content of an unknown kind: turn 0 has a part of type 'text'"),
        (user(TEXT, {"type": "image", "file": "x"}), r"an image part with \['file'\]"),
        ({"messages": [{"role": "user", "content": 7}]}, "content of an unknown kind: turn 0 has a int"),
        ({"messages": [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": [IMAGE]}],
          "images": [1]}, "an image in an assistant turn: turn 1"),
        ({"messages": user(IMAGE)["messages"][:1], "images": [make_image()]}, "no assistant turn"),
        (user({"type": "text", "text": " "}), "empty turn: turn 0"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_a_reason(bad, message):
    with pytest.raises(ValueError, match=message):
        am_data.VisionChatDataset([bad], processor=make_llava(), on_bad_row="raise")


def test_a_template_that_drops_images_is_refused():
    template = LLAVA_TEMPLATE.replace("{{ '<image>\n' }}", "")
    with pytest.raises(ValueError, match="the template drops or adds an image: it writes 0 placeholders for 1"):
        am_data.VisionChatDataset(
            [row(make_image())], processor=make_llava(), chat_template=template, on_bad_row="raise"
        )


def test_tokens_and_features_must_be_equally_many():
    adapter = dataclasses.replace(am_data.vision_processor(make_llava()), num_features=lambda tensors: 15)
    message = "image tokens and image features differ: 1 images are 16 tokens '<image>' and 15 features"
    with pytest.raises(ValueError, match=message):
        am_data.VisionChatDataset([row(make_image())], processor=adapter, on_bad_row="raise")


def test_a_processor_that_refuses_an_image_refuses_its_row():
    pytest.importorskip("torchvision", reason="a Qwen-VL processor holds a video processor, which needs it")
    with pytest.raises(ValueError, match=r"the processor refuses an image: of \[\(1600, 4\)\] pixels: .*aspect ratio"):
        am_data.VisionChatDataset([row(make_image(1600, 4))], processor=make_qwen("qwen2_5_vl"), on_bad_row="raise")


def test_processors_without_adapter_template_or_declared_tensors():
    with pytest.raises(ValueError, match=r"dict has no declared adapter; choose one of Idefics3Processor, .*Qwen3VL"):
        am_data.vision_processor({})
    processor = make_llava()
    processor.chat_template = None
    with pytest.raises(ValueError, match="that of the LlavaProcessor is None; give one: a name"):
        am_data.VisionChatDataset([row()], processor=processor)
    adapter = dataclasses.replace(am_data.vision_processor(make_llava()), tensor_names=("pixel_values", "image_sizes"))
    with pytest.raises(ValueError, match=r"returns \['pixel_values'\] for images, its adapter declares \['image_s"):
        am_data.VisionChatDataset([row(make_image())], processor=adapter)
    with pytest.raises(ValueError, match=r"do_normalize=False .* makes a black crop all zeros"):
        am_data.vision_processor(make_idefics3(do_normalize=False))


def test_options_and_rows_are_refused_as_by_a_chat_dataset(tokenizer):
    builds = [
        lambda rows, **options: am_data.ChatDataset(rows, tokenizer, **options),
        lambda rows, **options: am_data.VisionChatDataset(rows, processor=make_llava(), **options),
    ]
    good = {"prompt": "Say it.", "completion": "It is said."}
    for build in builds:
        for options, message in [
            ({"format": "chatml"}, "format='chatml' is unknown; choose one of auto, messages"),
            ({"on_bad_row": "skip"}, "on_bad_row='skip' is unknown; choose 'drop' or 'raise'"),
            ({"max_length": 0}, "max_length=0 must be at least 1 token"),
            ({"truncation": True}, "truncation=True needs max_length"),
            ({"max_length": 2}, r"all 1 rows of the list were refused:\ndropped 1: longer than max_length \(rows 0\)"),
            ({"max_length": 2, "on_bad_row": "raise"}, "row 0: longer than max_length: .*; mend it"),
        ]:
            with pytest.raises(ValueError, match=message):
                build([good], **options)
        report = build([good, {"id": "b", "prompt": "Say it.", "completion": "word " * 500}], max_length=200).report
        assert [(reason, entry.examples) for reason, entry in report.dropped.items()] == [
            ("longer than max_length", ["b"])
        ]
        assert "".join(text for text, supervised in report.samples[0] if supervised).strip().startswith("It is said.")


def test_rows_over_max_length_are_refused_or_cut_after_the_last_image():
    processor = make_llava()
    whole = am_data.VisionChatDataset([row(make_image())], processor=processor)[0]
    length = len(whole["input_ids"])
    end = int(np.flatnonzero(whole["input_ids"] == processor.image_token_id)[-1]) + 1

    def cut_to(max_length, truncation=True):
        return am_data.VisionChatDataset(
            [row(make_image())], processor=processor, max_length=max_length, truncation=truncation, on_bad_row="raise"
        )

    with pytest.raises(ValueError, match=f"longer than max_length: {length} tokens, max_length={length - 1}"):
        cut_to(length - 1, truncation=False)
    dataset = cut_to(length - 2)
    assert dataset[0]["input_ids"].tolist() == whole["input_ids"][:-2].tolist()
    assert dataset[0]["labels"].tolist() == whole["labels"][:-2].tolist()
    assert torch.equal(dataset[0]["pixel_values"], whole["pixel_values"])
    assert dataset.report.rows_truncated == 1
    with pytest.raises(ValueError, match="nothing under loss after truncation"):
        cut_to(end)
    second = {"messages": [*row()["messages"], *row(make_image())["messages"]]}
    ids = am_data.VisionChatDataset([second], processor=processor)[0]["input_ids"]
    last = int(np.flatnonzero(ids == processor.image_token_id)[-1]) + 1
    for max_length in (last - 1, last - 20):
        with pytest.raises(ValueError, match=f"would cut an image: the last image ends at token {last}, max"):
            am_data.VisionChatDataset(
                [second], processor=processor, max_length=max_length, truncation=True, on_bad_row="raise"
            )
    kept = am_data.VisionChatDataset([second], processor=processor, max_length=last, truncation=True)
    assert kept[0]["input_ids"].tolist() == ids[:last].tolist()


def test_pixels_are_made_when_asked_for_of_the_same_image(tmp_path):
    path = saved(make_image(), tmp_path / "one.png")
    dataset = am_data.VisionChatDataset([row(path, id="first")], processor=make_llava())
    assert contents(dataset[0]) == contents(dataset[0])
    saved(make_image(seed=1), path)
    with pytest.raises(ValueError, match="row first: an image is not the one that was there when the dataset was"):
        dataset[0]
    Path(path).unlink()
    with pytest.raises(ValueError, match=r"row first: an image is missing: .*one.png is not a file"):
        dataset[0]


def test_the_fingerprint_follows_text_and_images(tmp_path):
    processor = make_llava()

    def fingerprint(*rows):
        return am_data.VisionChatDataset(list(rows), processor=processor).fingerprint

    one, same, other = (
        saved(make_image(seed=seed), tmp_path / name) for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1))
    )
    assert fingerprint(row(one)) == fingerprint(row(same)) == fingerprint(row(one), row("missing.png"))
    assert len({fingerprint(row(one)), fingerprint(row(other)), fingerprint(row(one, answer="It is"))}) == 3
    assert fingerprint(row(one), row(other)) != fingerprint(row(other), row(one))


@pytest.mark.parametrize("family", ["idefics3_torchvision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_processors_that_need_torchvision(family):
    pytest.importorskip(
        "torchvision", reason="no CPU wheel of it is on PyPI, so it is not in this package's test group"
    )
    processor = make_idefics3_torchvision() if family == "idefics3_torchvision" else make_qwen(family)
    rows = [row(make_image()), row(), row(make_image(30, 30), make_image(40, 10, seed=1))]
    dataset = am_data.VisionChatDataset(rows, processor=processor, on_bad_row="raise")
    check_against_processor(dataset, rows, processor)
    adapter = dataset.processor_adapter
    joined = adapter.join([dataset[index] for index in range(3)])
    if family.startswith("qwen"):
        assert joined["image_grid_thw"].tolist() == [[1, 4, 4], [1, 8, 8], [1, 2, 10]]
        assert joined["pixel_values"].shape == (16 + 64 + 20, 96)
        assert torch.equal(joined["pixel_values"][:16], dataset[0]["pixel_values"])
        assert dataset.report.num_image_tokens == (16 + 64 + 20) // 4
