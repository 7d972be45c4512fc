"""The sections of a config file, one frozen dataclass each: what `am_recipes.configs` puts together per recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from am_recipes.settings import Check, DefaultTarget, Inline, Target

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PretrainedConfig

PositiveInt = Annotated[int, Check(lambda number: number >= 1, "must be at least 1")]
NonNegativeInt = Annotated[int, Check(lambda number: number >= 0, "must be at least 0")]
PositiveFloat = Annotated[float, Check(lambda number: 0 < number < math.inf, "must be greater than 0")]
NonNegativeFloat = Annotated[float, Check(lambda number: 0 <= number < math.inf, "must be at least 0")]
Fraction = Annotated[float, Check(lambda number: 0 <= number < 1, "must be in [0, 1)")]
OneRank = Annotated[
    int, Check(lambda size: size == 1, "must be 1: this recipe divides work over data-parallel ranks only")
]
Text = Annotated[str, Check(bool, "must not be empty")]
Pattern = Annotated[str, Check(lambda text: _compiles(text), "must be a regular expression")]
Dtype = Literal["float32", "bfloat16"]
_ADAMW = DefaultTarget("torch.optim.AdamW", ("amsgrad", "capturable", "differentiable", "foreach", "fused", "maximize"))


@dataclass(frozen=True)
class Model:
    """Weights by ``name_or_path`` (a folder, a hub id or ``package:<asset>``), or a random model by ``config``.

    ``family`` builds a row of am-models' table of families, for a model that has none or in place of its own.
    """

    name_or_path: Text | None = None
    config: Mapping[str, Any] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    family: Target | None = None

    def __post_init__(self) -> None:
        _require_one_source({"name_or_path": self.name_or_path, "config": self.config})

    def families(self) -> dict[str, Any]:
        """The rows of am-models' tables that the config gives: keyword arguments of `am_models.optimize`."""
        return {} if self.family is None else {"family": self.family.build()}

    def hf_config(self, folder: Path | None) -> PretrainedConfig:
        """The transformers config, from ``folder`` or the inline ``config``, with ``dtype`` set unless it is auto."""
        import torch
        from transformers import AutoConfig

        if folder is None:
            config = AutoConfig.for_model(**(self.config or {}))
        else:
            # Code that comes with weights is never run; left to itself, transformers would ask on the terminal.
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if self.dtype != "auto":
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
            # The parts of a model with several have configs of their own; a part it does without is None.
            for part in (config, *(vars(config)[name] for name in config.sub_configs)):
                if part is not None:
                    part.dtype = dtype
        return config


@dataclass(frozen=True)
class Compose:
    """A new vision-language model: the weights of a language model under a vision tower and projector that are random.

    ``config`` is the transformers config without ``text_config``, which comes from ``language_model``; ``processor``
    builds the processor around the tokenizer, in which ``replace_tokens`` gives unused tokens the names it looks for.
    """

    language_model: Text
    config: Mapping[str, Any]
    processor: Target
    replace_tokens: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as idefics3")


@dataclass(frozen=True)
class VisionModel(Model):
    """`Model`, or a new one by ``compose``; ``vision_family`` is to the vision tower what ``family`` is to the rest."""

    vision_family: Target | None = None
    compose: Compose | None = None

    def families(self) -> dict[str, Any]:
        row = {} if self.vision_family is None else {"vision_family": self.vision_family.build()}
        return super().families() | row

    def __post_init__(self) -> None:
        _require_one_source({"name_or_path": self.name_or_path, "config": self.config, "compose": self.compose})


@dataclass(frozen=True)
class FreezeRule:
    """What to freeze or to train again: exactly one pattern, as `am_peft.freeze` reads it."""

    freeze: Text | None = None
    unfreeze: Text | None = None

    def __post_init__(self) -> None:
        if (self.freeze is None) == (self.unfreeze is None):
            raise ValueError("give exactly one of freeze, unfreeze; the rules of a list apply in order")

    def rule(self) -> dict[str, str]:
        """One rule of `am_peft.freeze`."""
        return {name: pattern for name, pattern in asdict(self).items() if pattern is not None}


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer, where it is not the model's; ``chat_template`` is a Jinja text that replaces its own."""

    name_or_path: Text | None = None
    chat_template: Text | None = None


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one padding-free pack; 0 pads each example instead."""

    packed_sequence_size: NonNegativeInt = 0


@dataclass(frozen=True)
class DataLoader:
    """How rows become batches; ``collate`` replaces the recipe's own: a callable that is given a list of samples."""

    shuffle: bool = True
    prefetch: NonNegativeInt = 1
    drop_last: bool = False
    collate: Target | None = None


