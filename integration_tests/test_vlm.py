"""Fine-tuning with images as a user runs it: layouts, kills, what trains, exports, and what is refused.

Everything is in fp32 on tiny models with seeded weights. Rows with no, one or two images are mixed so that ranks,
micro-batches and whole steps have none. Where layouts are compared, numbers are equal within
`max|a - b| <= 1e-5 * max|reference|` per tensor: losses and gradient norms of every step, and the weights after
three steps of SGD that move each tensor by more than a thousand times that.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import am_data
import am_loss
import am_mesh
import am_models
from am_recipes import cli, configs, sources, vision, vlm
from integration_tests import runs

ROOT = Path(__file__).resolve().parents[1]
TINY = runs.shipped("vlm/tiny.yaml")
PROCESSOR = ROOT / "recipes/data/vlm/processor"
TOLERANCE, NUM_ROWS = 1e-5, 16
QWEN = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 3,
    "tie_word_embeddings": False,
    "vision_start_token_id": 4,
    "vision_end_token_id": 5,
    "video_token_id": 6,
    "text_config": TINY["model"]["config"]["text_config"]
    | {
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}
QWEN["text_config"].pop("attention_bias", None)
MODELS = {"idefics3": TINY["model"]["config"], "qwen2_5_vl": QWEN}
# What large weights leave with small gradients gets a larger rate, so that three steps move it too.
LARGER = [
    {"pattern": "embed_tokens", "lr_mult": 0.02},
    {"pattern": "connector|text_model.*([qk]_proj|norm)", "lr_mult": 5.0},
]
LARGER_IN_TOWER = [
    {"pattern": "vision_model.*([qk]_proj|norm|bias)", "lr_mult": 50.0},
    {"pattern": "vision_model", "lr_mult": 5.0},
]
CONSTANT: dict[str, Any] = {"lr_scheduler": {"style": "constant", "warmup_steps": 0, "min_lr": 0.0}}
THREE_STEPS = CONSTANT | {"step_scheduler": {"max_steps": 3}, "optimizer": None}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [say(text)]}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.jsonl`, its images, and a base model of each family with its processor."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(0)
    names = ["tomato", "grapes", "watermelon", "lemon", "banana", "pear", "peach"]
    rows = []
    for number in range(NUM_ROWS):
        # Steps of four rows: one with images, none, all, two.
        num_images = [1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 1, 2, 0, 1, 0][number]
        images = []
        for place in range(num_images):
            path = f"{number}-{place}.png"
            pixels = generator.integers(0, 256, (24 + 8 * place, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / path)
            images += [{"type": "image", "path": path}, say(" and " if place + 1 < num_images else " ")]
        question = say("What is this?" if number % 3 else "What is it?")
        rows.append({"messages": [user(*images, question), answer(" ".join(names[: 1 + number % 5]))]})
    write_rows(folder / "rows.jsonl", rows)
    for family, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Large enough that attention and the images matter.
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" not in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / family)
        make_processor(family).save_pretrained(folder / family)
    return folder


def make_processor(family: str) -> Any:
    if family == "idefics3":
        return AutoProcessor.from_pretrained(PROCESSOR)
    tokenizer = AutoTokenizer.from_pretrained(PROCESSOR)
    renamed = {"<image>": "<|image_pad|>", "<fake_token_around_image>": "<|vision_start|>"}
    renamed |= {"<global-img>": "<|vision_end|>", "<end_of_utterance>": "<|video_pad|>"}
    text = tokenizer.backend_tokenizer.to_str()
    for old, new in renamed.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(renamed.values()),
    )
    template = (PROCESSOR / "chat_template.jinja").read_text()
    template = template.replace("'<image>'", "'<|vision_start|><|image_pad|><|vision_end|>'")
    # Images become grids of 4 x 4 pixel patches, 2 x 2 of them a token.
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 1024}, patch_size=4, merge_size=2)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(path: Path, inputs: Path, *changes: Mapping[str, Any], family: str = "idefics3") -> Path:
    """A config file: tiny.yaml on `inputs`, in order, with `changes` merged in; None takes out."""
    config = json.loads(json.dumps(TINY))
    base = {
        "model": {"config": None, "name_or_path": str(inputs / family)},
        "processor": None,
        "dataset": {"path": str(inputs / "rows.jsonl"), "split": None},
        "validation_dataset": {"path": str(inputs / "rows.jsonl"), "split": "train[8:12]"},
        "dataloader": {"shuffle": False},
        "step_scheduler": {"global_batch_size": 4, "local_batch_size": 4},
        "generate": {"num_rows": 0},
    }
    for change in (base, *changes):
        runs.merge(config, change)
    path.write_text(yaml.safe_dump(config))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def moved(run_dir: Path, start: Path) -> set[str]:
    """Names of the tensors of an export that are not, to the bit, those of `start`."""
    before, after = weights(start), weights(run_dir / "export")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def compare_metrics(run_dir: Path, reference: Path) -> None:
    """Raise AssertionError naming the first number beyond the tolerance."""
    ours, theirs = runs.metrics(run_dir), runs.metrics(reference)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=TOLERANCE), f"step {row['step']}: {key} differs"


def compare_weights(run_dir: Path, reference: Path) -> None:
    """Raise AssertionError naming the first tensor beyond the tolerance."""
    mine, others = weights(run_dir / "export"), weights(reference / "export")
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        require_close(name, mine[name], tensor)


def require_close(name: str, value: torch.Tensor, reference: torch.Tensor) -> None:
    difference, scale = (value - reference).abs().max().item(), reference.abs().max().item()
    assert difference <= TOLERANCE * scale, f"{name} differs by {difference:.3g}, its largest is {scale:.3g}"


class Runner:
    """Runs a config through the command line, in this process and a folder of its own."""

    def __init__(self, folder: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.inputs = inputs
        self.run_dir = folder / "run"
        self._capsys = capsys
        self.printed = ""

    def __call__(self, *changes: Mapping[str, Any], command: tuple[str, str] = ("finetune", "vlm")) -> tuple[int, str]:
        """The exit status and the messages on stderr."""
        config = written(self.folder / "config.yaml", self.inputs, *changes)
        outcome = runs.command(*command, "-c", str(config), "--run_dir", str(self.run_dir))
        self.printed = self._capsys.readouterr().out
        return outcome

    def refuses(self, message: str, *changes: Mapping[str, Any], status: int = 1) -> None:
        """Run; one message that matches, no traceback, and nothing written."""
        runs.require_refusal(self(*changes), status, message)
        assert not self.run_dir.exists()


@pytest.fixture
def run(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path, inputs, capsys)


# Layouts.

# What trains (None: all but the vision tower), ranks, and what is changed.
LAYOUTS: dict[str, tuple[str, int, dict[str, str]]] = {
    "accumulation": ("all", 1, {"step_scheduler.local_batch_size": "1"}),
    "fsdp2-offloaded": ("all", 2, {"step_scheduler.local_batch_size": "2", "distributed.cpu_offload": "true"}),
    "ddp-accumulation": ("all", 2, {"step_scheduler.local_batch_size": "1", "distributed.strategy": "ddp"}),
    "fsdp2-accumulation-frozen-recomputed": (
        "default",
        2,
        {"step_scheduler.local_batch_size": "1", "distributed.activation_checkpointing": "full"},
    ),
    "tp2-sp-frozen-recomputed": (
        "default",
        2,
        {
            "distributed.tp_size": "2",
            "distributed.sequence_parallel": "true",
            "distributed.activation_checkpointing": "selective",
        },
    ),
    "ddp-frozen": ("default", 2, {"step_scheduler.local_batch_size": "2", "distributed.strategy": "ddp"}),
}
TRAINED: dict[str, dict[str, Any]] = {"all": {"freeze": []}, "default": {}}
SGD = {
    name: {"_target_": "torch.optim.SGD", "lr": 0.5, "param_group_overrides": rates}
    for name, rates in {"all": [*LARGER, *LARGER_IN_TOWER], "default": LARGER}.items()
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> dict[str, tuple[Path, Path]]:
    """Configs of three steps of SGD and their runs on one process, in one micro-batch."""
    made = {}
    for name, freeze in TRAINED.items():
        folder = tmp_path_factory.mktemp(name)
        config = written(folder / "config.yaml", inputs, THREE_STEPS, {"optimizer": SGD[name]}, freeze)
        made[name] = config, runs.train(folder, "reference", config)
    return made


def test_ranks_and_steps_without_images(inputs: Path) -> None:
    dataset = am_data.VisionChatDataset(inputs / "rows.jsonl", processor=AutoProcessor.from_pretrained(PROCESSOR))
    shares = [
        am_data.DataLoader(
            dataset,
            global_batch_size=4,
            local_batch_size=2,
            rank=rank,
            world_size=2,
            shuffle=False,
            num_epochs=1,
            collate=functools.partial(am_data.collate, layout="padded", join=dataset.processor_adapter.join),
        )
        for rank in range(2)
    ]
    have = [[any("pixel_values" in batch for batch in step) for step in share] for share in shares]
    assert have[0][:3] == [False, False, True]
    assert have[1][:3] == [True, False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, references: dict[str, tuple[Path, Path]], inputs: Path, tmp_path: Path) -> None:
    trained, world_size, overrides = LAYOUTS[layout]
    config, reference = references[trained]
    start, end = weights(inputs / "idefics3"), weights(reference / "export")
    for name in end:
        if trained == "default" and "vision_model" in name:
            assert torch.equal(end[name], start[name])
        # The softmax takes out what a bias adds to all keys alike: its gradient is zero.
        elif not name.endswith("k_proj.bias"):
            change = (end[name] - start[name]).abs().max() / end[name].abs().max()
            assert change >= 1000 * TOLERANCE, f"{name} moves by {change:.2g} alone, which shows nothing"
    run_dir = runs.train(tmp_path, "run", config, overrides, world_size)
    compare_metrics(run_dir, reference)
    compare_weights(run_dir, reference)


def half_of_the_targets(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
    """A seeded fault: the loss of the last rank is dropped."""
    dropped = torch.distributed.get_rank() == 1
    return am_loss.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100) if dropped else labels, **options)


def test_a_dropped_rank_is_caught(references: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    config, reference = references["all"]
    faulty = tmp_path / "faulty.yaml"
    fault = {"loss_fn": {"_target_": "integration_tests.test_vlm.half_of_the_targets"}}
    faulty.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | fault))
    run_dir = runs.train(tmp_path, "run", faulty, {"step_scheduler.local_batch_size": "2"}, 2)
    with pytest.raises(AssertionError, match="loss differs"):
        compare_metrics(run_dir, reference)
    with pytest.raises(AssertionError, match="its largest is"):
        compare_weights(run_dir, reference)


@pytest.mark.parametrize("family", MODELS)
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(family: str, inputs: Path) -> None:
    """One batch of all rows by the recipe's loader against stock transformers, its processor and one row at a time."""
    processor = AutoProcessor.from_pretrained(inputs / family)
    dataset = am_data.VisionChatDataset(inputs / "rows.jsonl", processor=processor)
    model = am_models.AutoModelForImageTextToText.from_pretrained(inputs / family, dtype=torch.float32)
    config = configs.parse(
        "recipes/configs/vlm/tiny.yaml",
        [(f"step_scheduler.{size}_batch_size", str(NUM_ROWS)) for size in ("global", "local")],
    )
    with am_mesh.process_group():
        dims = am_mesh.ParallelDims().build("cpu")
        loader = vlm.make_loader(config, model.config, dataset, dims, training=True)
        ((batch,),) = itertools.islice(loader, 1)
    given, targets = am_models.split_batch(model, batch)
    loss = am_models.forward_with_loss(model, am_loss.linear_cross_entropy, given, targets)
    loss.backward()

    stock = AutoModelForImageTextToText.from_pretrained(inputs / family, dtype=torch.float32)
    total = torch.zeros(())
    for index, line in enumerate((inputs / "rows.jsonl").read_text().splitlines()):
        messages = json.loads(line)["messages"]
        text = processor.apply_chat_template(messages, tokenize=False)
        given = processor(text=[text], images=dataset.images(index) or None, return_tensors="pt")
        if family == "qwen2_5_vl":
            given["mm_token_type_ids"] = (given["input_ids"] == stock.config.image_token_id).int()
        # Under loss: what follows the last <|im_start|>assistant and its line feed, to the <|im_end|>.
        ids = given["input_ids"][0]
        prompt = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        begin = processor(text=[prompt], images=dataset.images(index) or None)["input_ids"][0]
        (end,) = (ids[len(begin) :] == processor.tokenizer.eos_token_id).nonzero()[0].tolist()
        targets = ids[len(begin) : len(begin) + end + 1]
        logits = stock(**given).logits[0, len(begin) - 1 : len(begin) + end]
        row_loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        row_loss.backward()
        total += row_loss.detach()
    assert loss.item() == pytest.approx(total.item(), rel=TOLERANCE)
    ours = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        # A bias of all keys alike has a gradient of zero, up to what is rounded.
        if not name.endswith("k_proj.bias"):
            require_close(name, ours[name].grad, parameter.grad)


