"""Tensor and sequence parallelism: a plan of patterns and styles, checked and applied to a model.

Between the blocks every rank of the mesh holds the same hidden states; within attention and MLP each computes some of
the heads and columns (Shoeybi et al. 2019, arXiv:1909.08053). With sequence parallelism what stands between those
(norms, residuals) holds a slice of the sequence on each rank (Korthikanti et al. 2022, arXiv:2205.05198). Embedding and
output head are split over the vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from am_mesh import _tensor_ops as ops
from am_mesh._blocks import find_blocks, name_matches
from am_mesh._tensor_styles import (
    Colwise,
    Embedding,
    Experts,
    LayerPlacements,
    Layout,
    Owner,
    Replicated,
    Rowwise,
    Style,
    bare,
)

# By the names of transformers' plans, those of 5.17 among them.
STYLES = (
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "packed_colwise",
    "packed_rowwise",
    "embedding_rowwise",
    "replicated_with_grad_allreduce",
    "moe_tp_experts",
    "local_params",
    "replicate",
)
_OF_PARAMETERS = ("colwise", "rowwise", "packed_colwise", "packed_rowwise")


@runtime_checkable
class HasPlan(Protocol):
    """A model of transformers: it says how it is split."""

    @property
    def tp_plan(self) -> Mapping[str, str]: ...


@runtime_checkable
class HasEmbeddings(Protocol):
    """A model of transformers: it knows its embedding and its head, None where it has none."""

    def get_input_embeddings(self) -> nn.Module | None: ...

    def get_output_embeddings(self) -> nn.Module | None: ...


@dataclass(frozen=True)
class TensorReport:
    """What `tensor_parallel` did: by pattern the style and the number of modules or parameters; what matched none."""

    applied: Mapping[str, tuple[str, int]]
    unmatched: tuple[str, ...]


def tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    plan: Mapping[str, str | ParallelStyle] | None = None,
    sequence_parallel: bool = False,
    layer_placements: LayerPlacements | None = None,
    must_divide: Mapping[str, int] | None = None,
    blocks: Sequence[str] | None = None,
) -> TensorReport:
    """Split `model` over the 1-D `mesh`, in place. Before `fully_shard`, which reduces the gradients it leaves partial.

    Every rank of the mesh calls it, with equal weights or on the meta device, and runs the model on equal inputs.
    Parameters that are split become DTensors on `mesh`, `Shard` (fused pairs `_StridedShard`); so do those that ranks
    hold whole and use in parts (`Replicate`). All others stay plain. Names, `requires_grad` and tied weights stay.
    What a model hands out is whole on every rank, and so is what it takes; any sequence length works.

    Args:
        plan: pattern of module or parameter names (`*` stays between two dots) to the name of a style as transformers
            has them (`STYLES`), or a `ParallelStyle` of your own. None: the model's own plan. The embedding and the
            output head are split over the vocabulary also where a plan does not name them.
        sequence_parallel: within the blocks, hold a slice of the sequence between attention and MLP.
        layer_placements: called with a module and "colwise" or "rowwise" for what is more than a linear layer, such as
            `am_peft.tensor_placements`: the placements of all its parameters, None for those it does not know.
        must_divide: sizes by name that the ranks must divide, such as `{"num_key_value_heads": 8}`.
        blocks: as in `parallelize`; what sequence parallelism lies within.

    Raises:
        ValueError: no plan, an unknown style, a pattern of `plan` that matches nothing, parameters of a split block
            that are left out, sizes that the ranks do not divide.
    """
    _check_divides(mesh.size(), must_divide or {})
    layout = Layout(mesh, sequence_parallel=sequence_parallel, layer_placements=layer_placements)
    named, applied, unmatched = _expanded(model, plan)
    _add_vocabulary(model, named)
    _check_left_out(model, named)
    found = _split_blocks(model, blocks, named) if sequence_parallel else {}
    if sequence_parallel and not found:
        raise ValueError(
            f"{type(model).__name__} has no list of repeated layers to cut sequences in; name them: blocks="
        )
    regions = _regions(model, found, named)
    styles = _styles(model, named, regions)
    _check_even(model, styles, layout)
    for name, style in styles.items():
        module = model.get_submodule(name)
        if isinstance(style, Style):
            style.apply(module, layout)
        else:
            parallelize_module(module, mesh, style)
    if sequence_parallel:
        _cut_sequences(found, regions, styles, layout)
    return TensorReport(applied, unmatched)


def _split_blocks(
    model: nn.Module, blocks: Sequence[str] | None, named: Mapping[str, str | ParallelStyle]
) -> dict[str, nn.Module]:
    """The blocks of every list that the plan has to do with: not those of a vision tower that it leaves whole."""
    found = find_blocks(model, blocks)
    lists = {_parent(block) for block in found if any(name.startswith(f"{block}.") for name in named)}
    return {name: block for name, block in found.items() if _parent(name) in lists}


def _check_divides(ranks: int, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size % ranks:
            legal = [str(number) for number in range(1, size + 1) if size % number == 0]
            raise ValueError(f"tp={ranks} does not divide {name}={size}; choose {' or '.join(legal)}")


def _expanded(
    model: nn.Module, plan: Mapping[str, str | ParallelStyle] | None
) -> tuple[dict[str, str | ParallelStyle], dict[str, tuple[str, int]], tuple[str, ...]]:
    """Style by full name of module or parameter, in the order of the model; patterns that matched, and that did not."""
    given = plan
    if given is None:
        if not isinstance(model, HasPlan) or not model.tp_plan:
            raise ValueError(
                f"{type(model).__name__} has no plan for tensor parallelism of its own; give one, from patterns to "
                'styles, such as {"layers.*.self_attn.q_proj": "colwise"}'
            )
        given = model.tp_plan
    for pattern, style in given.items():
        if not isinstance(style, ParallelStyle) and style not in STYLES:
            close = difflib.get_close_matches(str(style), STYLES, n=2)
            nearest = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"{pattern}: unknown style {style!r}; {nearest}choose from {', '.join(STYLES)}")
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    named: dict[str, str | ParallelStyle] = {}
    applied, unmatched = {}, []
    for pattern, style in given.items():
        found = [name for name in names if name_matches(name, pattern)]
        named |= dict.fromkeys(found, style)
        if found:
            applied[pattern] = (style if isinstance(style, str) else type(style).__name__, len(found))
        else:
            unmatched.append(pattern)
    if plan is not None and unmatched:
        close = difflib.get_close_matches(unmatched[0], [_pattern(name) for name in names], n=3, cutoff=0.5)
        nearest = f"; the nearest are {', '.join(dict.fromkeys(close))}" if close else ""
        raise ValueError(
            f"{unmatched[0]} of the plan matches no module or parameter of {type(model).__name__}{nearest}"
        )
    return {name: named[name] for name in names if name in named}, applied, tuple(unmatched)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _add_vocabulary(model: nn.Module, named: dict[str, str | ParallelStyle]) -> None:
    if not isinstance(model, HasEmbeddings):
        return
    of = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding):
        named[of[embedding]] = "embedding_rowwise"
    if head is not None:
        named[of[head]] = "colwise_gather_output"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _opens(style: str | ParallelStyle) -> bool:
    """Whether what leaves is a slice, so that what follows computes in parts. Of a caller's style nobody knows."""
    return style == "colwise"


