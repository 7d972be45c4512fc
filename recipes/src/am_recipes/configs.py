"""A recipe's config: one YAML file, command-line overrides and the environment, as one typed frozen dataclass.

All facts of a recipe stand on its class. `parse` checks the schema without importing torch or any target and writes
nothing; `check_targets` imports every `_target_` and holds its arguments against its signature before anything is
built. All complaints are `ConfigError` with file, line, dotted path and the nearest valid name. `RunConfig.to_yaml` is
the resolved config, which `parse` reads back to an equal one: values from the environment are written as the references
they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar

from am_recipes import sections
from am_recipes.run_config import DEFAULT_LOSS, HELD_OUT, RunConfig, identity_difference
from am_recipes.settings import (
    ArgumentError,
    Call,
    ConfigError,
    DefaultTarget,
    Node,
    Target,
    did_you_mean,
    load,
    override,
    read_section,
    resolve,
    walk,
)

__all__ = [
    "DEFAULT_LOSS",
    "RECIPES",
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

DEFAULT_KD_LOSS = "am_loss.linear_distillation"
# Of a config that names none; `{config}` is the stem of its file.
DEFAULT_RUN_DIR = "runs/{config}"
_OF_KD = {
    "teacher_model": "this recipe has no teacher; recipe kd learns from one",
    "teacher_distributed": "this recipe has no teacher; recipe kd learns from one",
    "kd_ratio": "it weighs the loss of a teacher, and this recipe has none; recipe kd learns from one",
    "temperature": "it softens the distributions of a teacher, and this recipe has none; recipe kd learns from one",
    "kd_loss_fn": "it compares with a teacher, and this recipe has none; recipe kd learns from one",
}
_OF_VLM = {
    "processor": "this recipe reads text alone, with a tokenizer; recipe vlm reads images",
    "model.vision_family": "this recipe trains language models; recipe vlm trains models with a vision tower",
    "generate.num_rows": "this recipe answers generate.prompts; recipe vlm answers held-out rows",
}


@dataclass(frozen=True, repr=False, kw_only=True)
class SftConfig(RunConfig):
    """Everything `am_recipes.sft` needs."""

    NAME: ClassVar[str] = "sft"
    COMMAND: ClassVar[tuple[str, str]] = ("finetune", "llm")
    HELP: ClassVar[str] = "fine-tune a language model on conversations"
    DATASET: ClassVar[DefaultTarget] = DefaultTarget("am_data.ChatDataset")
    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "tokenizer", "packed_sequence")
    REFUSED: ClassVar[Mapping[str, str]] = _OF_KD | _OF_VLM

    dataset: Annotated[Target, DATASET]
    validation_datasets: Annotated[Mapping[str, Annotated[Target, DATASET]], HELD_OUT] = field(default_factory=dict)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    packed_sequence: sections.PackedSequence = field(default_factory=sections.PackedSequence)
    generate: sections.Generate = field(default_factory=sections.Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reader(self.model, self.tokenizer, "tokenizer")

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield from self.tokenizer.calls("tokenizer")


@dataclass(frozen=True, repr=False, kw_only=True)
class KdConfig(SftConfig):
    """Everything `am_recipes.kd` needs: a teacher beside what fine-tuning has.

    The loss is `(1 - kd_ratio) * cross-entropy + kd_ratio * temperature^2 * divergence`.
    """

    NAME: ClassVar[str] = "kd"
    COMMAND: ClassVar[tuple[str, str]] = ("kd", "llm")
    HELP: ClassVar[str] = "distil a language model from a larger one"
    IDENTITY: ClassVar[tuple[str, ...]] = (
        *SftConfig.IDENTITY,
        *("teacher_model", "kd_ratio", "temperature", "kd_loss_fn"),
    )
    REFUSED: ClassVar[Mapping[str, str]] = _OF_VLM | {"teacher_model.vision_family": _OF_VLM["model.vision_family"]}

    teacher_model: sections.Model
    """The frozen teacher, as model; it has the same tokens."""
    kd_ratio: sections.Ratio = 0.5
    """Share of the divergence in the loss; the rest is cross-entropy."""
    temperature: sections.PositiveFloat = 1.0
    """Softens the distributions of both models."""
    kd_loss_fn: Annotated[Target, DefaultTarget(DEFAULT_KD_LOSS)] = field(
        default_factory=lambda: Target(DEFAULT_KD_LOSS)
    )
    """The whole loss of a step, from the hidden states of both models."""
    teacher_distributed: sections.Distributed | None = None
    """The teacher's own layout over the same ranks; null: the student's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kd_ratio > 0 and self.loss_fn != Target(DEFAULT_LOSS):
            raise self.error("loss_fn", "trains at kd_ratio 0 alone; give options to kd_loss_fn instead")
        if self.teacher_distributed is not None and self.kd_ratio > 0:
            self._require_same_rows(self.teacher_distributed)

    def _require_same_rows(self, theirs: sections.Distributed) -> None:
        """Refuse a layout in which ranks that hold one teacher in parts would hold different rows of the student."""
        ours = self.distributed
        same_cut = (theirs.cp_size, theirs.cp_layout) == (ours.cp_size, ours.cp_layout)
        if theirs.tp_size == ours.tp_size and (same_cut or ours.cp_size == theirs.cp_size == 1):
            return
        raise self.error(
            "teacher_distributed",
            f"tp_size={theirs.tp_size}, cp_size={theirs.cp_size}, cp_layout={theirs.cp_layout} over the same ranks as "
            f"the student's tp_size={ours.tp_size}, cp_size={ours.cp_size}, cp_layout={ours.cp_layout}: ranks would "
            "ask the teacher about other tokens than their student's; choose the student's three, or leave "
            "teacher_distributed out",
        )

    def models(self) -> Mapping[str, sections.Model]:
        return {"model": self.model, "teacher_model": self.teacher_model}

    def layouts(self) -> Mapping[str, sections.Distributed]:
        theirs = self.teacher_distributed
        return {**super().layouts(), **({} if theirs is None else {"teacher_distributed": theirs})}

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield Call("kd_loss_fn", self.kd_loss_fn, ("kd_ratio", "temperature", "num_tokens"), partial=True)


