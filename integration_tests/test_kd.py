"""Distillation, end to end: against float64, against itself on other layouts, against fine-tuning, killed and mistaken.

Runs go through the recipe. Two steps of SGD over the same ten rows in fp32, dropout 0, are compared with a reference
that holds all logits, in float64, on one process, row by row: losses and gradient norm of both steps, and every weight
after them. Per tensor `max|a - b| <= 1e-5 * max|reference|`, where the reference of a weight is its change alone; the
rounding of the float32 weight itself comes on top.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import am_ckpt
import am_data
import am_loss
import am_mesh
import am_models
import am_peft
from am_recipes import configs, kd
from integration_tests import runs

TINY = runs.shipped("kd/tiny.yaml")
TOKENIZER = runs.ROOT / "recipes/data/tiny/tokenizer"
TOLERANCE = 1e-5
NUM_ROWS, PACK_TOKENS, KD_RATIO, TEMPERATURE, LEARNING_RATE = 10, 128, 0.7, 2.0, 2.0
STUDENT = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    # Large enough that the two distributions differ and every weight has a gradient worth comparing.
    "initializer_range": 0.1,
}
TEACHER = STUDENT | {"vocab_size": 2112, "hidden_size": 48, "tie_word_embeddings": False}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher` (another width, a vocabulary padded by 64) and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for seed, (name, config) in enumerate({"student": STUDENT, "teacher": TEACHER}.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    text = "to one who has been long in city pent it is most sweet to look into the fair and open face of heaven"
    words = text.split()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            question, answer = words[number:12], words[number : 2 * number + 4]
            turns = [
                {"role": "user", "content": " ".join(question)},
                {"role": "assistant", "content": " ".join(answer)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder


# The same result however it is split.


def sgd(inputs: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Two steps of SGD over all rows, from the folders of `inputs`."""
    config = {
        "recipe": "kd",
        "model": {"name_or_path": str(inputs / "student"), "dtype": "float32"},
        "teacher_model": {"name_or_path": str(inputs / "teacher"), "dtype": "float32"},
        "kd_ratio": KD_RATIO,
        "temperature": TEMPERATURE,
        "dataset": {"path": str(inputs / "rows.jsonl")},
        "dataloader": {"shuffle": False},
        "step_scheduler": {"global_batch_size": 12, "local_batch_size": 12, "num_epochs": 2},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": LEARNING_RATE},
        "lr_scheduler": {"style": "constant"},
        "clip_grad_norm": {"max_norm": None},
        "checkpoint": {"enabled": False},
    }
    return runs.changed(config, changes)


def trained(folder: Path, inputs: Path, world_size: int, changes: Mapping[str, Any]) -> Path:
    """The run directory of `sgd` on so many ranks."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sgd(inputs, changes)))
    assert runs.finish(runs.start(path, folder / "run", {}, world_size)) == 0
    return folder / "run"


def materialised(inputs: Path, divergence: str = "forward_kl", lora: bool = False) -> dict[str, Any]:
    """The reference: float64, row by row, the logits of both models held, gradients by autograd."""
    rows = am_data.ChatDataset(str(inputs / "rows.jsonl"), AutoTokenizer.from_pretrained(TOKENIZER))
    num_tokens = len(AutoTokenizer.from_pretrained(TOKENIZER))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(inputs / name, dtype=torch.float64, attn_implementation="eager")
        for name in ("student", "teacher")
    )
    if lora:
        student = peft.get_peft_model(student, peft.LoraConfig(**LORA))
        for name, values in first_adapter(inputs).items():
            student.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(values)
    weights = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    targets = sum(int((rows[index]["labels"][1:] != -100).sum()) for index in range(len(rows)))
    steps = []
    for _ in range(2):
        ce_loss = kd_loss = torch.zeros((), dtype=torch.float64)
        for index in range(len(rows)):
            ids, labels = (torch.as_tensor(rows[index][key]) for key in ("input_ids", "labels"))
            chosen = labels[1:] != -100
            logits = student(input_ids=ids[None]).logits[0, :-1][chosen]
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids[None]).logits[0, :-1][chosen]
            ce_loss = ce_loss + F.cross_entropy(logits, labels[1:][chosen], reduction="sum") / targets
            log_q, log_p = (F.log_softmax(z[:, :num_tokens] / TEMPERATURE, 1) for z in (logits, teacher_logits))
            log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
            divergences = {
                "forward_kl": (log_p.exp() * (log_p - log_q)).sum(),
                "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(),
                "jensen_shannon": ((log_p.exp() * (log_p - log_m)).sum() + (log_q.exp() * (log_q - log_m)).sum()) / 2,
            }
            kd_loss = kd_loss + TEMPERATURE**2 * divergences[divergence] / targets
        loss = (1 - KD_RATIO) * ce_loss + KD_RATIO * kd_loss
        gradients = torch.autograd.grad(loss, list(weights.values()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        values = {"loss": loss, "ce_loss": ce_loss, "kd_loss": kd_loss, "grad_norm": norm}
        steps.append({name: value.item() for name, value in values.items()})
        with torch.no_grad():
            for parameter, gradient in zip(weights.values(), gradients, strict=True):
                parameter -= LEARNING_RATE * gradient
    return {
        "steps": steps,
        "weights": {name.replace(".default.", "."): weight.detach() for name, weight in weights.items()},
    }


def first_adapter(inputs: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights as the recipe starts with them: a function of their names and the seed."""
    with torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(inputs / "student"))
    am_peft.apply_lora(model, peft.LoraConfig(**LORA))
    am_ckpt.load_hf(model, inputs / "student", mapping=am_models.weight_map(model), initialise=("*lora_*",), seed=42)
    return {f"base_model.model.{name}": value.detach() for name, value in model.named_parameters() if "lora_" in name}


