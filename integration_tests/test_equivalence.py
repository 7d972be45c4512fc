"""The same result however it is split: every layout against one process, and the faults that the check must catch.

Two steps of SGD over the same sixteen rows, in fp32, dropout 0. Compared with one process, one micro-batch, padded:
the loss, the gradient norm and every gradient of the first step, and every weight after the second, each within
`max|a - b| <= 1e-5 * max|reference|` per tensor. Each tensor has the learning rate that moves it by 2 % of its
largest weight in the first step, two thousand times that tolerance, so a gradient that is wrong or missing shows.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import am_ckpt
import am_data
import am_loss
import am_mesh
import am_models
import am_peft
from am_testing import run_distributed

TOLERANCE = 1e-5
NUM_ROWS, PACK_TOKENS, RELATIVE_UPDATE = 16, 64, 0.02
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    world_size: int = 1
    strategy: str = "fsdp2"
    dp_replicate: int = 1
    accumulation: int = 1
    packed: bool = False
    recompute: str = "none"
    fault: str = "none"

    def __str__(self) -> str:
        name = "hsdp" if self.dp_replicate > 1 else self.strategy
        return f"{name}{self.world_size}-accumulate{self.accumulation}-{'packed' if self.packed else 'padded'}" + (
            "-recompute" if self.recompute == "full" else ""
        )


class Rows:
    """Sixteen rows of uneven length over a vocabulary of 97; the first third of each row is not under loss."""

    fingerprint = "sixteen rows"

    def __init__(self) -> None:
        generator = np.random.default_rng(5)
        self.lengths = generator.integers(3, 40, NUM_ROWS)
        self.rows = [generator.integers(1, 97, length) for length in self.lengths]

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.rows[index]
        labels = ids.copy()
        labels[: len(ids) // 3] = -100
        return {"input_ids": ids, "labels": labels}


def make_loader(layout: Layout) -> am_data.DataLoader:
    rows = Rows()
    dataset = am_data.PackedDataset(rows, PACK_TOKENS) if layout.packed else rows
    share = layout.world_size * layout.accumulation
    # One global batch holds everything, so padded and packed see the same tokens in a step.
    local = -(-len(dataset) // share)
    return am_data.DataLoader(
        dataset,
        collate=functools.partial(am_data.collate, layout="packed" if layout.packed else "padded"),
        global_batch_size=local * share,
        local_batch_size=local,
        rank=torch.distributed.get_rank(),
        world_size=layout.world_size,
        shuffle=False,
        num_epochs=2,
    )


def train(folder: str, lora: bool, layout: Layout) -> dict[str, Any]:
    """Two steps of the recipe's loop; the loss, gradient norm, gradients and weights as plain tensors."""
    dims = am_mesh.ParallelDims(dp_replicate=layout.dp_replicate).build("cpu")
    with torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    if lora:
        from peft import LoraConfig

        am_peft.apply_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]))
    model = am_mesh.parallelize(
        model, dims, strategy=layout.strategy, recompute=layout.recompute, forward_methods=("forward_with_loss",)
    )
    am_ckpt.load_hf(model, folder, mapping=am_models.weight_map(model), initialise=("*lora_*",))
    model.train()
    if lora:
        # B starts at zero, where A has no gradient; any other value that depends on the name alone will do.
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.fill_(0.01 * (number + 1))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 1.0} for parameter in trainable.values()])
    result: dict[str, Any] = {}

    def forward(number: int, batch: am_data.Batch) -> dict[str, torch.Tensor]:
        inputs, targets = am_models.split_batch(model, inject(layout, batch))
        return {"loss": am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, targets)}

    for step, batches in enumerate(make_loader(layout)):
        targets = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
        divisor = am_mesh.sum_over(dims.row_ranks, targets)
        if layout.fault == "local divisor":
            divisor = targets * layout.world_size
        sums = am_mesh.forward_backward(model, batches, forward, divisor)
        norm = am_mesh.clip_grad_norm_(model, None)
        if step == 0:
            result["loss"] = am_mesh.sum_over(dims.loss_ranks, sums["loss"])
            result["norm"] = norm.detach().clone()
            result["gradients"] = {name: full(parameter.grad) for name, parameter in trainable.items()}
            for group, gradient in zip(optimizer.param_groups, result["gradients"].values(), strict=True):
                largest = full(group["params"][0]).abs().max() / gradient.abs().max()
                group["lr"] = RELATIVE_UPDATE * largest.item()
        optimizer.step()
        optimizer.zero_grad()
    result["weights"] = {name: full(parameter.detach()) for name, parameter in trainable.items()}
    return result


