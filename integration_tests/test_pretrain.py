"""Pre-training as a user runs it: the same run on any layout and over kills, what it exports, and what it refuses.

Everything is in fp32 on the shipped tokens. Where layouts are compared, numbers are equal within
`max|a - b| <= 1e-5 * max|reference|` per tensor: losses and gradient norms of every step, under AdamW and SGD, and
the weights after three steps of SGD that move each tensor by more than a thousand times that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import am_data
import am_loss
from am_recipes import cli
from integration_tests import runs

ROOT = Path(__file__).resolve().parents[1]
TINY = runs.shipped("pretrain/tiny.yaml")
TOLERANCE, WINDOW, NUM_WINDOWS = 1e-5, 64, 40
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model": {"config": SMALL}},
    # Coefficients that make both losses a visible part of the gradient.
    "qwen3_moe": {"model": {"config": SMALL | EXPERTS}, "moe": {"balance_loss": 0.1, "z_loss": 0.01}},
}
# What random weights leave with small gradients gets a larger rate, so that three steps move it too.
SGD = {
    name: {
        "_target_": "torch.optim.SGD",
        "lr": 0.3,
        "param_group_overrides": [{"pattern": pattern, "lr_mult": factor} for pattern, factor in rates.items()],
    }
    for name, rates in {
        "llama": {"norm": 100.0, "[qk]_proj": 30.0},
        "qwen3_moe": {"norm": 100.0, "experts": 5.0},
    }.items()
}
MUON = {
    "_target_": "torch.optim.Muon",
    "lr": 0.02,
    "weight_decay": 0.1,
    "adamw": {"lr": 3e-3, "betas": [0.9, 0.95]},
}
LAYOUTS = {
    "accumulation": (1, {"step_scheduler.local_batch_size": "1"}),
    "fsdp2-offloaded": (2, {"step_scheduler.local_batch_size": "2", "distributed.cpu_offload": "true"}),
    "fsdp2-accumulation-recomputed": (
        2,
        {"step_scheduler.local_batch_size": "1", "distributed.activation_checkpointing": "full"},
    ),
    "ddp-accumulation": (2, {"step_scheduler.local_batch_size": "1", "distributed.strategy": "ddp"}),
    "tp2-sp-accumulation": (
        2,
        {
            "step_scheduler.local_batch_size": "2",
            "distributed.tp_size": "2",
            "distributed.sequence_parallel": "true",
            "distributed.activation_checkpointing": "selective",
        },
    ),
    "cp2": (2, {"distributed.cp_size": "2"}),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty windows of text to train on and four to validate with; their last tokens fit no window."""
    folder = tmp_path_factory.mktemp("shards")
    text = np.fromfile(ROOT / "recipes/data/pretrain/train_000000.bin", dtype="<u2", offset=1024)
    am_data.write_token_shards([text[: NUM_WINDOWS * WINDOW + 9]], folder, prefix="train", shard_tokens=1000)
    am_data.write_token_shards([text[-4 * WINDOW - 1 :]], folder, prefix="validation")
    return folder


def written(path: Path, shards: Path, *changes: Mapping[str, Any]) -> Path:
    """A config file: tiny.yaml on `shards`, ten steps of four windows, with `changes` merged in; None takes out."""
    config = json.loads(json.dumps(TINY))
    short = {
        "dataset": {"path": str(shards / "train_*.bin"), "sequence_length": WINDOW},
        "validation_dataset": {"path": str(shards / "validation_*.bin"), "sequence_length": WINDOW},
        "step_scheduler": {"global_batch_size": 4, "local_batch_size": 4, "max_tokens": None, "val_every_steps": 5},
    }
    for change in (short, MODELS["llama"], *changes):
        runs.merge(config, change)
    path.write_text(yaml.safe_dump(config))
    return path


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run_dir / "export" / "model.safetensors")


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
    ours, theirs = exported(run_dir), exported(reference)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference, scale = (ours[name] - expected).abs().max().item(), expected.abs().max().item()
        assert difference <= TOLERANCE * scale, f"{name} differs by {difference / scale:.3g} of its largest"


# Layouts.

CONSTANT = {"lr_scheduler": {"style": "constant", "warmup_steps": 0, "decay_steps": None, "min_lr": None}}
THREE_STEPS = CONSTANT | {"step_scheduler": {"max_steps": 3}}


