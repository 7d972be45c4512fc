"""One training step of the recipes' loop in any layout, and how its result is held against one process.

Sixteen rows of uneven length, in fp32, dropout 0, two steps of SGD. Compared with one process, one micro-batch, padded
rows, nothing recomputed: the loss, the gradient norm and every gradient of the first step, and every weight after the
second, each within `max|a - b| <= 1e-5 * max|reference|` per tensor. Each tensor has the learning rate that moves it by
2 % of its largest weight in the first step, two thousand times that tolerance, so a gradient that is wrong or missing
shows. Errors of rounding have no direction: the mean over all gradients of how much longer each is than its reference,
along it, must be within `DRIFT`, which a small error on one side of all of them is not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import AutoConfig, PreTrainedModel

import am_ckpt
import am_data
import am_kernels
import am_loss
import am_mesh
import am_models
import am_moe
import am_peft

TOLERANCE = 1e-5
DRIFT = TOLERANCE / 10
NUM_ROWS, PACK_TOKENS, RELATIVE_UPDATE = 16, 64, 0.02
# Both with norms of queries and keys, which every rank of tensor parallelism has whole and uses for its own heads.
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3"},
    "moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, which one process trains too."""

    family: str = "dense"
    tied: bool = True
    lora: bool = False
    kd: bool = False

    def __str__(self) -> str:
        return "-".join(
            (
                self.family,
                "tied" if self.tied else "untied",
                "lora" if self.lora else "full",
                "kd" if self.kd else "sft",
            )
        )

    def features(self) -> set[str]:
        """By the names of the table of compatibility."""
        how = "kd" if self.kd else "sft"
        return {self.family, "tied" if self.tied else "untied", "lora" if self.lora else "full", how}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How it is split, which must not change anything."""

    world_size: int = 1
    strategy: str = "fsdp2"
    dp_replicate: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    zigzag: bool = True
    accumulation: int = 1
    packed: bool = False
    recompute: str = "none"
    cpu_offload: bool = False
    fault: str = "none"

    def __str__(self) -> str:
        data = "hsdp" if self.dp_replicate > 1 else self.strategy.removesuffix("2")
        names = [f"{data}{self.world_size // (self.tp * self.cp)}"]
        names += [f"tp{self.tp}" + ("sp" if self.sequence_parallel else "")] * (self.tp > 1)
        names += [f"cp{self.cp}" + ("" if self.zigzag else "contiguous")] * (self.cp > 1)
        names += [f"accumulate{self.accumulation}", "packed" if self.packed else "padded"]
        names += [f"recompute_{self.recompute}"] * (self.recompute != "none")
        return "-".join([*names, *["cpu_offload"] * self.cpu_offload])

    def features(self) -> set[str]:
        """By the names of the table of compatibility."""
        data = "hsdp" if self.dp_replicate > 1 else self.strategy
        asked = {"tp": self.tp > 1, "sp": self.sequence_parallel, "cp": self.cp > 1, "cpu_offload": self.cpu_offload}
        asked |= {"accumulation": self.accumulation > 1, f"recompute_{self.recompute}": self.recompute != "none"}
        return {data, "packed" if self.packed else "padded", *(name for name, is_on in asked.items() if is_on)}

    def dims(self) -> am_mesh.ParallelDims:
        return am_mesh.ParallelDims(dp_replicate=self.dp_replicate, tp=self.tp, cp=self.cp)


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


def make_loader(layout: Layout, dims: am_mesh.ParallelDims) -> am_data.DataLoader:
    rows = Rows()
    dataset = am_data.PackedDataset(rows, PACK_TOKENS) if layout.packed else rows
    share = dims.row_ranks.size() * layout.accumulation
    # One global batch holds everything, so padded and packed see the same tokens in a step.
    local = -(-len(dataset) // share)
    collate = functools.partial(
        am_data.collate,
        layout="packed" if layout.packed else "padded",
        pad_to_multiple_of=dims.row_multiple(zigzag=layout.zigzag),
    )
    return am_data.DataLoader(
        dataset,
        collate=collate,
        global_batch_size=local * share,
        local_batch_size=local,
        mesh=dims.row_ranks,
        shuffle=False,
        num_epochs=2,
    )


def build(folder: str, layout: Layout, dims: am_mesh.ParallelDims, lora: bool) -> PreTrainedModel:
    """The model of `folder` in `layout`, with weights."""
    hf_config = AutoConfig.from_pretrained(folder)
    lost = layout.fault == "tie lost"
    if lost:
        hf_config.tie_word_embeddings = False
    with torch.device("meta"):
        model = am_models.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    if lora:
        from peft import LoraConfig

        # B random too: where it starts at zero, A has no gradient.
        targets = ["q_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        am_peft.apply_lora(model, config)
    if layout.cp > 1 and layout.fault != "no attention over ranks":
        attention = am_mesh.context_attention(
            am_kernels.attention, dims.sequence_ranks, plan=am_kernels.document_segments
        )
        am_models.optimize(model, kernels={"attention": attention})
    am_mesh.parallelize(
        model,
        dims,
        strategy=layout.strategy,
        tp_plan=faulty_plan(model, layout.fault),
        sequence_parallel=layout.sequence_parallel,
        layer_placements=am_peft.tensor_placements,
        must_divide=am_models.parallel_facts(model).must_divide,
        recompute=layout.recompute,
        cpu_offload=layout.cpu_offload,
        forward_methods=("forward_with_loss",),
    )
    am_ckpt.load_hf(
        model,
        folder,
        mapping=am_models.weight_map(model),
        initialise=("*lora_*", *["lm_head.weight"] * lost),
        initialiser=am_models.initial_value if lost else None,
    )
    if lost:
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    model.train()
    return model


def train(folders: Mapping[str, str], case: Case, layout: Layout) -> dict[str, Any]:
    """Two steps of the recipe's loop; the loss, gradient norm, gradients and weights as plain tensors."""
    dims = layout.dims().build("cpu")
    model = build(folders["student"], layout, dims, case.lora)
    teacher = build(folders["teacher"], layout, dims, False).requires_grad_(False).eval() if case.kd else None
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 1.0} for parameter in trainable.values()])
    router_loss = functools.partial(balance, dims) if case.family == "moe" else None
    result: dict[str, Any] = {}

    def forward(number: int, batch: am_data.Batch) -> dict[str, torch.Tensor]:
        cut = am_mesh.shard_sequence(batch, dims.sequence_ranks, zigzag=layout.zigzag)
        inputs, targets = am_models.split_batch(model, inject(layout, cut))
        if teacher is not None:
            return {"loss": distil(model, teacher, inputs, targets, router_loss)}
        loss_fn = am_loss.linear_cross_entropy
        return {"loss": am_models.forward_with_loss(model, loss_fn, inputs, targets, router_loss=router_loss)}

    for step, batches in enumerate(make_loader(layout, dims)):
        targets = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
        divisor = am_mesh.sum_over(dims.row_ranks, targets)
        if layout.fault == "local divisor":
            divisor = targets * layout.world_size
        sums = am_mesh.forward_backward(model, batches, forward, divisor)
        if layout.fault == "drift":
            for parameter in trainable.values():
                parameter.grad.mul_(1 + 0.4 * TOLERANCE)
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


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Mapping[str, Any],
    targets: Mapping[str, torch.Tensor],
    router_loss: am_models.RouterLoss | None,
) -> torch.Tensor:
    """As recipe kd has it: the student runs inside the teacher's forward, where both heads are at hand."""

    def run_student(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **head: Any) -> torch.Tensor:
        asked = functools.partial(am_loss.linear_distillation, teacher_hidden=hidden, teacher_weight=weight)

        def loss_fn(*student_head: torch.Tensor, **options: Any) -> torch.Tensor:
            return asked(*student_head, **options).loss

        with torch.enable_grad():
            return am_models.forward_with_loss(student, loss_fn, inputs, targets, router_loss=router_loss)

    with torch.no_grad():
        return am_models.forward_with_loss(teacher, run_student, inputs, targets)