def inject(layout: Layout, batch: am_data.Batch) -> am_data.Batch:
    """The seeded faults: what each would do to a micro-batch."""
    if layout.fault == "unshifted labels":
        return {**batch, "shift_labels": torch.roll(batch["shift_labels"], 1, -1)}
    if layout.fault == "dropped rank" and torch.distributed.get_rank() == layout.world_size - 1:
        return {**batch, "shift_labels": torch.full_like(batch["shift_labels"], -100)}
    if layout.fault == "one document":
        return {**batch, "document_ids": (batch["document_ids"] > 0).to(torch.int32)}
    return batch


def full(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def compare(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """Raise AssertionError naming the first tensor beyond the tolerance."""
    for key in ("loss", "norm"):
        check(key, result[key], reference[key])
    for key in ("gradients", "weights"):
        assert result[key].keys() == reference[key].keys()
        for name, expected in reference[key].items():
            check(f"{key} {name}", result[key][name], expected)


def check(name: str, value: torch.Tensor, reference: torch.Tensor) -> None:
    difference, scale = (value - reference).abs().max().item(), reference.abs().max().item()
    assert difference <= TOLERANCE * scale, (
        f"{name}: differs by {difference:.3g}, {difference / scale:.3g} of its largest"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Seeded models as Hugging Face folders, written by stock transformers."""
    made = {}
    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON, **options), dtype=torch.float32)
        folder: Path = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture(scope="module")
def references(folders: dict[str, str]) -> dict[tuple[str, bool], dict[str, Any]]:
    return {
        (name, lora): run_distributed(train, 1, folder, lora, Layout())[0]
        for name, folder in folders.items()
        for lora in (False, True)
    }


LAYOUTS = [
    *(Layout(accumulation=n) for n in (2, 4)),
    *(Layout(accumulation=n, packed=True) for n in (1, 2, 4)),
    Layout(recompute="full"),
    *(Layout(world_size=w, accumulation=n) for w in (2, 4) for n in (1, 2, 4)),
    *(Layout(world_size=w, accumulation=n, packed=True) for w in (2, 4) for n in (1, 2, 4)),
    *(Layout(world_size=4, dp_replicate=2, accumulation=n, packed=p) for n in (1, 2, 4) for p in (False, True)),
    *(Layout(world_size=w, strategy="ddp", accumulation=n) for w in (2, 4) for n in (1, 2, 4)),
    *(Layout(world_size=w, strategy="ddp", accumulation=n, packed=True) for w in (2, 4) for n in (1, 2, 4)),
    Layout(world_size=2, recompute="full", packed=True, accumulation=2),
    Layout(world_size=2, strategy="ddp", recompute="full"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_agree(layout: Layout, lora: bool, model: str, folders: dict[str, str], references: dict) -> None:
    for result in run_distributed(train, layout.world_size, folders[model], lora, layout):
        compare(result, references[model, lora])


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        ("local divisor", Layout(world_size=2)),
        ("dropped rank", Layout(world_size=2, strategy="ddp")),
        ("unshifted labels", Layout(packed=True)),
        ("one document", Layout(packed=True)),
    ],
)
def test_faults_are_caught(fault: str, layout: Layout, folders: dict[str, str], references: dict) -> None:
    faulty = dataclasses.replace(layout, fault=fault)
    result = run_distributed(train, layout.world_size, folders["llama"], False, faulty)[0]
    with pytest.raises(AssertionError, match="differs by"):
        compare(result, references["llama", False])


def test_a_leaked_document_is_refused(folders: dict[str, str]) -> None:
    model = am_models.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    am_models.require_no_leak(model, packed=True)
    # An attention without a mask function gets no mask, silently: two documents in a row see each other.
    AttentionInterface.register("maskless", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("maskless")
    with pytest.raises(ValueError, match=r"document 2 move by .* when document 1 changes"):
        am_models.require_no_leak(model, packed=True)