@pytest.fixture(scope="module", params=MODELS)
def one_process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shards: Path
) -> tuple[Path, Path, Path]:
    """A config of three steps of SGD, its run on one process in one micro-batch, and the weights it starts from."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = (MODELS[request.param], THREE_STEPS, {"optimizer": None}, {"optimizer": SGD[request.param]})
    config = written(folder / "config.yaml", shards, *changes)
    return config, runs.train(folder, "reference", config), runs.train(folder, "start", config, {"optimizer.lr": "0.0"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, one_process: tuple[Path, Path, Path], tmp_path: Path) -> None:
    config, reference, start = one_process
    for name, weights in exported(reference).items():
        moved = (weights - exported(start)[name]).abs().max() / weights.abs().max()
        assert moved >= 1000 * TOLERANCE, f"{name} moves by {moved:.2g} alone, which shows nothing"
    world_size, overrides = LAYOUTS[layout]
    run_dir = runs.train(tmp_path, "run", config, overrides, world_size)
    compare_metrics(run_dir, reference)
    compare_weights(run_dir, reference)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_the_first_weights_are_those_of_one_process(
    strategy: str, one_process: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config, _, start = one_process
    overrides = {"optimizer.lr": "0.0", "step_scheduler.local_batch_size": "2", "distributed.strategy": strategy}
    ours = exported(runs.train(tmp_path, "run", config, overrides, 2))
    expected = exported(start)
    assert ours.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    assert all(weights.std() > 0 for name, weights in expected.items() if "norm" not in name)


def half_of_the_targets(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
    """A seeded fault: the loss of the last rank is dropped."""
    dropped = torch.distributed.get_rank() == 1
    return am_loss.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100) if dropped else labels, **options)


def test_a_dropped_rank_is_caught(one_process: tuple[Path, Path, Path], tmp_path: Path) -> None:
    config, reference, _ = one_process
    faulty = tmp_path / "faulty.yaml"
    fault = {"loss_fn": {"_target_": "integration_tests.test_pretrain.half_of_the_targets"}}
    faulty.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | fault))
    run_dir = runs.train(tmp_path, "run", faulty, {"step_scheduler.local_batch_size": "2"}, 2)
    with pytest.raises(AssertionError, match="loss differs"):
        compare_metrics(run_dir, reference)
    with pytest.raises(AssertionError, match="of its largest"):
        compare_weights(run_dir, reference)


def test_router_losses_and_loads_are_those_of_the_formulas(shards: Path, tmp_path: Path) -> None:
    """The first step against a stock model with the same weights: cross-entropy, balance and z-loss, loads."""
    changes = (MODELS["qwen3_moe"], THREE_STEPS, {"optimizer": {"lr": 0.0}, "dataloader": {"shuffle": False}})
    config = written(tmp_path / "config.yaml", shards, *changes)
    run_dir = runs.train(tmp_path, "run", config)
    row = runs.metrics(run_dir)[1]
    windows = am_data.TokenShards(str(shards / "train_*.bin"), WINDOW)
    ids = torch.stack([torch.from_numpy(windows[index]["labels"]) for index in range(4)])
    stock = AutoModelForCausalLM.from_pretrained(run_dir / "export", dtype=torch.float32)
    with torch.no_grad():
        output = stock(ids[:, :-1], output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
    shares = []
    for logits in output.router_logits:
        logits_BSE = logits.unflatten(0, (4, WINDOW))
        chosen_BSE = torch.nn.functional.one_hot(logits_BSE.topk(2).indices, 4).sum(2).float()
        # E / A * share of the tokens, times mean probability, for each window.
        balance = (4 / 2 * chosen_BSE.mean(1) * logits_BSE.softmax(-1).mean(1)).sum(-1).mean()
        loss += 0.1 * balance + 0.01 * logits_BSE.logsumexp(-1).square().mean()
        shares.append(chosen_BSE.mean((0, 1)) / 2)
    assert row["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    assert row["max_violation"] == pytest.approx(torch.stack(shares).max().item() * 4 - 1, rel=TOLERANCE)
    entropies = [-(share * share.log()).sum().item() / np.log(4) for share in shares]
    assert row["entropy"] == pytest.approx(np.mean(entropies), rel=TOLERANCE)
    assert row["idle_experts"] == 0
    # Without padding every token is a target, of the window's last one too.
    assert row["tokens"] == row["target_tokens"] == 4 * WINDOW


# Kills.

EVERY_STEP = {"step_scheduler": {"ckpt_every_steps": 1}, "checkpoint": {"keep_last": 20}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Path, Path]:
    """A config of one epoch, which is ten steps, and its run without a kill."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = written(folder / "config.yaml", shards, EVERY_STEP)
    return config, runs.train(folder, "run", config)