@dataclass(frozen=True)
class Peft:
    """The fields of `peft.LoraConfig`, and the dtype the adapter's weights are kept in (None: the model's)."""

    lora: Annotated[Target, Inline(), DefaultTarget("peft.LoraConfig")]
    adapter_dtype: Dtype | None = None

    def lora_config(self) -> LoraConfig:
        return self.lora.build()

    def dtype(self) -> torch.dtype | None:
        return _dtype(self.adapter_dtype)


@dataclass(frozen=True)
class Distributed:
    """How the ranks share the work. ``dp_size`` None: all of them; ``dp_replicate_size`` above 1 is HSDP."""

    strategy: Literal["fsdp2", "ddp"] = "fsdp2"
    dp_size: PositiveInt | None = None
    dp_replicate_size: PositiveInt = 1
    tp_size: OneRank = 1
    cp_size: OneRank = 1
    pp_size: OneRank = 1
    ep_size: OneRank = 1
    activation_checkpointing: Literal["none", "full"] = "none"
    param_dtype: Dtype | None = None
    reduce_dtype: Dtype = "float32"
    timeout_minutes: PositiveInt = 30

    def __post_init__(self) -> None:
        if self.dp_size is not None and self.dp_size % self.dp_replicate_size:
            raise ValueError(
                f"dp_size={self.dp_size} is not a multiple of dp_replicate_size={self.dp_replicate_size}; "
                "dp_size counts all data-parallel ranks, replicas included"
            )

    def sizes(self) -> dict[str, int]:
        """The arguments of `am_mesh.ParallelDims`; a ``dp_shard`` of -1 takes the ranks that are left."""
        shard = -1 if self.dp_size is None else self.dp_size // self.dp_replicate_size
        others = {"cp": self.cp_size, "tp": self.tp_size, "pp": self.pp_size, "ep": self.ep_size}
        return {"dp_replicate": self.dp_replicate_size, "dp_shard": shard} | others

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_mesh.parallelize`."""
        return {
            "strategy": self.strategy,
            "recompute": self.activation_checkpointing,
            "param_dtype": _dtype(self.param_dtype),
            "reduce_dtype": _dtype(self.reduce_dtype),
        }


@dataclass(frozen=True)
class StepScheduler:
    """Batch sizes in samples, intervals in optimizer steps.

    The run ends at whichever of ``max_steps``, ``num_epochs`` and ``max_tokens`` comes first; tokens are counted over
    all ranks, without padding.
    """

    global_batch_size: PositiveInt = 32
    local_batch_size: PositiveInt = 1
    max_steps: PositiveInt | None = None
    num_epochs: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    ckpt_every_steps: PositiveInt | None = 100
    val_every_steps: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"local_batch_size={self.local_batch_size}; change one of them"
            )
        if not any(self.goal().values()):
            raise ValueError(f"set one of {', '.join(self.goal())} or more: the run needs an end")

    def goal(self) -> dict[str, int | None]:
        """How long to train: what decides whether a run is finished, and may grow between two calls of one command."""
        return {
            name: value for name, value in asdict(self).items() if name in ("max_steps", "num_epochs", "max_tokens")
        }


@dataclass(frozen=True)
class BoundedScheduler(StepScheduler):
    """``num_epochs`` is how often the data may be seen: a longer run is refused."""

    num_epochs: PositiveInt = 1


@dataclass(frozen=True)
class ParamGroupOverride:
    """Multipliers for the parameters whose name the regular expression ``pattern`` matches; the first match counts."""

    pattern: Pattern
    lr_mult: NonNegativeFloat = 1.0
    wd_mult: NonNegativeFloat = 1.0


@dataclass(frozen=True)
class AdamW:
    """What AdamW gets beside Muon; None leaves a value to the class, and the weight decay to Muon's."""

    lr: NonNegativeFloat | None = None
    betas: tuple[Fraction, Fraction] | None = None
    eps: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None


@dataclass(frozen=True)
class Optimizer:
    """An optimizer class and what it is given; None leaves a value to the class.

    ``adamw`` is for ``torch.optim.Muon``, which trains hidden matrices alone: what AdamW gets for the other parameters.
    """

    lr: NonNegativeFloat
    target: Annotated[Target, Inline(), _ADAMW]
    betas: tuple[Fraction, Fraction] | None = None
    eps: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    param_group_overrides: tuple[ParamGroupOverride, ...] = ()
    adamw: AdamW | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_recipes.optim.build_optimizer`."""
        options = {"optimizer": self.factory(), "overrides": self.overrides()} | self.hyperparameters()
        if self.adamw is None:
            return options
        return options | {"adamw": {name: value for name, value in asdict(self.adamw).items() if value is not None}}

    def factory(self) -> Callable[..., torch.optim.Optimizer]:
        """The optimizer class (or function) itself."""
        return Target(self.target.path, place=self.target.place, places=self.target.places).callable()

    def named(self) -> dict[str, Any]:
        """The values every optimizer knows by the same name, without those left to the class."""
        values = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return {name: value for name, value in values.items() if value is not None}

    def hyperparameters(self) -> dict[str, Any]:
        """The keyword arguments of `factory`, ``params`` aside."""
        return self.named() | self.target.built_arguments()

    def overrides(self) -> list[dict[str, Any]]:
        """``param_group_overrides`` as `am_recipes.optim.build_optimizer` takes them."""
        return [asdict(override) for override in self.param_group_overrides]


@dataclass(frozen=True)
class LrScheduler:
    """Linear warm-up over ``warmup_steps``, then ``style`` from ``optimizer.lr`` to ``min_lr``, an absolute rate.

    ``decay_steps`` is how many of the last steps of ``wsd`` decay.
    """

    style: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    warmup_steps: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0
    decay_steps: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.decay_steps is not None and self.style != "wsd":
            raise ValueError(f"decay_steps={self.decay_steps} means nothing to style {self.style!r}; it is for wsd")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_recipes.optim.schedule`, ``total_steps`` aside."""
        return asdict(self)