def balance(
    dims: am_mesh.ParallelDims, router_logits: tuple[torch.Tensor, ...], document_ids: torch.Tensor | None
) -> torch.Tensor:
    return am_moe.balance_loss(
        router_logits,
        document_ids,
        num_experts_per_token=2,
        coefficient=0.1,
        z_loss=0.01,
        sum_counts=functools.partial(am_mesh.sum_over, dims.sequence_ranks),
    )


def inject(layout: Layout, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The seeded faults of a micro-batch."""
    batch = dict(batch)
    if layout.fault == "unshifted labels":
        batch["shift_labels"] = torch.roll(batch["shift_labels"], 1, -1)
    if layout.fault == "dropped rank" and torch.distributed.get_rank() == layout.world_size - 1:
        batch["shift_labels"] = torch.full_like(batch["shift_labels"], -100)
    if layout.fault == "one document":
        batch["document_ids"] = (batch["document_ids"] > 0).to(torch.int32)
    if layout.fault == "no attention over ranks":
        batch["document_ids"] = batch["document_ids"].local_ids
    if layout.fault == "positions of the piece":
        batch["position_ids"] = torch.arange(batch["position_ids"].shape[1]).expand_as(batch["position_ids"])
    return batch


def faulty_plan(model: PreTrainedModel, fault: str) -> dict[str, str | ParallelStyle] | None:
    """The model's own plan (None), or that with the style of one norm wrong."""
    styles: dict[str, str | ParallelStyle] = {
        "norm left out": "replicate",
        "gradient not reduced": Unreduced(),
    }
    if fault not in styles:
        return None
    return {
        pattern: styles[fault] if pattern.endswith("q_norm") else style
        for pattern, style in model.tp_plan.items()
        if "experts" not in pattern
    }


class Unreduced(ParallelStyle):
    """A norm that every rank has whole, whose gradient nobody sums over them."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        weight = distribute_tensor(module.weight.detach(), device_mesh, [Replicate()], src_data_rank=None)
        module.weight = nn.Parameter(weight)
        kept = []

        def before(module: nn.Module, args: Any) -> None:
            kept.append(module.weight)
            module._parameters["weight"] = module.weight.to_local()

        def after(module: nn.Module, args: Any, output: Any) -> None:
            module._parameters["weight"] = kept.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return module


def full(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def compare(result: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Raise AssertionError naming the first tensor beyond the tolerance, or the drift of all of them."""
    for key in ("loss", "norm"):
        check(key, result[key], reference[key])
    for key in ("gradients", "weights"):
        assert result[key].keys() == reference[key].keys(), f"{key}: {result[key].keys() ^ reference[key].keys()}"
        for name, expected in reference[key].items():
            check(f"{key} {name}", result[key][name], expected)
    found = drift(result["gradients"], reference["gradients"])
    assert abs(found) <= DRIFT, f"gradients drift: they are longer by {found:.3g} on average"


def check(name: str, value: torch.Tensor, reference: torch.Tensor) -> None:
    difference, scale = (value - reference).abs().max().item(), reference.abs().max().item()
    assert difference <= TOLERANCE * scale, (
        f"{name}: differs by {difference:.3g}, {difference / scale:.3g} of its largest"
    )


def drift(gradients: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """The mean over tensors of `<a - b, b> / <b, b>`: the signed part of the differences, relative to the reference."""
    along = [
        ((gradients[name] - expected).double().flatten() @ expected.double().flatten()).item()
        / expected.double().square().sum().item()
        for name, expected in reference.items()
    ]
    return sum(along) / len(along)
