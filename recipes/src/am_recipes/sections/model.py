"""Sections about the model: its weights, what trains of it, what reads its rows, what is written at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from am_recipes.sections.kinds import Dtype, NonNegativeFloat, Source, Text, torch_dtype
from am_recipes.settings import Call, DefaultTarget, Inline, Target

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Model:
    """A model: weights by name_or_path, or random ones by config."""

    name_or_path: Source | None = None
    """Where the weights are: a folder, a Hub id, or a target that returns a folder."""
    config: Mapping[str, Any] | None = None
    """A transformers config, with its model_type: the model then starts from random weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is what the model's own config says, with float32 for what trains of half precision."""
    family: Target | None = None
    """Builds an am_models.Family: for a model that am-models does not know, or in place of what it knows."""

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give exactly one of name_or_path, config: where the weights come from")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama")

    def families(self) -> dict[str, Any]:
        """The rows of am-models' tables that the config gives: keyword arguments of `am_models.optimize`."""
        return {} if self.family is None else {"family": self.family.build()}

    def calls(self, key: str) -> Iterator[Call]:
        """The targets of the section, which stands at `key`."""
        if isinstance(self.name_or_path, Target):
            yield Call(f"{key}.name_or_path", self.name_or_path)
        if self.family is not None:
            yield Call(f"{key}.family", self.family)

    def hf_config(self, folder: Path | None) -> PretrainedConfig:
        """The transformers config, from `folder` or the inline `config`, with `dtype` set unless it is auto."""
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
class VisionModel(Model):
    """A model with a vision tower: weights by name_or_path, or random ones by config."""

    vision_family: Target | None = None
    """Builds an am_models.VisionFamily: for a vision tower that am-models does not know, or in place of its own."""

    def families(self) -> dict[str, Any]:
        row = {} if self.vision_family is None else {"vision_family": self.vision_family.build()}
        return super().families() | row

    def calls(self, key: str) -> Iterator[Call]:
        yield from super().calls(key)
        if self.vision_family is not None:
            yield Call(f"{key}.vision_family", self.vision_family)


@dataclass(frozen=True)
class Reader:
    """What reads the rows, where it is not the model's own."""

    name_or_path: Source | None = None
    """Where it is: a folder, a Hub id, or a target that returns a folder; null: the model's."""
    chat_template: Text | None = None
    """Replaces its own: chatml, gemma, llama3, phi3, zephyr, the path of a .jinja file, or Jinja text."""

    def calls(self, key: str) -> Iterator[Call]:
        """The targets of the section, which stands at `key`."""
        if isinstance(self.name_or_path, Target):
            yield Call(f"{key}.name_or_path", self.name_or_path)


@dataclass(frozen=True)
class Tokenizer(Reader):
    """The tokenizer, where it is not the model's own."""


@dataclass(frozen=True)
class Processor(Reader):
    """The processor of text and images, where it is not the model's own."""


@dataclass(frozen=True)
class FreezeRule:
    """What to freeze or to train again: exactly one pattern; the rules apply in order."""

    freeze: Text | None = None
    """Parameters or modules to freeze: a name, or a pattern with *."""
    unfreeze: Text | None = None
    """Parameters or modules to train after all."""

    def __post_init__(self) -> None:
        if (self.freeze is None) == (self.unfreeze is None):
            raise ValueError("give exactly one of freeze, unfreeze; the rules of a list apply in order")

    def rule(self) -> dict[str, str]:
        """One rule of `am_peft.freeze`."""
        return {name: pattern for name, pattern in asdict(self).items() if pattern is not None}


@dataclass(frozen=True)
class Peft:
    """LoRA: the fields of peft.LoraConfig, and the dtype of the adapter."""

    lora: Annotated[Target, Inline(), DefaultTarget("peft.LoraConfig")]
    """The fields of peft.LoraConfig, such as r, lora_alpha, target_modules; one without meaning here is refused."""
    adapter_dtype: Dtype | None = None
    """What the adapter and modules_to_save are kept in; null: float32."""

    def lora_config(self, task_type: str | None) -> LoraConfig:
        """The configuration, of this `task_type` where it names none itself."""
        built: LoraConfig = self.lora.build()
        built.task_type = built.task_type or task_type
        return built

    def dtype(self) -> torch.dtype | None:
        return torch_dtype(self.adapter_dtype)


@dataclass(frozen=True)
class Router:
    """Losses that keep the experts of a mixture evenly used."""

    balance_loss: NonNegativeFloat | None = None
    """Coefficient per token; null is 0, but for a model whose config asks for transformers' own: then say it."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient per token of the squared log-partition of the router; 0 leaves it out."""


@dataclass(frozen=True)
class AdapterExport:
    """The Hugging Face folder written at the end."""

    enabled: bool = True
    """Whether to write it."""
    merge_adapter: bool = False
    """Fold a LoRA adapter into the weights; false exports the adapter alone."""
    which: Literal["best", "last"] = "last"
    """The weights after the last step, or those of the lowest loss of the first validation set."""
