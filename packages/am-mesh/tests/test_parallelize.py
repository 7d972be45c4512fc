"""A model that trains on several ranks is the model that trains on one."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from am_mesh import (
    ParallelDims,
    clip_grad_norm_,
    forward_backward,
    grad_norm,
    gradient_sync,
    parallelize,
    process_group,
    recompute,
    sum_over,
)
from am_testing import run_distributed

VOCABULARY, WIDTH, HEADS, SAMPLES, LENGTH = 37, 16, 2, 8, 6


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        # Seven rows over two or four ranks: shards of different sizes.
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        B, S, _ = hidden.shape
        q, k, v = self.qkv(self.norm(hidden)).view(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, -1)
        hidden = hidden + self.dropout(self.out(attended))
        return hidden + self.dropout(self.down(F.gelu(self.up(hidden))))


class Transformer(nn.Module):
    """Three blocks; `forward` gives logits [B, S, V], `forward_with_loss` the summed cross entropy."""

    def __init__(self, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(input_ids))

    def forward_with_loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(self.hidden(input_ids), self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def build(**options: Any) -> Transformer:
    torch.manual_seed(1)
    return Transformer(**options)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator) for _ in range(2))


def train_step(model: nn.Module, rank: int, world_size: int, accumulation: int = 1) -> float:
    """Loss (this rank's part) and gradients of all samples, divided by the global number of targets."""
    input_ids, labels = (rows.chunk(world_size)[rank].chunk(accumulation) for rows in data())

    def forward(number: int, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": model.forward_with_loss(*batch)}

    return forward_backward(model, list(zip(input_ids, labels)), forward, SAMPLES * LENGTH)["loss"].item()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            whole[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return whole


def worker(axes: dict[str, int], options: dict[str, Any], model_options: dict[str, Any], accumulation: int) -> Any:
    """Loss summed over ranks, whole gradients, their norm, and parameter names of one step."""
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        model = parallelize(build(**model_options), dims, forward_methods=("forward_with_loss",), **options)
        assert isinstance(model, FSDPModule)
        mesh = dims.mesh("dp")
        loss = sum_over(mesh, train_step(model, mesh.get_local_rank(), mesh.size(), accumulation))
        return loss, gradients(model), grad_norm(model).item(), [name for name, _ in model.named_parameters()]


def reference(**model_options: Any) -> tuple[float, dict[str, torch.Tensor], float, list[str]]:
    model = build(**model_options)
    loss = train_step(model, 0, 1)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients(model).values()))
    return loss, gradients(model), norm, [name for name, _ in model.named_parameters()]


def differences(actual: Any, expected: Any) -> dict[str, float]:
    """max|a-b| / max|b| of the loss, the norm and each gradient."""
    loss, grads, norm, _ = actual
    expected_loss, expected_grads, expected_norm, _ = expected
    assert grads.keys() == expected_grads.keys()
    found = {"loss": abs(loss - expected_loss) / abs(expected_loss), "norm": abs(norm - expected_norm) / expected_norm}
    for name, gradient in expected_grads.items():
        found[name] = ((grads[name] - gradient).abs().max() / gradient.abs().max()).item()
    return found


# fp32. A bias of the keys has a true gradient of zero, but it is a slice of qkv.bias, whose largest entry is not.
TOLERANCE = 1e-5

LAYOUTS = [
    pytest.param(2, {}, {"strategy": "fsdp2"}, id="fsdp-2"),
    pytest.param(4, {}, {"strategy": "fsdp2"}, id="fsdp-4"),
    pytest.param(4, {"dp_replicate": 2}, {"strategy": "fsdp2"}, id="hsdp-2x2"),
    pytest.param(2, {}, {"strategy": "ddp"}, id="ddp-2"),
    pytest.param(4, {"dp_replicate": 2}, {"strategy": "ddp"}, id="ddp-4"),
]
TWO_RANKS = [
    pytest.param(2, {}, {"strategy": "fsdp2"}, id="fsdp-2"),
    pytest.param(2, {"dp_replicate": 2}, {"strategy": "fsdp2"}, id="hsdp-2x1"),
    pytest.param(2, {}, {"strategy": "ddp"}, id="ddp-2"),
]


@pytest.mark.parametrize(("world_size", "axes", "options"), LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_layout_gives_the_gradients_of_one_process(world_size, axes, options, accumulation):
    expected = reference()
    for actual in run_distributed(worker, world_size, axes, options, {}, accumulation):
        assert actual[3] == expected[3]
        assert max(differences(actual, expected).values()) <= TOLERANCE


@pytest.mark.parametrize(("world_size", "axes", "options"), TWO_RANKS)
def test_options_change_no_number(world_size, axes, options):
    reshard = {} if options["strategy"] == "ddp" else {"reshard_after_forward": False}
    for extra, model_options in (
        ({"recompute": "full", **reshard}, {"tied": True}),
        ({"blocks": ("layers.0", "layers.2"), **reshard}, {}),
    ):
        expected = reference(**model_options)
        for actual in run_distributed(worker, world_size, axes, options | extra, model_options, 4):
            assert actual[3] == expected[3]
            assert max(differences(actual, expected).values()) <= TOLERANCE


def averaging_worker() -> Any:
    with process_group() as device:
        dims = ParallelDims().build(device.type)
        model = parallelize(build(), dims, forward_methods=("forward_with_loss",))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(2.0)
        mesh = dims.mesh("dp")
        loss = sum_over(mesh, train_step(model, mesh.get_local_rank(), 2))
        return loss, gradients(model), grad_norm(model).item(), []


def test_averaging_instead_of_summing_is_noticed():
    found = differences(run_distributed(averaging_worker, 2)[0], reference())
    assert found.pop("loss") <= TOLERANCE
    assert min(found.values()) > 0.4


# Each rounding errs by up to 2^-9, and ranks round other sums than one process; measured 2^-6; a wrong divisor: 2^-1.
BFLOAT16_TOLERANCE = 2.0**-5


@pytest.mark.parametrize(("world_size", "axes", "options"), LAYOUTS)
def test_bfloat16_computes_the_same_on_one_rank_and_on_many(world_size, axes, options):
    options = options | {"param_dtype": torch.bfloat16}
    (expected,) = run_distributed(worker, 1, {}, options, {}, 1)
    full = reference()
    assert 1e-4 < max(differences(expected, full).values()) < 4 * BFLOAT16_TOLERANCE
    for actual in run_distributed(worker, world_size, axes, options, {}, 1):
        assert {gradient.dtype for gradient in actual[1].values()} == {torch.float32}
        assert max(differences(actual, expected).values()) <= BFLOAT16_TOLERANCE


class Scale(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.weight * inputs).sum()


def reduction_worker(axes: dict[str, int], strategy: str, accumulation: int) -> torch.Tensor:
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        model = parallelize(Scale(torch.float32), dims, strategy=strategy, param_dtype=torch.bfloat16)
        rank = dims.mesh("dp").get_local_rank()
        for index in range(accumulation):
            with gradient_sync(model, index == accumulation - 1):
                model(torch.full((4,), 1.0 if rank == 0 and index == 0 else 2.0**-10)).backward()
        return gradients(model)["weight"]


@pytest.mark.parametrize(("world_size", "axes", "options"), TWO_RANKS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_bfloat16_gradients_are_added_in_float32(world_size, axes, options, accumulation):
    # In bfloat16, 1 + 2^-10 is 1.
    exact = torch.full((4,), 1.0 + (2 * accumulation - 1) * 2.0**-10)
    for gradient in run_distributed(reduction_worker, world_size, axes, options["strategy"], accumulation):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=0)


def communication_worker(axes: dict[str, int], strategy: str) -> list[dict[str, int]]:
    """Collectives of three micro-batches of which the last one synchronises."""
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        model = parallelize(build(), dims, strategy=strategy, forward_methods=("forward_with_loss",))
        input_ids, labels = data()
        counts = []
        for index in range(3):
            # Not CommDebugMode, which in torch 2.11 wants the root itself called; acc_events: without it 2.11 warns.
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace, gradient_sync(model, index == 2):
                model.forward_with_loss(input_ids, labels).backward()
            counts.append({event.key: event.count for event in trace.key_averages() if event.key.startswith("c10d::")})
        return counts


@pytest.mark.parametrize(("world_size", "axes", "options"), LAYOUTS)
def test_only_the_last_micro_batch_reduces_gradients(world_size, axes, options):
    counts = run_distributed(communication_worker, world_size, axes, options["strategy"])[0]
    reductions = [sum(count for name, count in batch.items() if "reduce" in name) for batch in counts]
    # Three blocks and the root; HSDP reduces twice: within a shard group, then across the replicas.
    units = 4 * (2 if axes and options["strategy"] == "fsdp2" else 1)
    assert reductions == [0, 0, units]


class LoraBlock(nn.Module):
    """A frozen bfloat16 layer with a float32 adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).requires_grad_(False)
        self.lora_a = nn.Linear(WIDTH, 3, bias=False)
        self.lora_b = nn.Linear(3, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        delta = self.lora_b(self.lora_a(hidden.to(self.lora_a.weight.dtype)))
        return hidden + self.base(hidden.to(self.base.weight.dtype)).to(delta.dtype) + delta


class LoraTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16).requires_grad_(False)
        self.layers = nn.ModuleList(LoraBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def forward_with_loss(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = F.linear(hidden.to(self.head.weight.dtype), self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def lora_worker(axes: dict[str, int], options: dict[str, Any], wrap: bool) -> Any:
    torch.manual_seed(1)
    model = LoraTransformer()
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        if wrap:
            model = parallelize(model, dims, forward_methods=("forward_with_loss",), **options)
        mesh = dims.mesh("dp")
        loss = sum_over(mesh, train_step(model, mesh.get_local_rank(), mesh.size(), accumulation=2))
        return loss, gradients(model), grad_norm(model).item(), [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(("world_size", "axes", "options"), TWO_RANKS)
@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_float32_adapters_train_on_a_frozen_bfloat16_base(world_size, axes, options, param_dtype):
    options = options | {"param_dtype": param_dtype}
    (expected,) = run_distributed(lora_worker, 1, {}, options, param_dtype is not None)
    for actual in run_distributed(lora_worker, world_size, axes, options, True):
        assert actual[3] == expected[3]
        assert {gradient.dtype for gradient in actual[1].values()} == {torch.float32}
        assert max(differences(actual, expected).values()) <= BFLOAT16_TOLERANCE


class Experts(nn.Module):
    def __init__(self, frozen_embedding: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(not frozen_embedding)
        self.layers = nn.ModuleList(ExpertBlock() for _ in range(2))
        # In the root unit, whose gradients are reduced when the whole backward is over.
        self.heads = nn.ModuleList(nn.Linear(WIDTH, VOCABULARY) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, expert: int) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, expert)
        return self.heads[expert](hidden).logsumexp(-1).sum()


class ExpertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 5 + index), nn.Tanh()) for index in range(4))

    def forward(self, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        return hidden * self.experts[expert](hidden).mean(-1, keepdim=True)


def experts_worker(axes: dict[str, int], options: dict[str, Any], frozen_embedding: bool) -> dict[str, torch.Tensor]:
    """Rank r uses expert r alone; the experts 2 and 3 are used by nobody."""
    torch.manual_seed(1)
    model = Experts(frozen_embedding)
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        mesh = dims.mesh("dp")
        model = parallelize(model, dims, **options)
        if mesh.size() > 1:
            model(data()[0].chunk(2)[mesh.get_local_rank()], mesh.get_local_rank()).backward()
            return gradients(model)
        for index in range(2):
            model(data()[0].chunk(2)[index], index).backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return gradients(model)


@pytest.mark.parametrize(("world_size", "axes", "options"), TWO_RANKS)
@pytest.mark.parametrize("frozen_embedding", [False, True])
@pytest.mark.parametrize("recompute_mode", ["none", "full"])
def test_a_parameter_unused_on_a_rank_counts_as_zero(world_size, axes, options, frozen_embedding, recompute_mode):
    options = options | {"recompute": recompute_mode}
    (expected,) = run_distributed(experts_worker, 1, {}, {}, frozen_embedding)
    for actual in run_distributed(experts_worker, world_size, axes, options, frozen_embedding, timeout=30):
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def meta_worker(axes: dict[str, int], options: dict[str, Any]) -> Any:
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        with torch.device("meta"):
            model = Transformer(tied=True)
        model = parallelize(model, dims, forward_methods=("forward_with_loss",), recompute="full", **options)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        model.to_empty(device=device)
        weights = build(tied=True).state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(distribute_tensor(weights[name], parameter.device_mesh, parameter.placements))
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        mesh = dims.mesh("dp")
        loss = sum_over(mesh, train_step(model, mesh.get_local_rank(), mesh.size()))
        return (
            loss,
            gradients(model),
            grad_norm(model).item(),
            [name for name, _ in model.named_parameters()],
        ), held / total


@pytest.mark.parametrize(("world_size", "axes", "options"), TWO_RANKS)
def test_a_model_on_the_meta_device_is_laid_out_before_it_has_weights(world_size, axes, options):
    expected = reference(tied=True)
    for actual, share in run_distributed(meta_worker, world_size, axes, options):
        assert actual[3] == expected[3]
        assert max(differences(actual, expected).values()) <= TOLERANCE
        # Uneven shards: the seven rows of `up` make the larger half slightly more than a half.
        assert share == pytest.approx(0.5, abs=0.02) if options["strategy"] == "fsdp2" and not axes else share == 1.0


def optimizer_worker(options: dict[str, Any]) -> list[torch.Tensor]:
    """Evaluate, train on the same data on every rank, evaluate through another method."""
    with process_group() as device:
        dims = ParallelDims().build(device.type)
        model = parallelize(build(), dims, forward_methods=("forward_with_loss",), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        trained = {id(parameter) for parameter in model.parameters()}
        with torch.no_grad():
            logits = model(data()[0])
        assert {id(parameter) for parameter in model.parameters()} == trained
        F.cross_entropy(model(data()[0]).flatten(0, 1), data()[1].flatten()).backward()
        optimizer.step()
        with torch.no_grad():
            loss = model.forward_with_loss(*data())
        assert {id(parameter) for parameter in model.parameters()} == trained
        return [logits, loss]


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_evaluation_leaves_the_parameters_of_the_optimizer_in_place(strategy):
    model = build()
    logits = model(data()[0])
    F.cross_entropy(logits.flatten(0, 1), data()[1].flatten()).backward()
    # Two ranks with the same data: the sum is twice the gradient, the learning rate half.
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    expected = [logits.detach(), model.forward_with_loss(*data()).detach()]
    for actual in run_distributed(optimizer_worker, 2, {"strategy": strategy}):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def one_rank() -> ParallelDims:
    return ParallelDims().build("cpu")


def test_one_rank_is_returned_unwrapped_unless_the_computation_has_its_own_dtype():
    with process_group():
        model = build()
        assert parallelize(model, one_rank()) is model
        assert parallelize(model, one_rank(), strategy="ddp", param_dtype=torch.float32) is model
        assert not isinstance(model, FSDPModule)
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        with gradient_sync(model, False):
            model.forward_with_loss(*data()).backward()
        assert gradients(model).keys() == dict(model.named_parameters()).keys()
        wrapped = parallelize(build(), one_rank(), param_dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in wrapped.parameters()} == {torch.float32}
        assert wrapped(data()[0]).dtype == torch.bfloat16


def count_block_runs(model: Transformer) -> list[str]:
    runs: list[str] = []
    for index, layer in enumerate(model.layers):
        layer.up.register_forward_hook(lambda module, args, output, index=index: runs.append(f"layers.{index}"))
    model.embed.register_forward_hook(lambda module, args, output: runs.append("embed"))
    return runs


def test_recomputation_repeats_the_dropout_and_runs_every_block_twice():
    stored, recomputed = build(dropout=0.5), build(dropout=0.5)
    names = list(stored.state_dict())
    assert recompute(recomputed) is recomputed
    assert list(recomputed.state_dict()) == names
    results = []
    for model in (stored, recomputed):
        torch.manual_seed(3)
        runs = count_block_runs(model)
        model.forward_with_loss(*data()).backward()
        results.append((runs, gradients(model), torch.rand(3)))
    forward = ["embed", "layers.0", "layers.1", "layers.2"]
    assert results[0][0] == forward
    assert results[1][0] == forward + ["layers.2", "layers.1", "layers.0"]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=0, atol=0)


def recompute_worker(strategy: str) -> Any:
    results = []
    with process_group() as device:
        dims = ParallelDims().build(device.type)
        for mode in ("none", "full"):
            model = build(dropout=0.5)
            model = parallelize(model, dims, strategy=strategy, recompute=mode, forward_methods=("forward_with_loss",))
            torch.manual_seed(3)
            runs = count_block_runs(model)
            model.forward_with_loss(*data()).backward()
            results.append((gradients(model), len(runs)))
    return results


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_recomputation_repeats_the_dropout_on_several_ranks(strategy):
    for (stored, runs), (recomputed, more_runs) in run_distributed(recompute_worker, 2, strategy):
        torch.testing.assert_close(stored, recomputed, rtol=0, atol=0)
        assert (runs, more_runs) == (4, 7)


def test_recompute_modes_and_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"Linear has no list of repeated layers to recompute; name them with blocks="):
        recompute(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'model\.layers\.\*' matches no module; .* lists are \['layers'\]"):
        recompute(build(), blocks=("model.layers.*",))
    with pytest.raises(ValueError, match=r"block 'layers\.0\.up' is inside block 'layers\.0'; choose one"):
        recompute(build(), blocks=("layers.0", "layers.0.up"))
    with pytest.raises(TypeError, match=r"blocks='layers\.\*' is one string; give a sequence"):
        recompute(build(), blocks="layers.*")
    shared = build()
    shared.layers[2].up = shared.layers[0].up
    with pytest.raises(ValueError, match=r"'layers\.2\.up\.weight' is the same as 'layers\.0\.up\.weight'"):
        recompute(shared)


def test_requests_that_cannot_be_honoured_are_refused():
    with process_group():
        dims = one_rank()
        for options, message in [
            ({"strategy": "fsdp"}, "strategy='fsdp' is unknown; choose from 'fsdp2', 'ddp', 'megatron_fsdp'"),
            ({"strategy": "megatron_fsdp"}, "strategy='megatron_fsdp' needs a GPU, and none has proven it yet"),
            ({"recompute": "some"}, "recompute='some' is unknown; choose from 'none', 'selective', 'full'"),
            ({"output_dtype": torch.int8}, "output_dtype=torch.int8 is not a floating-point dtype"),
            ({"prefetch": 0}, "prefetch=0 is not a number of blocks; choose at least 1, or None"),
            ({"reshard_after_forward": 3}, "3 is not a smaller group of the 1 ranks that shard; choose True for all"),
            ({"strategy": "ddp", "cpu_offload": True}, "cpu_offload=True needs strategy='fsdp2': ddp shards nothing"),
            ({"param_dtype": torch.int8}, "param_dtype=torch.int8 is not a floating-point dtype"),
            ({"strategy": "ddp", "reshard_after_forward": True}, "needs strategy='fsdp2': ddp shards nothing"),
            ({"forward_methods": ("loss",)}, "forward_methods=['loss'] are not methods of Transformer"),
        ]:
            with pytest.raises(ValueError, match=re.escape(message)):
                parallelize(build(), dims, **options)
        mixed = build()
        mixed.layers[1].norm.bfloat16()
        with pytest.raises(ValueError, match=r"trainable parameters of layers\.1 are stored in two dtypes"):
            parallelize(mixed, dims, param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dp_shard=-1 has no size before the world is known"):
        parallelize(build(), ParallelDims())
    for axis in ("pp", "ep"):
        with pytest.raises(ValueError, match=rf"{axis}=2 is not supported by parallelize yet.*use {axis}=1"):
            parallelize(build(), ParallelDims(dp_shard=2, **{axis: 2}))


def clip_worker(axes: dict[str, int], options: dict[str, Any]) -> list[float]:
    with process_group() as device:
        dims = ParallelDims(**axes).build(device.type)
        model = parallelize(build(), dims, forward_methods=("forward_with_loss",), **options)
        # A parameter that no layout touches, next to sharded ones.
        extra = nn.Parameter(torch.zeros(3))
        extra.grad = torch.tensor([0.5, -2.0, 0.25])
        mesh = dims.mesh("dp")
        train_step(model, mesh.get_local_rank(), mesh.size())
        parameters = [*model.parameters(), extra]
        norms = [grad_norm(parameters, norm_type).item() for norm_type in (1.0, 2.0, 3.5, math.inf)]
        before = clip_grad_norm_(parameters, None)
        clip_grad_norm_(parameters, 100.0)
        unclipped = grad_norm(parameters)
        clip_grad_norm_(parameters, 0.5)
        return [*norms, before.item(), unclipped.item(), grad_norm(parameters).item()]


@pytest.mark.parametrize(("world_size", "axes", "options"), LAYOUTS)
def test_norm_and_clipping_over_sharded_and_plain_gradients(world_size, axes, options):
    model = build()
    train_step(model, 0, 1)
    vector = torch.cat(
        [gradient.flatten() for gradient in gradients(model).values()] + [torch.tensor([0.5, -2.0, 0.25])]
    )
    norms = [torch.linalg.vector_norm(vector.double(), norm_type).item() for norm_type in (1.0, 2.0, 3.5, math.inf)]
    for actual in run_distributed(clip_worker, world_size, axes, options):
        assert actual == pytest.approx([*norms, norms[1], norms[1], 0.5], rel=1e-5)


def partial_worker() -> list[float]:
    mesh = ParallelDims(dp_replicate=2).build("cpu").mesh("dp_replicate", "fsdp")
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate(), Shard(0)]))
    # Each of the two replica groups holds a part of the sum 1 + 2; the sharded rows are 2 on every rank.
    part = torch.full((2, 3), 1.0 + mesh.get_local_rank(0))
    parameter.grad = DTensor.from_local(part, mesh, [Partial(), Shard(0)])
    silent = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0), Shard(1)]))
    norms = [grad_norm([parameter, silent], norm_type).item() for norm_type in (2.0, math.inf)]
    poisoned = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0), Shard(1)])
    poisoned.to_local()[:, :1] = math.nan if mesh.get_local_rank(0) == 0 else 1.0
    silent.grad = poisoned
    return norms + [grad_norm(silent, norm_type).isfinite().item() for norm_type in (2.0, math.inf)]


def test_the_norm_adds_partial_sums_first_and_shows_a_nan_of_one_rank_to_all():
    for norms in run_distributed(partial_worker, 4):
        assert norms == [pytest.approx(3.0 * math.sqrt(12.0), rel=1e-6), 3.0, False, False]
