"""A recipe's config: one YAML file, command-line overrides and the environment, as one typed frozen dataclass.

`parse` checks the schema without importing torch or any target and writes nothing; `check_targets` imports every
``_target_`` and holds its arguments against its signature before anything is built. All complaints are `ConfigError`
with file, line, dotted path and the nearest valid name. `RunConfig.to_yaml` is the resolved config, which `parse` reads
back to an equal one: values from the environment are written as the references they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from am_recipes import sections
from am_recipes.settings import (
    Check,
    ConfigError,
    DefaultTarget,
    Node,
    Place,
    Prefixed,
    Target,
    dump,
    fingerprints,
    load,
    nearest,
    override,
    plain,
    read_section,
    resolve,
    walk,
    written,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "ConfigError",
    "KdConfig",
    "PretrainConfig",
    "RunConfig",
    "SftConfig",
    "Target",
    "VlmConfig",
    "check_targets",
    "identity_difference",
    "parse",
]

DEFAULT_LOSS = "am_loss.linear_cross_entropy"
DEFAULT_KD_LOSS = "am_loss.linear_distillation"
MUON = "torch.optim.Muon"
_CHAT, _TOKENS, _PICTURES = "am_data.ChatDataset", "am_data.TokenShards", "am_data.VisionChatDataset"
# In the short form of a dataset, ``path`` is what its class calls its first argument.
_PATHS = {}
ChatRows = Annotated[Target, DefaultTarget(_CHAT)]
Tokens = Annotated[Target, DefaultTarget(_TOKENS)]
Pictures = Annotated[Target, DefaultTarget(_PICTURES)]
# What `am_recipes.compose` adds to the config of a composed model, and from where.
_COMPOSED = {
    "text_config": "language_model",
    "tie_word_embeddings": "language_model",
    "image_token_id": "the processor",
}
_OF_KD = {
    key: f"{what}; recipe kd learns from a teacher"
    for key, what in {
        "teacher_model": "this recipe has no teacher",
        "teacher_distributed": "this recipe has no teacher",
        "kd_ratio": "weighs the loss of a teacher, and this recipe has none",
        "temperature": "softens the distributions of a teacher, and this recipe has none",
        "kd_loss_fn": "compares with a teacher, and this recipe has none",
    }.items()
}
_OF_VLM = {
    "processor": "this recipe reads text alone and needs only a tokenizer; recipe vlm reads images",
    "model.vision_family": "this recipe trains language models; recipe vlm trains models with a vision tower",
    "generate.num_rows": "this recipe answers generate.prompts; recipe vlm answers held-out rows",
}
_HELD_OUT = Prefixed("validation_dataset", "val_loss")


@dataclass(frozen=True, repr=False, kw_only=True)
class RunConfig:
    """What every recipe needs; section and key names are those of the YAML file.

    ``validation_datasets`` maps the name of the logged metric to its dataset: ``validation_dataset`` is ``val_loss``,
    ``validation_dataset_math`` is ``val_loss_math``. ``source`` is the file that was read, ``places`` says where each
    dotted path was set, ``environment`` maps dotted paths to the ``${VAR}`` text their value came from.
    """

    # The sections, or keys of them, that make two runs the same run.
    IDENTITY: ClassVar[tuple[str, ...]] = (
        *("model", "dataset", "dataloader.shuffle", "dataloader.drop_last", "dataloader.collate", "peft", "freeze"),
        *("moe", "optimizer", "lr_scheduler", "clip_grad_norm", "loss_fn", "seed"),
    )
    # What the recipe passes to the class of its datasets.
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    # Keys of other recipes, and why this one has no use for them.
    REFUSED: ClassVar[Mapping[str, str]] = _OF_KD | _OF_VLM

    recipe: str
    run_dir: Path
    model: sections.Model
    dataset: Target
    optimizer: sections.Optimizer
    step_scheduler: sections.StepScheduler
    seed: sections.NonNegativeInt = 42
    validation_datasets: Mapping[str, Target] = field(default_factory=dict)
    dataloader: sections.DataLoader = field(default_factory=sections.DataLoader)
    distributed: sections.Distributed = field(default_factory=sections.Distributed)
    lr_scheduler: sections.LrScheduler = field(default_factory=sections.LrScheduler)
    loss_fn: Annotated[Target, DefaultTarget(DEFAULT_LOSS)] = field(default_factory=lambda: Target(DEFAULT_LOSS))
    clip_grad_norm: sections.ClipGradNorm = field(default_factory=sections.ClipGradNorm)
    peft: sections.Peft | None = None
    freeze: tuple[sections.FreezeRule, ...] | None = None
    moe: sections.Router = field(default_factory=sections.Router)
    checkpoint: sections.Checkpoint = field(default_factory=sections.Checkpoint)
    kernels: Literal["auto", "off"] | Mapping[str, Any] = "auto"
    export: sections.AdapterExport = field(default_factory=sections.AdapterExport)
    sinks: tuple[Target, ...] = ()
    source: Path = field(default=Path(), compare=False)
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)
    environment: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.checkpoint.keep_best is not None and not self.validation_datasets:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation_dataset, whose loss says what is "
                "best; add one, or use checkpoint.keep_last"
            )
        schedule, steps = self.lr_scheduler, self.step_scheduler
        if schedule.style != "constant" and schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"lr_scheduler.min_lr={schedule.min_lr} is above optimizer.lr={self.optimizer.lr}; lower it"
            )
        if steps.max_steps is not None and schedule.warmup_steps > steps.max_steps:
            raise ValueError(
                f"lr_scheduler.warmup_steps={schedule.warmup_steps} is longer than the run of "
                f"step_scheduler.max_steps={steps.max_steps}; lower it"
            )
        full_rate = max(schedule.warmup_steps, 1)
        if steps.max_steps is not None and (schedule.decay_steps or 0) > steps.max_steps - full_rate:
            raise ValueError(
                f"lr_scheduler.decay_steps={schedule.decay_steps} is longer than the {steps.max_steps - full_rate} "
                f"steps of step_scheduler.max_steps={steps.max_steps} that follow step {full_rate}, the first at the "
                "full rate; lower it, or lr_scheduler.warmup_steps"
            )
        if self.optimizer.adamw is not None and self.optimizer.target.path != MUON:
            raise ValueError(
                f"optimizer.adamw is for {MUON}, which leaves a part to AdamW, and the optimizer is "
                f"{self.optimizer.target.path}; remove it"
            )
        if self.model.config is not None and self.peft and self.export.enabled and not self.export.merge_adapter:
            raise ValueError(
                "export.merge_adapter is false with model.config: nothing could load an adapter without the random "
                "weights it belongs to; set export.merge_adapter or give model.name_or_path"
            )

    def freeze_rules(self) -> list[dict[str, str]] | None:
        """``freeze`` as `am_peft.freeze` takes it; None where the config leaves it to the recipe."""
        return None if self.freeze is None else [rule.rule() for rule in self.freeze]

    def error(self, path: str, message: str) -> ConfigError:
        """An error about the value at a dotted path, with the line that set it or the section it would be in."""
        parent = path
        while parent not in self.places and parent:
            parent = parent.rpartition(".")[0]
        where = self.places[parent].where if parent in self.places else str(self.source)
        return Place(where, path).error(message)

    def __str__(self) -> str:
        return self.to_yaml()

    __repr__ = __str__

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run, as JSON values that hold no secret and nothing from the environment.

        Where the schedule needs the length of the run, that is part of it: it decides the rate of every step.
        """
        values = fingerprints(plain(self), self.environment)
        result: dict[str, Any] = {}
        for key in self.IDENTITY:
            section, _, name = key.partition(".")
            if name:
                result.setdefault(section, {})[name] = values[section][name]
            else:
                result[section] = values[section]
        result["step_scheduler"] = {"global_batch_size": self.step_scheduler.global_batch_size}
        if self.lr_scheduler.style not in ("constant", "inverse_sqrt"):
            result["step_scheduler"] |= self.goal()
        return result

    def goal(self) -> dict[str, int | None]:
        """How long to train: what decides whether a run is finished, and may grow between two calls of one command."""
        return self.step_scheduler.goal()

    def to_yaml(self) -> str:
        """The resolved config: defaults written out, environment references as they were, secrets as references."""
        return dump(written(plain(self), self.environment))

    def save(self, path: Path) -> None:
        """Write `to_yaml` to ``path``; one rank calls this."""
        path.write_text(self.to_yaml(), encoding="utf-8")


