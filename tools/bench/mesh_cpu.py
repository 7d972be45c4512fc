"""One training step on 2 processes of a CPU: our layouts against those of stock torch, on the same model.

    python tools/bench/mesh_cpu.py [--rounds 30] [--axis fsdp2 tp2 cp2]

The model is one seeded Llama of transformers (hidden 256, 4 layers, vocabulary 8,192) with the kernels of am-models and
the loss of am-loss, the optimizer is AdamW; only what is between the ranks differs:

- `fsdp2`: `am_mesh.parallelize`, against `torch.distributed.fsdp.fully_shard` of each layer and of the model;
- `tp2`: the same call, against `parallelize_module` with Colwise- and RowwiseParallel for every linear layer, the
  embedding and the head. `loss_parallel` is that with the logits and torch's own loss of cut logits;
- `cp2`: `context_attention`, against an attention of stock parts. `context_parallel` of torch has none for a CPU, so
  keys and values are gathered with `all_gather_single_autograd`, zig-zag as ours are, and each piece of the queries
  goes to `scaled_dot_product_attention` with the keys that it may see. Both sides shard parameters, each with its
  `fsdp2`.

The sides of an axis train in the same two processes, one step each in turn: load on the machine hits them alike.
Measured: tokens per CPU-second (user and system time of both processes, all threads), and the ratio step by step.

Bytes: what each rank sends in one step by axis, counted at every collective, in a ring: of n ranks an all-reduce sends
`2 (n - 1) / n` of its tensor, an all-gather `n - 1` times its own part, a reduce-scatter `n - 1` times what it gives.
They must equal the formulas of `expected_bytes`, or this fails, as it does where the losses of two sides differ.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import am_loss
import am_mesh
import am_models
from am_testing.traffic import SentBytes

ROOT = Path(__file__).resolve().parents[2]
WORLD, SEED, WARMUP = 2, 7, 2
# Rows and their length in a micro-batch: context parallelism is for long ones.
SHAPES = {"fsdp2": (2, 512), "tp2": (2, 512), "cp2": (1, 2048)}
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
AXES = {"fsdp2": {"dp_shard": 2}, "tp2": {"tp": 2}, "cp2": {"cp": 2}}
SIDES = {"fsdp2": ("ours", "stock"), "tp2": ("ours", "stock", "loss_parallel"), "cp2": ("ours", "stock")}
REQUIRED = 1.0


def seeded_model() -> Any:
    import transformers

    torch.manual_seed(SEED)
    return am_models.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**MODEL))


def stock_fully_shard(model: Any, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "forward_with_loss")


def stock_parallelize(model: Any, mesh: DeviceMesh, logits: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False) if logits else ColwiseParallel()
    plan: dict[str, Any] = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": head}
    for name, style in (("q", ColwiseParallel), ("k", ColwiseParallel), ("v", ColwiseParallel), ("o", RowwiseParallel)):
        plan[f"model.layers.*.self_attn.{name}_proj"] = style()
    for name, style in (("gate", ColwiseParallel), ("up", ColwiseParallel), ("down", RowwiseParallel)):
        plan[f"model.layers.*.mlp.{name}_proj"] = style()
    parallelize_module(model, mesh, plan)


class StockContextAttention:
    """Causal attention of whole rows that are cut in zig-zag order, of stock parts, in the place of am-kernels'."""

    def __init__(self, mesh: DeviceMesh) -> None:
        size, rank = mesh.size(), mesh.get_local_rank()
        piece = SHAPES["cp2"][1] // (2 * size)
        order = [part for of_rank in range(size) for part in (of_rank, 2 * size - 1 - of_rank)]
        self.mesh = mesh
        self.whole = torch.cat([torch.arange(piece) + order.index(part) * piece for part in range(2 * size)])
        self.ends = [(part + 1) * piece for part in (rank, 2 * size - 1 - rank)]
        # None of the queries of a piece sees a later key.
        self.masks = [torch.ones(piece, end, dtype=torch.bool).tril(end - piece) for end in self.ends]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        from torch.distributed._functional_collectives import all_gather_single_autograd

        # The dim that is gathered comes first: gathering along another one is a copy more.
        parts = torch.stack([k, v], 1).movedim(3, 0).contiguous()
        both = all_gather_single_autograd(parts, 0, self.mesh)[self.whole].movedim(0, 3)
        groups = q.shape[1] // k.shape[1]
        keys, values = (both[:, part].repeat_interleave(groups, 1) for part in (0, 1))
        pieces = [
            F.scaled_dot_product_attention(rows, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            for rows, end, mask in zip(q.chunk(2, 2), self.ends, self.masks, strict=True)
        ]
        return torch.cat(pieces, 2).transpose(1, 2)


def build(axis: str, side: str, dims: am_mesh.ParallelDims) -> Any:
    """The model of one side, on this rank."""
    import am_kernels

    model = seeded_model()
    if axis == "cp2":
        mesh = dims.mesh("cp")
        ours = side == "ours"
        attention = am_mesh.context_attention(am_kernels.attention, mesh) if ours else StockContextAttention(mesh)
        am_models.optimize(model, kernels={"attention": attention})
    if side == "ours":
        return am_mesh.parallelize(model, dims, forward_methods=("forward_with_loss",))
    if axis == "tp2":
        stock_parallelize(model, dims.mesh("tp"), side == "loss_parallel")
    else:
        stock_fully_shard(model, dims.mesh("fsdp"))
    return model


def tokens_of(axis: str) -> int:
    """Of one step, over all ranks."""
    return math.prod(SHAPES[axis]) * (WORLD if axis == "fsdp2" else 1)


def batch_of(axis: str, side: str, dims: am_mesh.ParallelDims, step: int) -> dict[str, Any]:
    """What this rank gets: its own rows under fsdp2, the same ones under tp2, its part of them under cp2."""
    own, (rows, length) = dist.get_rank() if axis == "fsdp2" else 0, SHAPES[axis]
    generator = torch.Generator().manual_seed(1000 * step + own)
    tokens = torch.randint(MODEL["vocab_size"], (rows, length), generator=generator)
    positions = torch.arange(length).repeat(rows, 1)
    batch: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, "shift_labels": tokens.roll(-1, 1)}
    if axis != "cp2":
        return batch
    cut = am_mesh.shard_sequence(batch, dims.mesh("cp"))
    return cut if side == "ours" else {name: cut[name] for name in batch}


