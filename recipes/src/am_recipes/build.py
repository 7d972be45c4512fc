"""A model ready to train: meta device -> adapters -> what trains -> faster parts -> parallel layout -> weights.

The order is the point, and this is the only place that knows it: no rank ever holds more than its shard, every step
sees the names that transformers gave, and what cannot work is refused before weights are read.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import am_ckpt
import am_kernels
import am_mesh
import am_models
import am_peft
from am_recipes import checks, compatibility, ending, optim, precision, routing, sources
from am_recipes.configs import RunConfig
from am_recipes.sections import Distributed
from am_recipes.settings import ArgumentError, Target, plain

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin


class Weights(NamedTuple):
    """What a checkpoint says of a model's weights, see `am_ckpt.Checkpointer`, and where the first ones were read.

    fingerprints: of the folders that it means nothing without, by name. folders: all that weights came from.
    """

    files: Mapping[str, str | bytes]
    mapping: Sequence[Mapping[str, Any]]
    fingerprints: Mapping[str, str]
    folders: Mapping[str, Path]


class Built(NamedTuple):
    """A model with what the loop, a checkpoint and an export of it need.

    model: laid out, with weights. precision: the dtypes it trains, computes and is exported in. state: what a
    checkpoint stores of it, the adapter alone where there is one. report: which parts run on our kernels. router: its
    losses, and how evenly its experts are used. untested: what of the layout nobody has held against one process, None
    where all has been. mapping: published names of its weights. files: beside the weights of a
    checkpoint; export_files: beside those of an export. base: the folder its first weights are from, None for a random
    model; base_name: how an adapter names it, None where there is no adapter of it.
    """

    model: PreTrainedModel
    precision: precision.Precision
    state: PreTrainedModel | am_peft.Adapter
    report: am_models.OptimizeReport
    router: routing.Routing
    untested: str | None
    mapping: Sequence[Mapping[str, Any]]
    files: Mapping[str, str | bytes]
    export_files: Mapping[str, bytes]
    base: Path | None
    base_name: str | None

    def facts(self) -> tuple[object, ...]:
        """What the log says of the model."""
        return self.report, self.precision, *([] if self.untested is None else [self.untested])

    def weights(self, others: Mapping[str, Path | None] | None = None) -> Weights:
        """What a checkpoint says of the weights.

        An adapter means nothing on other weights than those it was trained on; `others` names more such folders.
        """
        named = {"base": self.base, **(others or {})}
        folders = {name: folder for name, folder in named.items() if folder is not None}
        needed = {name: folder for name, folder in folders.items() if name != "base" or self.base_name is not None}
        prints = {name: sources.fingerprint(folder) for name, folder in needed.items()}
        return Weights(self.files, self.mapping, prints, folders)


def dims(config: RunConfig, device: torch.device) -> am_mesh.ParallelDims:
    """The mesh of the run; refused where `distributed` does not fit the number of ranks."""
    with config.at("distributed"):
        return _dims(config.distributed, device)


def _dims(layout: Distributed, device: torch.device) -> am_mesh.ParallelDims:
    asked = am_mesh.ParallelDims(**layout.sizes())
    try:
        return asked.build(device.type)
    except ValueError as error:
        ranks = layout.fewest_ranks()
        processes = f"{ranks}" if layout.dp_size else f"a multiple of {ranks}"
        raise ValueError(f"{error}; or start {processes} processes (--nproc-per-node, --nnodes)") from error


def build(
    config: RunConfig,
    model: PreTrainedModel,
    dims: am_mesh.ParallelDims,
    device: torch.device,
    *,
    folder: Path | None,
    tokenizer: Tokenizer,
    losses: Mapping[str, Target],
    freeze: Sequence[Mapping[str, str]] = (),
    separate_documents: bool,
) -> Built:
    """Make `model`, which is on the meta device, ready to train. Every rank calls it.

    Args:
        folder: where its weights are; None: random ones, which depend on their names and the seed alone.
        tokenizer: the tokenizer or processor that is exported with it.
        losses: the loss functions that will be called, by their key in the config.
        freeze: the rules of `am_peft.freeze`, applied once the adapters are there.
        separate_documents: prove that documents which share a row do not see each other; that nothing sees the future,
            padding or other rows is always proved.

    Raises ValueError for what cannot train, see `am_recipes.checks`.
    """
    _adapt(config, model, freeze, folder)
    chosen = precision.choose(model, config)
    report = _optimize(config, model, losses, dims)
    untested = _untested(config, model, report, dims)
    with config.at("loss_fn"):
        checks.require_loss(config.loss_fn.callable(), model, device)
    with config.at("model"):
        mapping = _weight_map(model, folder)
    files = model_files(model, tokenizer, folder)
    router = routing.routing(config, model, report, dims)
    fresh = ("*lora_*",) if folder else ("*",)
    layout = config.distributed.options() | {"param_dtype": chosen.param_dtype}
    with config.at("distributed"):
        _lay_out(model, dims, layout)
    # Again: a layer that the layout has wrapped cannot be merged.
    checks.require_export(config, model)
    _load(config, model, config.distributed, device, folder, mapping, fresh, "model")
    if not config.dry_run:
        chosen = precision.measured(chosen, model, dims)
    _require_no_leak(config, model, separate_documents, dims, chosen.param_dtype, "model")
    if config.peft is None:
        return Built(model, chosen, model, report, router, untested, mapping, files, files, folder, None)
    named = config.model.name_or_path
    base = sources.base_name(named, folder) if folder and named is not None else None
    own: Mapping[str, str | bytes] = am_peft.adapter_files(model, base_model_name_or_path=base)
    adapter_files = {**own, **reader_files(model, tokenizer, folder)}
    return Built(
        model, chosen, am_peft.Adapter(model), report, router, untested, mapping, adapter_files, files, folder, base
    )


def optimizer(config: RunConfig, model: PreTrainedModel, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """The optimizer of the run over what trains of `model`, and its schedule of `total_steps` steps."""
    with config.at("optimizer"):
        built = optim.build_optimizer(model, **config.optimizer.options())
    with config.at("lr_scheduler"):
        return built, optim.schedule(built, total_steps=total_steps, **config.lr_scheduler.options())


def build_teacher(
    config: RunConfig,
    model: PreTrainedModel,
    layout: Distributed,
    device: torch.device,
    *,
    folder: Path | None,
    losses: Mapping[str, Target],
    separate_documents: bool,
) -> None:
    """The same for a model that only answers: frozen, in a layout of its own. Every rank calls it."""
    with config.at("teacher_distributed"):
        dims = _dims(layout, device)
    if _optimize(config, model, losses, dims).router:
        # It trains nothing, so nobody asks for an auxiliary loss of its router.
        model.config.get_text_config().output_router_logits = False
    with config.at("teacher_model"):
        mapping = _weight_map(model, folder)
    model.requires_grad_(False).eval()
    fresh = () if folder else ("*",)
    options = layout.options()
    with config.at("teacher_distributed"):
        _lay_out(model, dims, options)
    _load(config, model, layout, device, folder, mapping, fresh, "teacher_model")
    _require_no_leak(config, model, separate_documents, dims, options["param_dtype"], "teacher_model")


def export(config: RunConfig, built: Built, tokenizer: Tokenizer) -> None:
    """Write `RUN/export`: a plain Hugging Face folder, or the adapter alone. Every rank calls it."""
    if not config.export.enabled:
        return
    folder = config.run_dir / "export"
    if config.peft is not None and not config.export.merge_adapter:
        am_peft.save_adapter(built.model, folder, base_model_name_or_path=built.base_name)
        if torch.distributed.get_rank() == 0:
            for name, content in reader_files(built.model, tokenizer, built.base).items():
                (folder / name).write_bytes(content)
        return
    if config.peft is not None:
        am_peft.merge_lora(built.model)
    am_ckpt.save_hf(
        built.model, folder, mapping=built.mapping, files=built.export_files, dtypes=built.precision.exported
    )


def model_files(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path | None) -> dict[str, bytes]:
    """What stands beside the weights of an export, by file name: config, generation config and tokenizer as this run
    uses them, and what else `folder` (the model's own) has: code, licence, SentencePiece model.

    Call it before the layout: FSDP2 renames the class.
    """
    model.config.architectures = [type(model).__name__]
    original = am_ckpt.hf_files(folder) if folder is not None else {}
    read = {name: path.read_bytes() for name, path in original.items()}
    return read | _written(model.config) | reader_files(model, tokenizer, folder)


def reader_files(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path | None) -> dict[str, bytes]:
    """What a model is asked with, by file name: tokenizer and template, and the generation config that stops it.

    An adapter has them too: no library reads a generation config from there by itself, but its reader can.
    """
    return _written(tokenizer) | {ending.GENERATION_CONFIG: ending.generation_config(model, folder)}


def _written(part: PretrainedConfig | Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        part.save_pretrained(temporary)
        return {path.name: path.read_bytes() for path in Path(temporary).iterdir() if path.is_file()}


def _adapt(config: RunConfig, model: PreTrainedModel, freeze: Sequence[Mapping[str, str]], folder: Path | None) -> None:
    """Adapters, and what trains; refused where that, or its export, cannot be."""
    peft = config.peft
    if peft is not None:
        with config.at("peft"):
            am_peft.apply_lora(model, peft.lora_config(config.PEFT_TASK_TYPE), adapter_dtype=peft.dtype())
    with config.at("freeze"):
        am_peft.freeze(model, freeze)
    if folder is not None:
        checks.require_trained(model, sources.random_parts(folder), folder)
    if peft is not None:
        checks.require_adapter_alone(model)
    checks.require_export(config, model)


def _optimize(
    config: RunConfig, model: PreTrainedModel, losses: Mapping[str, Target], dims: am_mesh.ParallelDims
) -> am_models.OptimizeReport:
    no_context = am_models.parallel_facts(model).no_context
    if no_context is not None and dims.sequence_ranks.size() > 1:
        raise ArgumentError(
            "distributed.cp_size", f"cp_size={dims.sequence_ranks.size()} cuts sequences, and {no_context}; choose 1"
        )
    with config.at("kernels"):
        report = am_models.optimize(model, kernels=_kernels(config, dims))
    for key, target in losses.items():
        checks.require_loss_function(report, target, key)
    return report


def _kernels(config: RunConfig, dims: am_mesh.ParallelDims) -> str | Mapping[str, Any]:
    """`kernels`; where ranks hold parts of one sequence, with an attention that sees all of it."""
    if dims.sequence_ranks.size() == 1:
        return config.kernels
    asked = config.kernels if isinstance(config.kernels, Mapping) else {}
    attention = am_mesh.context_attention(am_kernels.attention, dims.sequence_ranks, plan=am_kernels.document_segments)
    return {**asked, "attention": attention}


def _weight_map(model: PreTrainedModel, folder: Path | None) -> list[dict[str, Any]]:
    if folder is not None and not any(folder.glob("*.safetensors")):
        # A dry run downloads no weights; otherwise `sources.resolve` has found them.
        folder = None
    if folder is not None:
        # Names are read without a look at the file they are in; this says what is wrong with it.
        am_ckpt.inspect(folder)
    return am_models.weight_map(model, folder)


def _lay_out(model: PreTrainedModel, dims: am_mesh.ParallelDims, options: Mapping[str, Any]) -> None:
    am_mesh.parallelize(
        model,
        dims,
        forward_methods=("forward_with_loss",),
        layer_placements=am_peft.tensor_placements,
        must_divide=am_models.parallel_facts(model).must_divide,
        **options,
    )


def _load(
    config: RunConfig,
    model: PreTrainedModel,
    layout: Distributed,
    device: torch.device,
    folder: Path | None,
    mapping: Sequence[Mapping[str, Any]],
    fresh: Sequence[str],
    key: str,
) -> None:
    """Weights straight into the shards."""
    if config.dry_run:
        return
    kept = torch.device("cpu") if layout.cpu_offload else device
    checks.require_memory(model, kept, key)
    with config.at(key):
        am_ckpt.load_hf(
            model,
            folder,
            mapping=mapping,
            initialise=fresh,
            initialiser=am_models.initial_value,
            seed=config.seed,
            device=kept,
        )


def _require_no_leak(
    config: RunConfig,
    model: PreTrainedModel,
    may_share_rows: bool,
    dims: am_mesh.ParallelDims,
    param_dtype: torch.dtype | None,
    key: str,
) -> None:
    """Prove that no token sees the future, padding, or other documents and rows, which takes weights."""
    if config.dry_run:
        return
    cut = None
    if dims.sequence_ranks.size() > 1:
        zigzag = config.distributed.cp_layout == "zigzag"
        shard = functools.partial(am_mesh.shard_sequence, mesh=dims.sequence_ranks, zigzag=zigzag)
        cut = am_models.Cut(shard, dims.row_multiple(zigzag=zigzag))
    with config.at(key):
        am_models.require_no_leak(model, packed=may_share_rows, param_dtype=param_dtype, cut=cut)


def _untested(
    config: RunConfig, model: PreTrainedModel, report: am_models.OptimizeReport, dims: am_mesh.ParallelDims
) -> str | None:
    """What of the layout nobody has held against one process; raises ConfigError for what does not go together.

    The schema has asked the same, but for what only the model and the number of ranks tell.
    """
    scheduler = config.step_scheduler
    facts = {
        "tied": bool(model.config.get_text_config().to_dict().get("tie_word_embeddings")),
        "experts": report.num_experts_per_token is not None,
        "micro_batches": scheduler.global_batch_size // (scheduler.local_batch_size * dims.row_ranks.size()),
    }
    values = {**plain(config), "facts": facts}
    refused = compatibility.table().refused(values)
    if refused is not None:
        raise config.error(*refused)
    return compatibility.table().untested(values) if dims.world_size > 1 else None