# Kills.

EVERY_STEP = {"step_scheduler": {"ckpt_every_steps": 1, "max_steps": 6}, "checkpoint": {"keep_last": 20}}
# As the quickstart: what is new trains whole, the language model by its factors.
SAVED = {
    "peft": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*text_model\..*(q_proj|v_proj|down_proj)",
        "modules_to_save": ["vision_model", "connector"],
    }
}
EVERYWHERE = {"peft": {"r": 4, "lora_alpha": 8, "target_modules": r".*(q_proj|v_proj|modality_projection\.proj|fc1)"}}


@pytest.mark.parametrize("trained", [{}, SAVED], ids=["full", "adapter"])
def test_killed_and_started_again(trained: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    shuffled = {"dataloader": {"shuffle": True}}
    config = written(tmp_path / "config.yaml", inputs, EVERY_STEP, trained, shuffled)
    reference = runs.train(tmp_path, "reference", config)
    runs.kill_when(runs.start(config, tmp_path / "run", {}), tmp_path / "run" / "checkpoints" / "step_000003")
    runs.assert_same_run(runs.train(tmp_path, "run", config), reference)


# What trains.

TWO_STEPS = CONSTANT | {"step_scheduler": {"max_steps": 2, "ckpt_every_steps": 2}}
PARTS = ("model.vision_model.", "model.connector.", "model.text_model.", "lm_head.")


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        (None, PARTS[1:]),
        ([{"freeze": "*"}, {"unfreeze": "model.connector"}], PARTS[1:2]),
        ([{"freeze": "model.text_model"}, {"freeze": "lm_head"}], PARTS[:2]),
    ],
    ids=["default", "projector", "vision"],
)
def test_what_is_frozen_does_not_move(
    rules: list[dict[str, str]] | None, parts: tuple[str, ...], inputs: Path, run: Runner
) -> None:
    status, text = run(TWO_STEPS, {"freeze": rules})
    assert status == 0, text
    trained = {name for name in weights(inputs / "idefics3") if name.startswith(parts)}
    assert moved(run.run_dir, inputs / "idefics3") == trained
    optimizer = runs.tensors(run.run_dir / "checkpoints/latest/optim")
    assert {name.split("/")[-1] for name in optimizer} == trained