@dataclass(frozen=True, repr=False, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything `am_recipes.pretrain` needs."""

    NAME: ClassVar[str] = "pretrain"
    COMMAND: ClassVar[tuple[str, str]] = ("pretrain", "llm")
    HELP: ClassVar[str] = "train a language model on tokens, from random weights or on"
    DATASET: ClassVar[DefaultTarget] = DefaultTarget("am_data.TokenShards")
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("tokenizer", "vocab_size")
    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "tokenizer")
    REFUSED: ClassVar[Mapping[str, str]] = (
        _OF_KD
        | _OF_VLM
        | {
            "packed_sequence": "rows are windows of equal length, packed already; dataset.split_documents says whether "
            "documents see each other",
        }
    )

    dataset: Annotated[Target, DATASET]
    step_scheduler: sections.BoundedScheduler
    validation_datasets: Annotated[Mapping[str, Annotated[Target, DATASET]], HELD_OUT] = field(default_factory=dict)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    generate: sections.Generate = field(default_factory=sections.Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reader(self.model, self.tokenizer, "tokenizer")

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield from self.tokenizer.calls("tokenizer")


@dataclass(frozen=True, repr=False, kw_only=True)
class VlmConfig(RunConfig):
    """Everything `am_recipes.vlm` needs.

    `freeze` None freezes the vision tower and trains the rest; with `peft` it changes nothing.
    """

    NAME: ClassVar[str] = "vlm"
    COMMAND: ClassVar[tuple[str, str]] = ("finetune", "vlm")
    HELP: ClassVar[str] = "fine-tune a vision-language model on conversations with images"
    PEFT_TASK_TYPE: ClassVar[str | None] = None
    DATASET: ClassVar[DefaultTarget] = DefaultTarget("am_data.VisionChatDataset")
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("processor",)
    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "processor")
    REFUSED: ClassVar[Mapping[str, str]] = _OF_KD | {
        "tokenizer": "it is the processor's; set processor.name_or_path or processor.chat_template",
        "packed_sequence": "rows with images are padded, each a row of its own; set step_scheduler.local_batch_size",
        "generate.prompts": "this recipe answers held-out rows: generate.num_rows",
    }

    model: sections.VisionModel
    dataset: Annotated[Target, DATASET]
    validation_datasets: Annotated[Mapping[str, Annotated[Target, DATASET]], HELD_OUT] = field(default_factory=dict)
    processor: sections.Processor = field(default_factory=sections.Processor)
    generate: sections.GenerateFromRows = field(default_factory=sections.GenerateFromRows)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reader(self.model, self.processor, "processor")
        if self.generate.num_rows and not self.validation_datasets:
            raise ValueError(
                f"generate.num_rows={self.generate.num_rows} needs a validation_dataset, whose rows are asked; add one"
            )

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield from self.processor.calls("processor")


RECIPES: Mapping[str, type[RunConfig]] = {kind.NAME: kind for kind in (SftConfig, PretrainConfig, KdConfig, VlmConfig)}


def _require_reader(model: sections.Model, reader: sections.Reader, key: str) -> None:
    if model.name_or_path is None and reader.name_or_path is None:
        raise ValueError(f"{key}.name_or_path is required with model.config: a random model brings no {key}")


def parse(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Read and check a config file; `overrides` are (dotted path, text) pairs, later ones win.

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
    kind = RECIPES[recipe.value]
    _refuse(root, kind)
    _refuse_without_section(root, kind)
    if "clip_grad_norm" in root.value:
        root.value["clip_grad_norm"] = _spell_out_no_clipping(root.value["clip_grad_norm"])
    default = {"run_dir": Node(root.place.child("run_dir"), DEFAULT_RUN_DIR.format(config=source.stem))}
    nodes = dict(walk(root))
    return read_section(
        Node(root.place, default | root.value),
        kind,
        source=source,
        places={dotted_path: node.place for dotted_path, node in nodes.items()},
        environment={path: node.reference for path, node in nodes.items() if node.reference is not None},
    )


def _refuse(root: Node, kind: type[RunConfig]) -> None:
    """Refuse what the recipe has no use for and says so, which is more than that it does not know the key."""
    nodes = dict(walk(root))
    for key, reason in kind.REFUSED.items():
        if key in nodes:
            raise nodes[key].error(f"not in recipe {kind.NAME}: {reason}")


def _refuse_without_section(root: Node, kind: type[RunConfig]) -> None:
    """Refuse `--lr` with what it is called in full: a key at the top that is one of a section, or the end of one."""
    # Reads sources for the meaning of keys, which nobody needs here; so only once something is wrong.
    known = {item.name for item in fields(kind)}
    for name, node in root.value.items():
        if name in known or name.startswith(f"{HELD_OUT.key}_") or name == HELD_OUT.key:
            continue
        from am_recipes.settings import keys

        paths = [f"{path}.{key.name}" for path, _, section in keys.sections(kind) if path for key in section]
        paths += [path for path, _ in walk(root) if path != name]
        found = [path for path in dict.fromkeys(paths) if path.endswith(f".{name}")]
        found = found or [path for path in dict.fromkeys(paths) if path.endswith(f"_{name}")]
        if found and not did_you_mean(name, known):
            raise node.error(f"unknown key; did you mean {' or '.join(map(repr, found[:4]))}?")


def _spell_out_no_clipping(node: Node) -> Node:
    """`clip_grad_norm: null` is short for `clip_grad_norm: {max_norm: null}`."""
    if node.value not in (None, "none", "None"):
        return node
    max_norm = replace(node, place=node.place.child("max_norm"))
    return Node(node.place, {"max_norm": max_norm})


def check_targets(config: RunConfig) -> None:
    """Find the packages of the config's trackers; import every target and hold its arguments against its signature, and
    inline model configs against their classes. Raises `ConfigError`.
    """
    for name, section in config.trackers().items():
        try:
            section.prepare()
        except ValueError as error:
            raise config.error(name, str(error)) from error
    for call in config.targets():
        call.bind()
    # Knows transformers, which the schema does without.
    from am_recipes import model_config

    for key, model in config.models().items():
        if model.config is not None:
            try:
                model_config.check(model.config)
            except ArgumentError as error:
                raise config.error(f"{key}.config.{error.path}".rstrip("."), str(error)) from error