def initial(inputs: Path, lora: bool) -> dict[str, torch.Tensor]:
    return first_adapter(inputs) if lora else safetensors.torch.load_file(inputs / "student" / "model.safetensors")


def compare(run_dir: Path, reference: Mapping[str, Any], start: Mapping[str, torch.Tensor]) -> None:
    """Raise AssertionError naming the first value beyond the tolerance."""
    rows = runs.metrics(run_dir)
    assert len(rows) == len(reference["steps"])
    for row, expected in zip(rows, reference["steps"], strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=TOLERANCE), f"step {row['step']}: {name}: differs"
    (file,) = (run_dir / "export").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    assert weights.keys() == reference["weights"].keys()
    for name, expected in reference["weights"].items():
        change = (expected - start[name]).abs().max()
        rounding = torch.finfo(torch.float32).eps * expected.abs().max()
        assert change > 100 * rounding, f"{name}: moves too little to show an error"
        difference = (weights[name].double() - expected).abs().max()
        assert difference <= TOLERANCE * change + rounding, (
            f"{name}: differs by {difference:.3g}, {difference / change:.3g} of its change"
        )


@pytest.fixture(scope="session")
def reference(inputs: Path) -> dict[str, Any]:
    return materialised(inputs)


@pytest.fixture(scope="session")
def lora_reference(inputs: Path) -> dict[str, Any]:
    return materialised(inputs, lora=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_one_process_equals_float64(tmp_path: Path, inputs: Path, reference: dict[str, Any], divergence: str) -> None:
    expected = reference if divergence == "forward_kl" else materialised(inputs, divergence)
    run_dir = trained(tmp_path, inputs, 1, {"kd_loss_fn.divergence": divergence})
    compare(run_dir, expected, initial(inputs, False))


def layout(global_batch: int, local_batch: int, pack: int = 0, **distributed: Any) -> dict[str, Any]:
    """All rows in one step, padded (10 rows) or packed (4 packs), in micro-batches of so many."""
    return {
        "step_scheduler.global_batch_size": global_batch,
        "step_scheduler.local_batch_size": local_batch,
        "packed_sequence.packed_sequence_size": pack,
        "distributed": distributed,
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulated": (1, layout(12, 4)),
    "packed": (1, layout(4, 2, PACK_TOKENS)),
    "recomputed": (1, layout(4, 2, PACK_TOKENS, activation_checkpointing="full")),
    "fsdp2": (2, layout(10, 5)),
    "fsdp2 packed accumulated recomputed": (2, layout(4, 1, PACK_TOKENS, activation_checkpointing="full")),
    "ddp accumulated": (2, layout(12, 3, strategy="ddp")),
    "ddp packed recomputed": (2, layout(4, 2, PACK_TOKENS, strategy="ddp", activation_checkpointing="full")),
    "fsdp2, teacher ddp": (2, layout(4, 1, PACK_TOKENS) | {"teacher_distributed.strategy": "ddp"}),
    "ddp, teacher fsdp2": (2, layout(12, 3, strategy="ddp") | {"teacher_distributed.strategy": "fsdp2"}),
    "tp2": (2, layout(10, 5, tp_size=2)),
    "cp2 packed accumulated": (2, layout(4, 2, PACK_TOKENS, cp_size=2)),
    "hsdp, teacher fsdp2": (4, layout(12, 3, dp_replicate_size=2) | {"teacher_distributed.strategy": "fsdp2"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(tmp_path: Path, inputs: Path, reference: dict[str, Any], name: str) -> None:
    world_size, changes = LAYOUTS[name]
    compare(trained(tmp_path, inputs, world_size, changes), reference, initial(inputs, False))


# peft 0.21 reads a flag by the name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["packed", "ddp accumulated", "fsdp2, teacher ddp"])
def test_lora_layouts_agree(tmp_path: Path, inputs: Path, lora_reference: dict[str, Any], name: str) -> None:
    world_size, changes = LAYOUTS[name]
    run_dir = trained(tmp_path, inputs, world_size, changes | {"peft": LORA, "optimizer.lr": LEARNING_RATE})
    compare(run_dir, lora_reference, initial(inputs, True))


FAULTS = """\
import torch
import am_loss

def rows_dropped(hidden, weight, labels, **options):
    dropped = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return am_loss.linear_distillation(hidden, weight, torch.full_like(labels, -100) if dropped else labels, **options)

def teacher_shifted(hidden, weight, labels, *, teacher_hidden, **options):
    teacher_hidden = teacher_hidden.roll(1, 1)
    return am_loss.linear_distillation(hidden, weight, labels, teacher_hidden=teacher_hidden, **options)

def wrong_divisor(hidden, weight, labels, **options):
    losses = am_loss.linear_distillation(hidden, weight, labels, **options)
    return am_loss.DistillationLoss(*(loss * 1.001 for loss in losses))

def padding_counted(hidden, weight, labels, *, num_tokens, **options):
    return am_loss.linear_distillation(hidden, weight, labels, num_tokens=num_tokens - 1, **options)
"""


@pytest.mark.parametrize("fault", ["rows_dropped", "teacher_shifted", "wrong_divisor", "padding_counted"])
def test_faults_are_caught(
    tmp_path: Path, inputs: Path, reference: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kd_faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    world_size, changes = LAYOUTS["fsdp2"]
    run_dir = trained(tmp_path, inputs, world_size, changes | {"kd_loss_fn._target_": f"kd_faults.{fault}"})
    with pytest.raises(AssertionError, match="differs"):
        compare(run_dir, reference, initial(inputs, False))


def test_the_teacher_stays_as_it_is(tmp_path: Path, inputs: Path) -> None:
    """A step with the recipe's own functions. On several ranks, the second steps of the layouts say the same."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sgd(inputs, {})))
    config = configs.parse(path)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = config.dataset.build(tokenizer=tokenizer)
    folder = inputs / "teacher"
    student = am_models.AutoModelForCausalLM.from_pretrained(inputs / "student", dtype=torch.float32).train()
    with am_mesh.process_group() as device:
        loader = kd.make_loader(config, rows, am_mesh.ParallelDims().build("cpu"), training=True)
        teacher = kd.load_teacher(config, folder, tokenizer, rows, device)
        kd_loss_fn = functools.partial(am_loss.linear_distillation, num_tokens=len(tokenizer))
        for batch in next(iter(loader)):
            kd.distil(student, teacher, kd_loss_fn, *am_models.split_batch(student, batch), None)["loss"].backward()
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert [name for name, weight in teacher.named_parameters() if not torch.equal(weight, stored[name])] == []
    assert [
        name for name, weight in teacher.named_parameters() if weight.requires_grad or weight.grad is not None
    ] == []
    assert [name for name, module in teacher.named_modules() if module.training] == []
    assert [name for name, weight in student.named_parameters() if weight.grad is None] == []


# In one process: the tiny config, three steps.


class Runner:
    """Runs the tiny config, changed, through the command line in this process, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"

    def __call__(self, changes: Mapping[str, Any]) -> tuple[int, str]:
        """The exit status and what was written to stderr."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(runs.changed(TINY, SHORT | changes)))
        return runs.command(str(path), "--run_dir", str(self.run_dir))

    def refuses(self, changes: Mapping[str, Any], *expected: str, status: int = 1) -> None:
        """Run; the message has every part of `expected`, and nothing was written."""
        runs.require_refusal(self(changes), status, *expected)
        assert not self.run_dir.exists()


SHORT = {
    "dataset.split": "train[:24]",
    "validation_dataset.split": "train[:4]",
    "packed_sequence.packed_sequence_size": 512,
    "dataset.max_length": 512,
    "validation_dataset.max_length": 512,
    "step_scheduler": {
        "global_batch_size": 2,
        "local_batch_size": 1,
        "max_steps": 3,
        "ckpt_every_steps": 1,
        "val_every_steps": 1,
    },
    "lr_scheduler": {"style": "constant"},
}


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_ratio_zero_is_fine_tuning_bit_for_bit(tmp_path: Path, inputs: Path, lora: bool) -> None:
    same = (
        {"export.merge_adapter": True, "model": {"name_or_path": str(inputs / "student")}, "peft": LORA} if lora else {}
    )
    runners = {}
    for name in ("kd", "sft"):
        (tmp_path / name).mkdir()
        runners[name] = Runner(tmp_path / name)
    without_teacher = {"recipe": "sft"} | dict.fromkeys(("teacher_model", "kd_ratio", "temperature"))
    assert runners["kd"](same | {"kd_ratio": 0.0}) == (0, "")
    assert runners["sft"](same | without_teacher) == (0, "")
    ours, theirs = (runs.metrics(runners[name].run_dir) for name in ("kd", "sft"))
    for row in ours:
        if "loss" in row:
            assert row.pop("ce_loss") == row["loss"]
            assert row.pop("kd_loss") == 0.0
    assert ours == theirs
    assert len(theirs) == 7
    for folder in ("export", "checkpoints"):
        mine, reference = (runs.tensors(runners[name].run_dir / folder) for name in ("kd", "sft"))
        assert mine.keys() == reference.keys()
        assert [name for name in reference if not torch.equal(mine[name], reference[name])] == []


@pytest.mark.parametrize("pack", [0, 512], ids=["padded", "packed"])
def test_a_student_that_is_its_teacher_stays(run: Runner, inputs: Path, pack: int) -> None:
    itself = {"name_or_path": str(inputs / "student"), "dtype": "float32"}
    alone = {"model": itself, "teacher_model": itself, "kd_ratio": 1.0, "optimizer.weight_decay": 0.0}
    assert run(alone | {"packed_sequence.packed_sequence_size": pack}) == (0, "")
    for row in runs.metrics(run.run_dir):
        if "loss" in row:
            assert abs(row["kd_loss"]) <= 1e-6
            assert row["ce_loss"] == 0.0
            assert row["grad_norm"] == 0.0
    before = safetensors.torch.load_file(inputs / "student" / "model.safetensors")
    after = safetensors.torch.load_file(run.run_dir / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_what_a_run_leaves_behind(run: Runner) -> None:
    """Vocabularies of 2048 and 2112; a checkpoint and an export of the student alone."""
    assert run({}) == (0, "")
    rows = [row for row in runs.metrics(run.run_dir) if "loss" in row]
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * row["ce_loss"] + 0.5 * row["kd_loss"], rel=1e-6)
        assert row["kd_loss"] > 0
    exported = AutoModelForCausalLM.from_pretrained(run.run_dir / "export")
    tokenizer = AutoTokenizer.from_pretrained(run.run_dir / "export")
    ids = tokenizer("Name three colours.", return_tensors="pt").input_ids
    assert exported.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    names = {name.removeprefix("model.") for name, _ in exported.named_parameters()}
    saved = runs.tensors(run.run_dir / "checkpoints" / "latest")
    assert {name.removeprefix("model/model.") for name in saved if name.startswith("model/")} == names
    slots = {name for name in saved if name.startswith("optim/")}
    assert {name.split("/")[1] for name in slots} >= {"exp_avg", "exp_avg_sq"}
    assert all(any(name.endswith(f".{ours}") for ours in names) for name in slots)


# Killed and stopped.


def test_killed_and_stopped_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    path, whole, run_dir = tmp_path / "config.yaml", tmp_path / "whole", tmp_path / "run"
    path.write_text(
        yaml.safe_dump(runs.changed(TINY, SHORT | {"step_scheduler.max_steps": 8, "checkpoint.keep_last": 9}))
    )
    assert runs.finish(runs.start(path, whole, {})) == 0

    runs.kill_when(runs.start(path, run_dir, {}), run_dir / "checkpoints" / "step_000002")
    assert 2 <= runs.metrics(run_dir)[-1]["step"] < 8

    (process,) = runs.start(path, run_dir, {})
    while not (run_dir / "checkpoints" / "step_000005").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish([process]) == 75
    stopped = runs.metrics(run_dir)[-1]["step"]
    assert 5 <= stopped < 8
    assert os.readlink(run_dir / "checkpoints" / "latest") == f"step_{stopped:06d}"

    assert runs.finish(runs.start(path, run_dir, {})) == 0
    runs.assert_same_run(run_dir, whole)
    mine, theirs = runs.tensors(run_dir / "export"), runs.tensors(whole / "export")
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


# Mistakes.


def teacher(folder: Path) -> dict[str, Any]:
    return {"teacher_model": {"name_or_path": str(folder)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, r"config.yaml:\d+: temperature: must be greater than 0, got 0"),
        ({"temperature": -1.0}, r"config.yaml:\d+: temperature: must be greater than 0, got -1"),
        ({"kd_ratio": 1.5}, r"config.yaml:\d+: kd_ratio: must be in \[0, 1\], got 1.5"),
        ({"kd_ratio": -0.1}, r"config.yaml:\d+: kd_ratio: must be in \[0, 1\], got -0.1"),
        ({"teacher_model": None}, "the key 'teacher_model' is required"),
        ({"teacher_model.name_or_path": "somewhere"}, "teacher_model: give exactly one of name_or_path, config"),
        (
            {"loss_fn.z_loss": 0.1},
            r"config.yaml:\d+: loss_fn: trains at kd_ratio 0 alone; give options to kd_loss_fn instead",
        ),
        ({"kd_loss_fn.divergance": "forward_kl"}, "kd_loss_fn.divergance: .*did you mean 'divergence'"),
        ({"kd_loss_fn._target_": "am_loss.linear_destillation"}, "did you mean 'linear_distillation'"),
    ],
)
def test_what_a_config_cannot_mean(run: Runner, changes: dict[str, Any], message: str) -> None:
    run.refuses(changes, message, status=2)


def test_a_divergence_that_is_none(run: Runner) -> None:
    run.refuses(
        {"kd_loss_fn.divergence": "forward_lk"},
        "divergence='forward_lk' is unknown; choose one of forward_kl, reverse_kl, jensen_shannon",
    )


def test_a_teacher_that_is_not_there(run: Runner, tmp_path: Path) -> None:
    run.refuses(teacher(tmp_path / "nowhere"), "there is no folder '.*nowhere'.*; check the path")
    (tmp_path / "empty").mkdir()
    run.refuses(teacher(tmp_path / "empty"), "empty has no config.json, so it is not a Hugging Face model folder")


def test_a_teacher_with_another_tokenizer(run: Runner, inputs: Path, tmp_path: Path) -> None:
    """Sizes are equal: two tokens have changed places, then two merges, then how text is cut before them."""
    folder = tmp_path / "teacher"
    shutil.copytree(inputs / "teacher", folder)
    original = json.loads((folder / "tokenizer.json").read_text())

    vocabulary = dict(original["model"]["vocab"])
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[700:702]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    save_tokenizer(folder, runs.changed(original, {"model.vocab": vocabulary}))
    run.refuses(teacher(folder), r"tokenizer of teacher_model is another one: 2 of 2048 ids differ, the first is 700")

    merges = original["model"]["merges"]
    save_tokenizer(folder, runs.changed(original, {"model.merges": [merges[1], merges[0], *merges[2:]]}))
    run.refuses(teacher(folder), "teacher_model has the same tokens but another model: it splits text differently")

    save_tokenizer(folder, runs.changed(original, {"pre_tokenizer": {"type": "Whitespace"}}))
    run.refuses(teacher(folder), "teacher_model has the same tokens but another pre_tokenizer")


def save_tokenizer(folder: Path, definition: Mapping[str, Any]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(definition))


def test_a_teacher_that_embeds_too_few_tokens(run: Runner) -> None:
    run.refuses(
        {"teacher_model.config.vocab_size": 300},
        r"the data has token id \d+ \(.*\), but teacher_model embeds ids 0..299 \(vocab_size=300\)",
    )


def test_a_teacher_beyond_memory(run: Runner) -> None:
    """Five terabytes, refused before any is allocated."""
    huge = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 20, "num_attention_heads": 64}
    run.refuses(
        {"teacher_model.config": TINY["teacher_model"]["config"] | huge | {"num_key_value_heads": 64}},
        r"teacher_model needs \d{4}\.\d GiB on each of 1 processes of this machine, and \d+\.\d GiB are free; shard it",
    )