def sum_of(model: Any, side: str, batch: dict[str, Any], backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """The loss of a batch, after its backward."""
    if side == "loss_parallel":
        from torch.distributed.tensor.parallel import loss_parallel

        with loss_parallel():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")
            backward(loss)
        return loss.full_tensor()
    inputs, targets = am_models.split_batch(model, batch)
    loss = am_models.forward_with_loss(model, am_loss.linear_cross_entropy, inputs, targets)
    backward(loss)
    return loss.detach()


def adamw(model: Any) -> torch.optim.Optimizer:
    """One fused step takes tensors of one mesh."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return torch.optim.AdamW([{"params": params} for params in groups.values()], lr=1e-4, fused=True)


class Side:
    """One way to train, and what it took."""

    def __init__(self, axis: str, name: str, dims: am_mesh.ParallelDims) -> None:
        self.axis, self.name, self.dims = axis, name, dims
        self.model = build(axis, name, dims)
        self.optimizer = adamw(self.model)
        self.num_steps = 0

    def step(self) -> float:
        """The loss of one optimizer step, over all ranks."""
        batch = batch_of(self.axis, self.name, self.dims, self.num_steps)
        # Stock FSDP2 averages gradients over the ranks, where ours sums them.
        factor = (WORLD if self.name == "stock" and self.axis != "tp2" else 1) / tokens_of(self.axis)
        loss = sum_of(self.model, self.name, batch, lambda loss: (loss * factor).backward())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return am_mesh.sum_over(self.dims.loss_ranks, loss.item()) / tokens_of(self.axis)

    def cpu_seconds(self) -> float:
        """Of one step, of both processes together."""
        dist.barrier()
        begin = time.process_time()
        self.step()
        spent = torch.tensor(time.process_time() - begin, dtype=torch.float64)
        dist.all_reduce(spent)
        return spent.item()


def expected_bytes(axis: str) -> dict[str, int]:
    """What our side sends per rank and step, in float32: n ranks, L layers, R rows of S tokens, D hidden, V ids."""
    n, layers, tokens = WORLD, MODEL["num_hidden_layers"], math.prod(SHAPES[axis])
    hidden, ids = MODEL["hidden_size"], MODEL["vocab_size"]
    head = hidden // MODEL["num_attention_heads"]
    heads, kv_heads = MODEL["num_attention_heads"], MODEL["num_key_value_heads"]
    if axis == "tp2":
        # Forward: after the embedding, and after attention and MLP of a layer; backward: before those two; and before
        # the head. The sum of the loss is one number.
        reduced = (4 * layers + 1) * tokens * hidden + tokens * hidden + 1
        # Two numbers per token of the softmax, and a checksum of vocabulary and labels: three int64.
        return {"tp": round(2 * (n - 1) / n * 4 * reduced) + (n - 1) * (2 * 4 * tokens + 24)}
    layer = (
        hidden * head * (heads + 2 * kv_heads) + hidden * hidden + 3 * hidden * MODEL["intermediate_size"] + 2 * hidden
    )
    root = 2 * ids * hidden + hidden
    # Layers are gathered in forward and backward, embedding and head once; gradients are reduced once.
    sent = {"fsdp": (n - 1) * 4 * (3 * layers * layer + 2 * root) // n}
    if axis == "cp2":
        # Keys and values are gathered in the forward, their gradients are reduced in the backward.
        sent["cp"] = 2 * layers * (n - 1) * 4 * tokens * kv_heads * 2 * head // n
    return sent


def by_axis(axis: str, sent: SentBytes) -> dict[str, int]:
    """FSDP2 flattens the parameters of a unit; keys and values have more dims."""
    if axis == "tp2":
        return {"tp": sent.num_bytes}
    parameters = round(sum(one.num_bytes for one in sent.collectives if len(one.shape) == 1))
    return {"fsdp": parameters} | ({"cp": sent.num_bytes - parameters} if axis == "cp2" else {})


def measure(axis: str, rounds: int) -> dict[str, Any]:
    """On every rank: all sides of an axis, in turn."""
    dims = am_mesh.ParallelDims(**AXES[axis]).build("cpu")
    sides = [Side(axis, name, dims) for name in SIDES[axis]]
    losses = {side.name: [side.step() for _ in range(WARMUP)] for side in sides}
    for name, values in losses.items():
        if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(values, losses["ours"], strict=True)):
            raise RuntimeError(f"{axis}: the losses of {name} are {values}, ours {losses['ours']}")
    sent = {}
    for side in sides:
        with SentBytes(WORLD) as counted:
            batch = batch_of(axis, side.name, dims, side.num_steps)
            sum_of(side.model, side.name, batch, lambda loss: (loss / tokens_of(axis)).backward())
        side.optimizer.zero_grad()
        sent[side.name] = by_axis(axis, counted)
    if sent["ours"] != expected_bytes(axis):
        raise RuntimeError(f"{axis}: {sent['ours']} bytes were sent, the formula says {expected_bytes(axis)}")
    speeds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 else reversed(sides):
            speeds[side.name].append(tokens_of(axis) / side.cpu_seconds())
    return {"losses": losses, "bytes sent per rank and step": sent, "tokens_per_cpu_second": speeds}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Medians; the ratios are those of each round."""
    speeds = result["tokens_per_cpu_second"]
    ratios = {
        f"ours / {name}": statistics.median(a / b for a, b in zip(speeds["ours"], values, strict=True))
        for name, values in speeds.items()
        if name != "ours"
    }
    return {
        "tokens_per_cpu_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratios": ratios,
        "is at least 1.0": min(ratios.values()) >= REQUIRED,
        "bytes sent per rank and step": result["bytes sent per rank and step"],
    }


def launch(axis: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Two processes that measure one axis; the first writes what it found."""
    output = folder / f"{axis}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), __file__]
    command += ["--axis", axis, "--rounds", str(rounds), "--worker", str(output)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{axis} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(output.read_text())


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--axis", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "bench" / "results" / "mesh_cpu.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        with am_mesh.process_group():
            result = measure(arguments.axis[0], arguments.rounds)
            if dist.get_rank() == 0:
                arguments.worker.write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {axis: launch(axis, arguments.rounds, Path(folder)) for axis in arguments.axis}
    packages = ["torch", "transformers", "am-mesh", "am-models", "am-kernels", "am-loss"]
    document = {
        "benchmark": "mesh_cpu",
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "ranks": WORLD,
        "threads": 1,
        "model": MODEL,
        "rows and length": SHAPES,
        "summary": {axis: summarise(result) for axis, result in runs.items()},
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["summary"], indent=1))


if __name__ == "__main__":
    main()