@dataclass(frozen=True)
class ClipGradNorm:
    """The largest global gradient norm; null, here or for the whole section, does not clip."""

    max_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """``resume`` from the latest checkpoint: where there is one (auto), or fail without (must), or never.

    ``asynchronous``: training goes on while a copy of the state is written; the copy takes as much host memory.
    ``layout``: ``direct`` makes ``model/`` of every checkpoint a Hugging Face folder, for ranks of one machine.
    """

    enabled: bool = True
    asynchronous: bool = False
    layout: Literal["sharded", "direct"] = "sharded"
    resume: Literal["auto", "must", "never"] = "auto"
    keep_last: PositiveInt | None = None
    keep_best: PositiveInt | None = None


@dataclass(frozen=True)
class Generate:
    """Sample answers at the end of the run: decoded greedily after a chat prompt; recipe pretrain samples."""

    prompts: tuple[Text, ...] = ()
    max_new_tokens: PositiveInt = 64


@dataclass(frozen=True)
class GenerateFromRows:
    """Answers to the first ``num_rows`` held-out rows at the end of the run, decoded greedily."""

    num_rows: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 16


@dataclass(frozen=True)
class AdapterExport:
    """The Hugging Face folder written at the end; ``merge_adapter`` folds a LoRA adapter into the weights first."""

    enabled: bool = True
    merge_adapter: bool = False


@dataclass(frozen=True)
class Router:
    """Losses that keep the experts of a mixture evenly used: coefficients per token, 0 leaves a loss out.

    `balance_loss` null is 0, but for a model whose own config asks for transformers' auxiliary loss: then say it.
    """

    balance_loss: NonNegativeFloat | None = None
    z_loss: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Processor:
    """The processor, where it is not the model's; ``chat_template`` is a Jinja text that replaces its own."""

    name_or_path: Text | None = None
    chat_template: Text | None = None


def _require_one_source(sources: Mapping[str, Any]) -> None:
    """Where the weights of a model come from: exactly one of ``sources``, and ``config`` with a model_type."""
    if sum(source is not None for source in sources.values()) != 1:
        raise ValueError(f"give exactly one of {', '.join(sources)}: where the weights come from")
    config = sources["config"]
    if config is not None and not isinstance(config.get("model_type"), str):
        raise ValueError("config needs a model_type, such as llama")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