# The export.


def asked(processor: Any, question: dict[str, Any], images: list[Image.Image]) -> Any:
    """What a stock model gets for a turn of the user and its images, as transformers documents it."""
    given = iter(images)
    parts = [part | {"image": next(given)} if part["type"] == "image" else part for part in question["content"]]
    for part in parts:
        part.pop("path", None)
    return processor.apply_chat_template(
        [user(*parts)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Of a stock model about one image, by the processor in `folder`."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    given = asked(AutoProcessor.from_pretrained(folder), user({"type": "image"}, say("What is this?")), [image])
    model.eval()
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] > given["input_ids"].shape[1]
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("family", MODELS)
def test_from_a_folder_to_an_export(family: str, inputs: Path, tmp_path: Path) -> None:
    """Whole runs of one and of two ranks, with answers about rows: the same, and the export is the trained model."""
    config = written(tmp_path / "config.yaml", inputs, TWO_STEPS, {"generate": {"num_rows": 2}}, family=family)
    one = runs.train(tmp_path, "one", config)
    two = runs.train(tmp_path, "two", config, {"step_scheduler.local_batch_size": "2"}, 2)
    compare_metrics(two, one)
    answers = [re.findall("<figcaption.*", (folder / "report.html").read_text()) for folder in (one, two)]
    assert answers[0] == answers[1] != []
    stock = AutoModelForImageTextToText.from_pretrained(one / "export", dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(inputs / family, dtype=torch.float32)
    # The trained weights, straight from the checkpoint, which has the names of the modules.
    stored = runs.tensors(one / "checkpoints/latest/model")
    trained = AutoModelForImageTextToText.from_config(stock.config)
    trained.load_state_dict({name.removeprefix("model/"): tensor for name, tensor in stored.items()})
    ours = logits(stock, one / "export")
    assert torch.equal(ours, logits(trained, inputs / family))
    assert not torch.allclose(ours, logits(base, inputs / family))


@pytest.mark.parametrize("family", MODELS)
def test_answers_are_those_of_stock_generation(family: str, inputs: Path) -> None:
    processor = AutoProcessor.from_pretrained(inputs / family)
    dataset = am_data.VisionChatDataset(inputs / "rows.jsonl", processor=processor)
    stock = AutoModelForImageTextToText.from_pretrained(inputs / family, dtype=torch.float32)
    answers = vision.answer_rows(stock, processor, dataset, NUM_ROWS, 6)
    lines = (inputs / "rows.jsonl").read_text().splitlines()
    with_images = [index for index in range(NUM_ROWS) if dataset.images(index)]
    assert 0 < len(with_images) < NUM_ROWS
    for index, (images, _, said, expected) in zip(with_images, answers.rows, strict=True):
        question, correct = json.loads(lines[index])["messages"]
        assert len(images) == len(dataset.images(index))
        assert expected == correct["content"][0]["text"]
        given = asked(processor, question, dataset.images(index))
        output = stock.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert said == processor.tokenizer.decode(output, skip_special_tokens=True)
    assert any(said for *_, said, _ in answers.rows)
    assert answers.shuffled


# peft 0.21 reads a flag by the name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", [EVERYWHERE, SAVED], ids=["everywhere", "saved"])
def test_adapters_open_in_peft_and_merged(adapter: dict[str, Any], inputs: Path, run: Runner) -> None:
    assert run(TWO_STEPS, adapter) == (0, "")
    exported = run.run_dir / "export"
    stored = safetensors.torch.load_file(exported / "adapter_model.safetensors")
    for part in ("text_model", "connector", "vision_model"):
        learned = [tensor for name, tensor in stored.items() if f".{part}." in name and "lora_A" not in name]
        assert learned
        assert all(tensor.any() for tensor in learned)
    base = AutoModelForImageTextToText.from_pretrained(inputs / "idefics3", dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(base, exported)
    ours = logits(opened, exported)
    with opened.disable_adapter():
        assert not torch.allclose(logits(opened, exported), ours)

    shutil.rmtree(run.run_dir)
    assert run(TWO_STEPS, adapter, {"export": {"merge_adapter": True}}) == (0, "")
    merged = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    require_close("logits", logits(merged, exported), ours)
    names = weights(inputs / "idefics3")
    target, whole = adapter["peft"]["target_modules"], PARTS[:2] if "modules_to_save" in adapter["peft"] else ()
    expected = {name for name in names if re.fullmatch(rf"{target}\.weight", name) or name.startswith(whole)}
    assert moved(run.run_dir, inputs / "idefics3") == expected


# A composed model.


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with four unused tokens, its embeddings as many as its tokens."""
    folder = tmp_path_factory.mktemp("language") / "model"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/data/tiny/tokenizer")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", *SPARE]})
    torch.manual_seed(3)
    text = TINY["model"]["config"]["text_config"] | {"vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SPARE = {
    "<spare_0>": "<fake_token_around_image>",
    "<spare_1>": "<image>",
    "<spare_2>": "<end_of_utterance>",
    "<spare_3>": "<global-img>",
}


def composed(language_model: Path, **changes: Any) -> dict[str, Any]:
    """The change to a config that composes its model, as the quickstart does."""
    vision_config = TINY["model"]["config"]["vision_config"]
    size = {"longest_edge": 48}
    processor = {
        "_target_": "transformers.Idefics3Processor",
        "_partial_": True,
        "image_seq_len": 4,
        "image_processor": {
            "_target_": "transformers.models.idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil",
            "do_image_splitting": False,
            "size": size,
            "max_image_size": size,
            "image_mean": [0.5, 0.5, 0.5],
        },
        "chat_template": (PROCESSOR / "chat_template.jinja").read_text(),
    }
    folder = {
        "_target_": "am_recipes.quickstart.compose",
        "language_model": str(language_model),
        "config": {"model_type": "idefics3", "scale_factor": 2, "vision_config": vision_config},
        "processor": processor,
        "replace_tokens": SPARE,
    }
    return {"model": {"name_or_path": folder | changes}}


def test_a_composed_model(
    language_model: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Runner
) -> None:
    monkeypatch.setenv("AUTOMODEL_CACHE", str(tmp_path / "cache"))
    config = configs.parse(written(tmp_path / "config.yaml", inputs, composed(language_model)))
    # Two processes at once: one composes, both get its folder.
    queue = runs.SERVER.Queue()
    processes = [
        runs.SERVER.Process(target=compose_into, args=(queue, config.source, tmp_path / "cache")) for _ in range(2)
    ]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=60) for _ in processes}
    assert runs.finish(processes) == 0
    (folder,) = folders
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {Path(folder).name, Path(folder).name + ".lock"}

    before = weights(Path(folder))
    text = weights(language_model)
    assert torch.equal(before["model.text_model.embed_tokens.weight"], text["model.embed_tokens.weight"])
    assert torch.equal(before["lm_head.weight"], text["lm_head.weight"])
    assert torch.equal(
        before["model.text_model.layers.1.mlp.up_proj.weight"], text["model.layers.1.mlp.up_proj.weight"]
    )
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_tokens_to_ids(list(SPARE.values())) == list(range(2048, 2052))

    # Whatever was drawn before in this process, the description decides.
    shutil.rmtree(folder)
    torch.rand(5)
    where = config.model.name_or_path
    assert str(where.build()) == folder
    again = weights(Path(folder))
    assert [name for name in before if not torch.equal(before[name], again[name])] == []
    assert str(where.build(seed=43)) != folder

    run.refuses(
        rf"{folder} gives model.vision_model random weights, and nothing of it would train; without an adapter say",
        composed(language_model),
    )
    assert run(TWO_STEPS, composed(language_model), {"freeze": []}) == (0, "")
    assert runs.metrics(run.run_dir)[-1]["val_loss"] < runs.metrics(run.run_dir)[0]["val_loss"]
    # What is random is said of the composed folder alone.
    assert sources.random_parts(Path(folder))
    assert sources.random_parts(run.run_dir / "export") == ()


def compose_into(queue: Any, config: Path, cache: Path) -> None:
    os.environ["AUTOMODEL_CACHE"] = str(cache)
    queue.put(str(configs.parse(config).model.name_or_path.build()))


def test_what_cannot_be_composed(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Runner
) -> None:
    monkeypatch.setenv("AUTOMODEL_CACHE", str(tmp_path / "cache"))
    for replace_tokens, message in (
        (
            {"<spare_9>": "<image>"},
            r"replace_tokens: '<spare_9>' is no added token of the tokenizer; choose .*<spare_0>",
        ),
        ({"<spare_0>": "<|im_start|>"}, r"has a token '<\|im_start\|>' already; leave '<spare_0>' as it is"),
        ({}, r"needs tokens that \S+ has no embedding for, such as .*<image>.*name unused tokens for them in"),
    ):
        run.refuses(message, composed(language_model, replace_tokens=replace_tokens))
        assert not (tmp_path / "cache").exists()


# Bad input, through the command line.


@pytest.fixture
def bad_rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows whose images are missing, unreadable, zero-sized, animated, or more than their placeholders."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "fine.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "fine.png").read_bytes()[:50])
    (tmp_path / "empty.png").touch()
    names = ["nowhere.png", "cut.png", "empty.png", "animated.gif"]
    rows = [
        {"messages": [user({"type": "image"}, say("What?")), answer("a square")], "images": [name]} for name in names
    ]
    two = {"messages": [user({"type": "image"}, say("What?")), answer("a square")], "images": ["fine.png", "fine.png"]}
    return [*rows, two]


REASONS = (
    r"1: an image is missing.*nowhere\.png is not a file",
    r"1: an image is unreadable.*cut\.png",
    r"1: an image is zero-sized.*empty\.png has 0 bytes",
    r"1: an image is animated.*animated\.gif has more than one frame",
    r"1: images and placeholders differ in number.*2 images, 1 placeholders",
)


def test_rows_with_bad_images_are_dropped_with_reasons(
    run: Runner, bad_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    fine = {"messages": [user({"type": "image"}, say("What?")), answer("a square")], "images": ["fine.png"]}
    path = write_rows(tmp_path / "rows.jsonl", [fine, *bad_rows, fine, fine, fine])
    status, text = run(TWO_STEPS, {"dataset": {"path": str(path)}, "validation_dataset": None})
    assert status == 0, text
    assert "9 rows read, 4 kept" in run.printed
    for reason in REASONS:
        assert re.search(reason, run.printed), run.printed
        assert re.search(reason, (run.run_dir / "report.html").read_text())


def test_no_row_with_a_good_image(run: Runner, bad_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", bad_rows)
    changes = {"dataset": {"path": str(path)}, "validation_dataset": None}
    for reason in REASONS:
        run.refuses(rf"all 5 rows of .*rows\.jsonl' were refused:\n(.*\n)*.*{reason}", changes)
    run.refuses(
        "an image is missing.*; mend it, or pass on_bad_row='drop'", changes, {"dataset": {"on_bad_row": "raise"}}
    )


def from_config(**changes: Any) -> dict[str, Any]:
    """The random model of tiny.yaml with other fields."""
    config = {"model": {"name_or_path": None, "config": TINY["model"]["config"] | changes}}
    return config | {"processor": {"name_or_path": str(PROCESSOR)}}


def test_a_processor_of_another_model(run: Runner, inputs: Path) -> None:
    run.refuses(
        r"Idefics3Processor marks images with token 3 \('<image>'\), but the idefics3 model looks for 7; set "
        "processor.name_or_path to the model's own processor",
        from_config(image_token_id=7),
    )
    run.refuses(
        r"Idefics3Processor writes the images of a row as 4 tokens with pixel_values \[1, 3, 48, 48\], .* do not fit "
        # As transformers says it, and as its oldest version that we support does.
        "the idefics3 model: (Image features and image tokens do not match|Number of elements of source < number)"
        ".*; set processor.name_or_path to the model's",
        from_config(scale_factor=4),
    )
    run.refuses(
        r"Qwen2_5_VLProcessor writes .* tokens with pixel_values .* do not fit the idefics3 model",
        from_config() | {"processor": {"name_or_path": str(inputs / "qwen2_5_vl")}},
    )
    run.refuses(
        "'recipes/data/chat' has no processor that can be loaded .*; set processor.name_or_path to a folder with",
        from_config() | {"processor": {"name_or_path": "recipes/data/chat"}},
    )


def test_a_model_of_the_other_kind(run: Runner, language_model: Path, inputs: Path) -> None:
    run.refuses(
        r"llama \(LlamaConfig\) is a text-only model without a vision tower; .*or a model of images and text such as",
        {"model": {"name_or_path": str(language_model)}},
    )
    sft = runs.shipped("tiny.yaml")
    sft["model"] = {"name_or_path": str(inputs / "idefics3")}
    config = run.folder / "sft.yaml"
    config.write_text(yaml.safe_dump(sft))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert cli.main([str(config), "--run_dir", str(run.run_dir)]) == 1
    assert re.search(r"idefics3 \(Idefics3Config\) is a model of images and text, not of text alone", errors.getvalue())
    assert not run.run_dir.exists()


def test_rules_that_cannot_be(run: Runner) -> None:
    run.refuses(
        r"freeze pattern 'model.visual' matches no parameter; nearest: .*model.vision_model",
        {"freeze": [{"freeze": "model.visual"}]},
    )
    run.refuses(
        r"\d+ parameters would train beside the adapter, such as model.connector.*, and its files would not hold them; "
        "name their modules in peft.modules_to_save instead of unfreezing them",
        EVERYWHERE | {"peft": EVERYWHERE["peft"] | {"target_modules": ".*q_proj"}},
        {"freeze": [{"unfreeze": "model.connector"}]},
    )