def _check_left_out(model: nn.Module, named: Mapping[str, str | ParallelStyle]) -> None:
    """Between a module that splits and the one that sums up, every parameter needs a style."""
    modules = dict(model.named_modules())
    sharded = {_parent(name) for name, style in named.items() if _opens(style) and name in modules}
    for name, _ in model.named_parameters(remove_duplicate=False):
        owners = [".".join(name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1)]
        inside = [owner for owner in owners if owner in sharded]
        if inside and not any(owner in named for owner in owners if len(owner) > len(inside[-1])):
            module = _parent(name)
            missing = _pattern(name if module == inside[-1] else module)
            raise ValueError(
                f"parameter {name!r} is in {inside[-1]!r}, which the plan splits, and has no style of its own: its "
                f'gradient would be a part of the right one. Add "{missing}": "replicated_with_grad_allreduce" to the '
                "plan if it is the same for every head, or the style that splits it"
            )


def _regions(
    model: nn.Module, blocks: Mapping[str, nn.Module], named: Mapping[str, str | ParallelStyle]
) -> dict[str, bool]:
    """The children of blocks that see whole sequences, and whether what leaves them is summed and cut at once."""
    regions: dict[str, list[str]] = {}
    for name in named:
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is not None and named[name] not in ("replicated_with_grad_allreduce", "replicate"):
            child = name[len(block) + 1 :].partition(".")[0]
            regions.setdefault(f"{block}.{child}", []).append(name)
    sums = ("rowwise", "moe_tp_experts", "rowwise_split_input", "rowwise_rep")
    return {
        region: [name for name in names if named[name] in sums]
        == [name for name in names if named[name] == "rowwise" and _parent(name) == region][:1]
        for region, names in regions.items()
    }