@dataclass(frozen=True, repr=False, kw_only=True)
class SftConfig(RunConfig):
    """Everything `am_recipes.sft` needs."""

    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "tokenizer", "packed_sequence")

    recipe: Literal["sft"]
    dataset: ChatRows
    validation_datasets: Annotated[Mapping[str, ChatRows], _HELD_OUT] = field(default_factory=dict)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    packed_sequence: sections.PackedSequence = field(default_factory=sections.PackedSequence)
    generate: sections.Generate = field(default_factory=sections.Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_tokenizer(self.model, self.tokenizer)


@dataclass(frozen=True, repr=False, kw_only=True)
class KdConfig(SftConfig):
    """Everything `am_recipes.kd` needs: a teacher beside what fine-tuning has.

    The loss is ``(1 - kd_ratio) * cross-entropy + kd_ratio * temperature^2 * divergence``. ``teacher_distributed`` is
    the teacher's own layout over the same ranks; None: the student's.
    """

    IDENTITY: ClassVar[tuple[str, ...]] = (
        *SftConfig.IDENTITY,
        *("teacher_model", "kd_ratio", "temperature", "kd_loss_fn"),
    )
    REFUSED: ClassVar[Mapping[str, str]] = _OF_VLM | {"teacher_model.vision_family": _OF_VLM["model.vision_family"]}

    recipe: Literal["kd"]  # type: ignore[assignment]
    teacher_model: sections.Model
    kd_ratio: Annotated[float, Check(lambda ratio: 0 <= ratio <= 1, "must be in [0, 1]")] = 0.5
    temperature: sections.PositiveFloat = 1.0
    kd_loss_fn: Annotated[Target, DefaultTarget(DEFAULT_KD_LOSS)] = field(
        default_factory=lambda: Target(DEFAULT_KD_LOSS)
    )
    teacher_distributed: sections.Distributed | None = None


@dataclass(frozen=True, repr=False, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything `am_recipes.pretrain` needs."""

    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "tokenizer")
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("tokenizer", "vocab_size")
    REFUSED: ClassVar[Mapping[str, str]] = RunConfig.REFUSED | {
        "packed_sequence": "rows are windows of equal length, packed already; dataset.split_documents says whether "
        "documents see each other",
    }

    recipe: Literal["pretrain"]
    dataset: Tokens
    step_scheduler: sections.BoundedScheduler
    validation_datasets: Annotated[Mapping[str, Tokens], _HELD_OUT] = field(default_factory=dict)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    generate: sections.Generate = field(default_factory=sections.Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_tokenizer(self.model, self.tokenizer)


@dataclass(frozen=True, repr=False, kw_only=True)
class VlmConfig(RunConfig):
    """Everything `am_recipes.vlm` needs.

    ``freeze`` None freezes the vision tower and trains the rest; with ``peft`` it changes nothing.
    """

    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "processor")
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("processor",)
    REFUSED: ClassVar[Mapping[str, str]] = _OF_KD | {
        "tokenizer": "it is the processor's; set processor.name_or_path or processor.chat_template",
        "packed_sequence": "rows with images are padded, each a row of its own; set step_scheduler.local_batch_size",
        "generate.prompts": "this recipe answers held-out rows: generate.num_rows",
    }

    recipe: Literal["vlm"]
    model: sections.VisionModel
    dataset: Pictures
    validation_datasets: Annotated[Mapping[str, Pictures], _HELD_OUT] = field(default_factory=dict)
    processor: sections.Processor = field(default_factory=sections.Processor)
    generate: sections.GenerateFromRows = field(default_factory=sections.GenerateFromRows)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.name_or_path is None and self.model.compose is None and self.processor.name_or_path is None:
            raise ValueError("processor.name_or_path is required with model.config: a random model brings no processor")
        if self.generate.num_rows and not self.validation_datasets:
            raise ValueError(
                f"generate.num_rows={self.generate.num_rows} needs a validation_dataset, whose rows are asked; add one"
            )


RECIPES: Mapping[str, type[RunConfig]] = {
    "sft": SftConfig,
    "pretrain": PretrainConfig,
    "kd": KdConfig,
    "vlm": VlmConfig,
}


def _require_tokenizer(model: sections.Model, tokenizer: sections.Tokenizer) -> None:
    if model.name_or_path is None and tokenizer.name_or_path is None:
        raise ValueError("tokenizer.name_or_path is required with model.config: a random model brings no tokenizer")


_DATASETS = {"sft": _CHAT, "pretrain": _TOKENS, "kd": _CHAT, "vlm": _PICTURES}


def parse(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Read and check a config file; ``overrides`` are (dotted path, text) pairs, later ones win.

    Imports nothing that the config names and writes nothing. Raises `ConfigError`.
    """
    source = Path(path)
    tree = load(source)
    for dotted_path, text in overrides:
        override(tree, dotted_path, text)
    root = resolve(tree)
    recipe = root.value.get("recipe")
    if recipe is None:
        raise root.error(f"the key 'recipe' is required: one of {', '.join(RECIPES)}")
    if recipe.value not in list(RECIPES):
        raise recipe.error(f"must be one of {', '.join(RECIPES)}, got {recipe.shown()}")
    _refuse(root, RECIPES[recipe.value])
    for key, child in root.value.items():
        if key == "dataset" or key.startswith("validation_dataset"):
            _name_path(child, _DATASETS[recipe.value])
    if "clip_grad_norm" in root.value:
        root.value["clip_grad_norm"] = _spell_out_no_clipping(root.value["clip_grad_norm"])
    default = {"run_dir": Node(root.place.child("run_dir"), f"runs/{source.stem}")}
    complete = Node(root.place, default | root.value)
    nodes = dict(walk(root))
    return read_section(
        complete,
        RECIPES[recipe.value],
        source=source,
        places={dotted_path: node.place for dotted_path, node in nodes.items()},
        environment={path: node.reference for path, node in nodes.items() if node.reference is not None},
    )


def _refuse(root: Node, kind: type[RunConfig]) -> None:
    """Refuse what the recipe has no use for and says so, which is more than that it does not know the key."""
    for key, reason in kind.REFUSED.items():
        node: Node | None = root
        for name in key.split("."):
            node = node.value.get(name) if node is not None and isinstance(node.value, dict) else None
        if node is not None:
            raise node.error(f"not in recipe {root.value['recipe'].value}: {reason}")


def _name_path(node: Node, default: str) -> None:
    """In the short form of a dataset, ``path`` is what `am_data.ChatDataset` calls ``rows``, or its like."""
    if not isinstance(node.value, dict) or "path" not in node.value:
        return
    target = node.value["_target_"].value if "_target_" in node.value else default
    if target not in _PATHS:
        return
    name = _PATHS[target]
    if name in node.value and not node.value["path"].created:
        raise node.value["path"].error(f"means the same as {name}, which is given too; keep one of them")
    # In place of the key it renames, so that the order of what is saved stays that of the file.
    renamed = {name if key == "path" else key: child for key, child in node.value.items() if key != name}
    node.value.clear()
    node.value.update(renamed)


def _spell_out_no_clipping(node: Node) -> Node:
    """``clip_grad_norm: null`` is short for ``clip_grad_norm: {max_norm: null}``."""
    if node.value not in (None, "none", "None"):
        return node
    max_norm = replace(node, place=node.place.child("max_norm"))
    return Node(node.place, {"max_norm": max_norm})


def check_targets(config: RunConfig) -> None:
    """Import every target of the config and check its arguments against its signature. Raises `ConfigError`."""
    for dataset in (config.dataset, *config.validation_datasets.values()):
        dataset.bind(config.DATASET_ARGUMENTS)
    config.optimizer.target.bind(("params", *config.optimizer.named()))
    config.loss_fn.bind(partial=True)
    if isinstance(config, KdConfig):
        config.kd_loss_fn.bind(("kd_ratio", "temperature", "num_tokens"), partial=True)
    if config.peft is not None:
        config.peft.lora.bind()
    if config.model.family is not None:
        config.model.family.bind()
    if isinstance(config, VlmConfig) and config.model.vision_family is not None:
        config.model.vision_family.bind()
    if config.dataloader.collate is not None:
        config.dataloader.collate.bind(partial=True)
    for sink in config.sinks:
        sink.bind()
    if config.model.config is not None:
        _check_model_config(config, "model.config", config.model.config)
    if isinstance(config, KdConfig) and config.teacher_model.config is not None:
        _check_model_config(config, "teacher_model.config", config.teacher_model.config)
    if isinstance(config, VlmConfig) and config.model.compose is not None:
        compose = config.model.compose
        compose.processor.bind(("tokenizer",))
        for key, origin in _COMPOSED.items():
            if key in compose.config:
                raise config.error(f"model.compose.config.{key}", f"it comes from {origin}; remove it")
        _check_model_config(config, "model.compose.config", compose.config)


def _check_model_config(config: RunConfig, path: str, given: Mapping[str, Any]) -> None:
    """Hold the inline transformers config at ``path``, with the parts it is made of, against their classes."""
    _check_config_fields(config, path, given, _config_class(config, path, given["model_type"]))


def _check_config_fields(config: RunConfig, path: str, given: Mapping[str, Any], kind: type[PretrainedConfig]) -> None:
    """Transformers keeps unknown keywords as attributes that nothing reads; a misspelt size would go unnoticed."""
    import inspect

    from transformers import AutoConfig

    default = _build_config(config, path, kind, {})
    known = {*inspect.signature(kind).parameters, *default.to_dict(), *kind.attribute_map, "model_type"}
    for key, value in given.items():
        inner = f"{path}.{key}"
        if key not in known:
            raise config.error(inner, f"{kind.__name__} has no such field{nearest(key, known)}")
        # What is neither a mapping nor null, the class refuses below.
        if key in kind.sub_configs and isinstance(value, Mapping):
            part = kind.sub_configs[key]
            if part is AutoConfig and "model_type" in value:
                part = _config_class(config, inner, value["model_type"])
            elif part is AutoConfig and vars(default)[key] is None:
                raise config.error(inner, f"needs a model_type: {kind.__name__} has no default for it")
            elif part is AutoConfig:
                part = type(vars(default)[key])
            _check_config_fields(config, inner, value, part)
    _build_config(config, path, kind, {key: value for key, value in given.items() if key != "model_type"})


def _config_class(config: RunConfig, path: str, model_type: Any) -> type[PretrainedConfig]:
    from transformers import CONFIG_MAPPING

    if model_type not in list(CONFIG_MAPPING):
        hint = nearest(str(model_type), CONFIG_MAPPING)
        raise config.error(f"{path}.model_type", f"unknown {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]


def _build_config(
    config: RunConfig, path: str, kind: type[PretrainedConfig], fields: Mapping[str, Any]
) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise config.error(path, f"{kind.__name__}: {error.__cause__ or error}") from error


def identity_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys on which two results of `RunConfig.identity` differ."""
    result: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            result += [f"{key}.{inner}" for inner in identity_difference(before, after)]
        elif before != after:
            result.append(key)
    return result