def test_killed_twice_in_one_run(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    config, reference = uninterrupted
    for step in (2, 7):
        runs.kill_when(runs.start(config, tmp_path / "run", {}), tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    runs.assert_same_run(runs.train(tmp_path, "run", config), reference)


def test_muon_and_experts_resume_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    changes = ({"optimizer": None}, {"optimizer": MUON}, {"lr_scheduler": {"min_lr": 0.0}}, MODELS["qwen3_moe"])
    config = written(tmp_path / "config.yaml", shards, EVERY_STEP, *changes)
    runs.kill_when(runs.start(config, tmp_path / "run", {}), tmp_path / "run" / "checkpoints" / "step_000004")
    runs.assert_same_run(runs.train(tmp_path, "run", config), runs.train(tmp_path, "reference", config))


def test_windows_once_over_kills_and_changes_of_world_size(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    """1 rank, killed, 2 ranks, killed, 1 rank: every step has the loss that it has in one process, to 1e-5.

    AdamW keeps what it began: the ten steps are one epoch, so a window left out or seen twice is another loss.
    """
    config, reference = uninterrupted
    begun = runs.start(config, tmp_path / "run", {})
    runs.kill_when(begun, tmp_path / "run" / "checkpoints" / "step_000003")
    two = runs.start(config, tmp_path / "run", {"step_scheduler.local_batch_size": "2"}, 2)
    runs.kill_when(two, tmp_path / "run" / "checkpoints" / "step_000006")
    compare_metrics(runs.train(tmp_path, "run", config), reference)
    launches = json.loads((tmp_path / "run" / "run.json").read_text())["launches"]
    assert [launch["world_size"] for launch in launches] == [1, 2, 1]
    assert [sum(launch["environment"]["hosts"].values()) for launch in launches] == [1, 2, 1]
    assert NUM_WINDOWS // 4 == 10 == runs.metrics(reference)[-1]["step"]


# The end.


@pytest.mark.parametrize("model", MODELS)
def test_the_export_is_the_trained_model(model: str, shards: Path, tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", shards, MODELS[model], THREE_STEPS)
    run_dir = runs.train(tmp_path, "run", config)
    stock = AutoModelForCausalLM.from_pretrained(run_dir / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    ids = tokenizer("The whale is not a fish.", return_tensors="pt").input_ids
    trained = AutoModelForCausalLM.from_config(stock.config).eval()
    # The trained weights, straight from the shards of the checkpoint, which has the names of the modules.
    weights = {
        name.removeprefix("model/"): tensor
        for name, tensor in runs.tensors(run_dir / "checkpoints/latest/model").items()
    }
    missing, unexpected = trained.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if model == "llama" else [])
    trained.tie_weights()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, trained(ids).logits)
    assert stock.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5


def test_training_goes_on_from_a_folder(uninterrupted: tuple[Path, Path], shards: Path, tmp_path: Path) -> None:
    _, first = uninterrupted
    model = {"config": None, "name_or_path": str(first / "export")}
    config = written(tmp_path / "config.yaml", shards, {"model": model, "tokenizer": None})
    rows = runs.metrics(runs.train(tmp_path, "run", config))
    assert rows[0]["val_loss"] == pytest.approx(runs.metrics(first)[-1]["val_loss"], rel=TOLERANCE)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


# The length of a run and its learning rates. One rank, in this process.


class Runner:
    """Runs a config through the command line, in a folder of its own."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder = folder
        self.shards = shards
        self.run_dir = folder / "run"

    def __call__(self, *changes: Mapping[str, Any]) -> tuple[int, str]:
        """The exit status and what was written to stderr."""
        config = written(self.folder / "config.yaml", self.shards, *changes)
        return runs.command("pretrain", "llm", "-c", str(config), "--run_dir", str(self.run_dir))

    def refuses(self, message: str, *changes: Mapping[str, Any], status: int = 1) -> None:
        """Run; one message that matches, no traceback, and nothing written."""
        runs.require_refusal(self(*changes), status, message)
        assert not self.run_dir.exists()


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Runner:
    return Runner(tmp_path, shards)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"style": "constant"}, {1: 0.005, 2: 0.01, 3: 0.01, 10: 0.01}),
        ({"style": "linear", "min_lr": 0.001}, {1: 0.005, 2: 0.01, 6: 0.0055, 10: 0.001}),
        ({"style": "cosine", "min_lr": 0.001}, {1: 0.005, 2: 0.01, 4: 0.0086820, 6: 0.0055, 10: 0.001}),
        ({"style": "wsd", "min_lr": 0.001, "decay_steps": 4}, {1: 0.005, 2: 0.01, 6: 0.01, 8: 0.0055, 10: 0.001}),
        ({"style": "inverse_sqrt"}, {1: 0.005, 2: 0.01, 8: 0.005, 10: 0.0044721}),
    ],
    ids=lambda value: value.get("style"),
)
def test_rates_at_the_corners(run: Runner, schedule: dict[str, Any], rates: dict[int, float]) -> None:
    changes = {"lr_scheduler": {"decay_steps": None, "min_lr": None}, "optimizer": {"lr": 0.01}}
    assert run(changes, {"lr_scheduler": {"warmup_steps": 2} | schedule}) == (0, "")
    logged = {row["step"]: row["lr"] for row in runs.metrics(run.run_dir) if "lr" in row}
    assert len(logged) == 10
    assert {step: logged[step] for step in rates} == pytest.approx(rates, rel=1e-4)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_tokens": 3 * 4 * WINDOW}, 3),
        ({"max_tokens": 3 * 4 * WINDOW + 1}, 4),
        ({"max_tokens": 3 * 4 * WINDOW, "max_steps": 2}, 2),
        ({"max_tokens": 1, "max_steps": 2}, 1),
        ({"num_epochs": 2, "max_steps": 12}, 12),
    ],
)
def test_budgets(run: Runner, budget: dict[str, int], steps: int) -> None:
    assert run(CONSTANT, {"step_scheduler": budget}) == (0, "")
    rows = [row for row in runs.metrics(run.run_dir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["epoch"] for row in rows] == [step // 10 for step in range(steps)]
    assert sum(row["tokens"] for row in rows) == steps * 4 * WINDOW


@pytest.mark.parametrize(("max_tokens", "steps"), [(40 * WINDOW, 14), (40 * WINDOW + 1, 15), (43 * WINDOW + 1, 16)])
def test_tokens_where_the_last_step_of_an_epoch_is_short(run: Runner, max_tokens: int, steps: int) -> None:
    scheduler = {"global_batch_size": 3, "local_batch_size": 3, "num_epochs": 2, "max_tokens": max_tokens}
    assert run(CONSTANT, {"step_scheduler": scheduler}) == (0, "")
    tokens = [row["tokens"] for row in runs.metrics(run.run_dir) if "loss" in row]
    assert len(tokens) == steps
    assert sum(tokens[:-1]) < max_tokens <= sum(tokens)


def test_validation_is_cross_entropy_whatever_trains(run: Runner) -> None:
    """A z-loss changes what training minimises, and its numbers; the first validation loss is that of the weights."""
    first = {}
    for z_loss in (0.0, 0.1):
        run.run_dir = run.folder / f"run-{z_loss}"
        loss = {"_target_": "am_loss.linear_cross_entropy", "z_loss": z_loss}
        assert run(CONSTANT, {"loss_fn": loss, "step_scheduler": {"max_steps": 1}}) == (0, "")
        validation, trained, *_ = runs.metrics(run.run_dir)
        first[z_loss] = validation["val_loss"], trained["loss"]
    assert first[0.0][0] == first[0.1][0]
    assert first[0.1][1] > first[0.0][1] + 1


def test_experts_without_a_declared_router(run: Runner) -> None:
    """A family that am-models does not declare trains as it is; only losses of its router cannot be had."""
    family = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    assert run(CONSTANT, {"model": {"config": family}, "step_scheduler": {"max_steps": 2}}) == (0, "")
    rows = runs.metrics(run.run_dir)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


# Bad input.


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """A copy of the first shard, to be damaged."""
    copy = tmp_path / "copied.bin"
    copy.write_bytes((shards / "train_000000.bin").read_bytes())
    return copy


def header(path: Path, field: int, value: int) -> None:
    fields = np.memmap(path, dtype="<i4", mode="r+", shape=(256,))
    fields[field] = value
    fields.flush()


def test_damaged_shards(run: Runner, copied: Path) -> None:
    on_copy = {"dataset": {"path": str(copied)}}
    whole = copied.read_bytes()
    copied.write_bytes(whole[:-10])
    run.refuses(r"copied.bin.* truncated", on_copy)
    copied.write_bytes(whole[:100])
    run.refuses(r"copied.bin has 100 bytes, a shard's header alone 1024: truncated; write it again", on_copy)
    for field, value, message in (
        (0, 7, "starts with 7, a token shard with 278895051 or 20240520; give .bin files written by"),
        (1, 2, "has format version 2, only 1 is known; write it again"),
        (3, 8, "says 8 bytes per token, which must be 2 or 4; write it again"),
        (3, 4, "truncated"),
    ):
        copied.write_bytes(whole)
        header(copied, field, value)
        run.refuses(f"error: .*copied.bin.* {message}", on_copy)
    run.refuses("nowhere.bin gives no .bin shard; give a file", {"dataset": {"path": "nowhere.bin"}})


def test_ids_beyond_the_vocabulary(run: Runner, copied: Path) -> None:
    np.memmap(copied, dtype="<u2", mode="r+", offset=1024)[77] = 5000
    run.refuses(
        "copied.bin has token id 5000 at token 77, beyond vocab_size=4096; tokenise the corpus with the tokenizer",
        {"dataset": {"path": str(copied)}},
    )
    run.refuses(
        r"train_000000.bin has token id \d+ at token \d+, beyond vocab_size=300; tokenise the corpus with the",
        {"model": {"config": {"vocab_size": 300}}},
    )


def test_windows_longer_than_a_table_of_positions(run: Runner) -> None:
    family = {"model_type": "gpt2", "n_positions": 63, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 4096}
    run.refuses(
        "the data has rows of 64 tokens, but the gpt2 model has a table of n_positions=63 positions; lower the",
        {"model": {"config": None}},
        {"model": {"config": family}},
    )


def test_windows_longer_than_the_data(run: Runner) -> None:
    run.refuses(
        r"2569 tokens in 3 shards, .*train_000000.bin first, are fewer than one window of sequence_length=2569 and a "
        "target; lower it, or give more shards",
        {"dataset": {"sequence_length": 2569}},
    )


@pytest.mark.parametrize("budget", [{"max_steps": 11}, {"max_tokens": 10 * 4 * WINDOW + 1}])
def test_runs_longer_than_the_data(run: Runner, budget: dict[str, int]) -> None:
    run.refuses(
        "the run is to have 11 steps, but num_epochs=1 of the dataset are 10; lower max_steps or max_tokens, or "
        "repeat the data with num_epochs=2",
        {"step_scheduler": budget},
    )


def test_router_losses_without_a_router(run: Runner) -> None:
    run.refuses(
        r"config.yaml:\d+: moe: balance_loss=0.1 and z_loss=0.0 are for models with experts, and am-models declares no "
        "router of llama; leave the section out",
        {"moe": {"balance_loss": 0.1}},
        status=2,
    )


@pytest.mark.parametrize(
    ("schedule", "message", "status"),
    [
        ({"style": "cosin"}, r"config.yaml:\d+: lr_scheduler.style: .*'cosin'.*did you mean 'cosine'", 2),
        (
            {"style": "cosine"},
            r"config.yaml:\d+: lr_scheduler: decay_steps=4 is for style='wsd'; style='cosine' has no such phase, leave",
            2,
        ),
        ({"warmup_steps": 11}, "warmup_steps=11 is longer than the run of total_steps=10; lower it", 1),
        (
            {"decay_steps": 9},
            "decay_steps=9 must be between 1 and 8, the steps of total_steps=10 that follow step 2",
            1,
        ),
        ({"min_lr": 0.1}, r"config.yaml:\d+: lr_scheduler: min_lr=0.1 is above the learning rate 0.003; lower it", 2),
    ],
)
def test_schedules_that_cannot_be(run: Runner, schedule: dict[str, Any], message: str, status: int) -> None:
    run.refuses(message, {"lr_scheduler": schedule}, status=status)


def test_another_recipe_by_that_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "llm", "-c", "recipes/configs/tiny.yaml", "--run_dir", str(tmp_path / "run")]) == 2
    assert re.search("recipe.*sft.*pretrain|recipe.*pretrain.*sft", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