def _styles(
    model: nn.Module, named: Mapping[str, str | ParallelStyle], regions: Mapping[str, bool]
) -> dict[str, ParallelStyle]:
    """What is applied to which module."""
    modules = dict(model.named_modules())
    styles: dict[str, ParallelStyle] = {}
    for name, style in named.items():
        if name not in modules:
            if _parent(name) not in named or named[_parent(name)] not in ("moe_tp_experts", "local_params"):
                raise ValueError(
                    f"{name} is a parameter, and its module has no style that takes it; give {_pattern(_parent(name))} "
                    "local_params, or moe_tp_experts where it holds experts"
                )
            continue
        if isinstance(style, ParallelStyle):
            styles[name] = style
        elif style in ("moe_tp_experts", "local_params"):
            split = _bare_parameters(modules[name], name, named)
            styles[name] = Experts(split) if style == "moe_tp_experts" else Owner(split)
        elif style == "rowwise":
            styles[name] = Rowwise(scatter=regions.get(_parent(name), False))
        elif style != "replicate":
            styles[name] = _MAKE[style]()
    return styles


_MAKE = {
    "colwise": Colwise,
    "colwise_gather_output": lambda: Colwise(gather_output=True),
    "colwise_rep": lambda: Colwise(gather_output=True),
    "rowwise_split_input": lambda: Rowwise(split_input=True),
    "rowwise_rep": lambda: Rowwise(split_input=True),
    "embedding_rowwise": Embedding,
    "replicated_with_grad_allreduce": Replicated,
}


def _bare_parameters(module: nn.Module, name: str, named: Mapping[str, str | ParallelStyle]) -> dict[str, Placement]:
    split: dict[str, Placement] = {}
    for key, parameter in module.named_parameters(recurse=False):
        style = named.get(f"{name}.{key}")
        if style not in _OF_PARAMETERS:
            raise ValueError(
                f"{name}.{key} has the style {style!r}, and its module computes in parts; choose from "
                f"{', '.join(_OF_PARAMETERS)}"
            )
        split[key] = bare(parameter, style)
    return split


def _check_even(model: nn.Module, styles: Mapping[str, ParallelStyle], layout: Layout) -> None:
    """Slices of heads and columns are equal; of a vocabulary they need not be."""
    ranks = layout.mesh.size()
    for name, style in styles.items():
        vocabulary = isinstance(style, Embedding) or (isinstance(style, Colwise) and style.gather_output)
        if vocabulary or not isinstance(style, Style):
            continue
        module = model.get_submodule(name)
        for key, placement in style.placements(module, layout).items():
            parameter = dict(module.named_parameters()).get(key)
            if parameter is None or not isinstance(placement, Shard):
                continue
            size = parameter.shape[placement.dim]
            if size % ranks:
                raise ValueError(
                    f"tp={ranks} does not divide {size}, dim {placement.dim} of {name}.{key}; choose a divisor of it"
                )


def _cut_sequences(
    blocks: Mapping[str, nn.Module], regions: Mapping[str, bool], styles: Mapping[str, ParallelStyle], layout: Layout
) -> None:
    """Cut what enters the first block, put together what leaves the last, and where a region sees whole sequences."""
    for block_name, block in blocks.items():
        for name, module in block.named_modules():
            full = f"{block_name}.{name}" if name else block_name
            if any(full == region or full.startswith(f"{region}.") for region in regions) or full in styles:
                continue
            own = dict(module.named_parameters(recurse=False))
            wide = [key for key, parameter in own.items() if parameter.dim() > 1]
            if wide:
                raise ValueError(
                    f"{full}.{wide[0]} is outside of what the plan splits and would see a slice of each sequence; "
                    "leave sequence_parallel out for this model, or give a plan that splits it"
                )
            if own:
                Replicated().apply(module, layout)
        for name, module in block.named_children():
            region = f"{block_name}.{name}"
            if region in regions:
                module.register_forward_pre_hook(_gather(layout), with_kwargs=True)
                if not regions[region]:
                    module.register_forward_hook(lambda _, args, output: _first(output, _split(layout)))
    first, *_, last = (*blocks.values(), *blocks.values())

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def cut(hidden: Tensor) -> Tensor:
            layout.length = hidden.shape[1]
            return ops.split_sequence(hidden, layout.group)

        return _first_argument(args, kwargs, cut)

    first.register_forward_pre_hook(enter, with_kwargs=True)
    last.register_forward_hook(
        lambda _, args, output: _first(output, lambda x: ops.gather_sequence(x, layout.length, layout.group)[0])
    )


def _gather(layout: Layout) -> Any:
    def whole(hidden: Tensor) -> Tensor:
        same, parts = ops.gather_sequence(hidden, layout.length, layout.group)
        layout.enter(same, parts)
        return same

    return lambda module, args, kwargs: _first_argument(args, kwargs, whole)


def _split(layout: Layout) -> Any:
    return lambda x: ops.split_sequence(x, layout.group)


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[Any, dict[str, Any]]:
    """The hidden states: the first argument, or the one that transformers calls so."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _first(output: Any, change: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
