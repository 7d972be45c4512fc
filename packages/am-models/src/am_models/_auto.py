"""transformers' Auto classes with our kernels inside: same arguments, same returned class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from am_models._optimize import optimize

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` whose models went through `optimize`. Never instantiated.

    A configuration with a vision tower is a ValueError: transformers would refuse some and build others without it.
    """

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        kernels: str | Mapping[str, Any] = "auto",
        **kwargs: Any,
    ) -> Any:
        """Load a model; arguments, errors and returned class are transformers', `kernels` is `optimize`'s.

        Also returns what transformers returns beside the model (`output_loading_info=True`: a tuple).
        """
        return _from_pretrained("AutoModelForCausalLM", pretrained_model_name_or_path, model_args, kernels, kwargs)

    @staticmethod
    def from_config(config: Any, *, kernels: str | Mapping[str, Any] = "auto", **kwargs: Any) -> nn.Module:
        """Build a model with fresh weights (or on the meta device inside `with torch.device("meta")`), optimised."""
        return _from_config("AutoModelForCausalLM", config, kernels, kwargs)


class AutoModelForImageTextToText:
    """`transformers.AutoModelForImageTextToText`, its models optimised as `optimize` says.

    The language model gets the kernels of its family, the vision tower stays stock. A text-only configuration is a
    ValueError.
    """

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        kernels: str | Mapping[str, Any] = "auto",
        **kwargs: Any,
    ) -> Any:
        """As `AutoModelForCausalLM.from_pretrained`."""
        auto_class = "AutoModelForImageTextToText"
        return _from_pretrained(auto_class, pretrained_model_name_or_path, model_args, kernels, kwargs)

    @staticmethod
    def from_config(config: Any, *, kernels: str | Mapping[str, Any] = "auto", **kwargs: Any) -> nn.Module:
        """As `AutoModelForCausalLM.from_config`."""
        return _from_config("AutoModelForImageTextToText", config, kernels, kwargs)


def _from_pretrained(
    auto_class: str,
    path: str | os.PathLike[str],
    model_args: tuple[Any, ...],
    kernels: str | Mapping[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    import transformers

    config = kwargs.get("config")
    if not isinstance(config, transformers.PreTrainedConfig):
        config = _read_config(path if config is None else config, kwargs)
    if config is not None:
        _check_modality(config, auto_class)
    loaded = getattr(transformers, auto_class).from_pretrained(path, *model_args, **kwargs)
    optimize(loaded[0] if isinstance(loaded, tuple) else loaded, kernels=kernels)
    return loaded


def _from_config(auto_class: str, config: Any, kernels: str | Mapping[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    import transformers

    _check_modality(config, auto_class)
    model = getattr(transformers, auto_class).from_config(config, **kwargs)
    optimize(model, kernels=kernels)
    return model


def _read_config(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Any:
    """The configuration in `path`; None where there is none: an adapter's folder names its base model elsewhere."""
    from transformers import AutoConfig

    arguments = {name: kwargs[name] for name in (*_HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    try:
        return AutoConfig.from_pretrained(path, **arguments)
    except OSError:
        return None


def _check_modality(config: Any, auto_class: str) -> None:
    """Refuse a model with images as a text model and the reverse; what transformers does not know is its business."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if takes_images and auto_class == "AutoModelForCausalLM":
        raise ValueError(
            f"{config.model_type} ({type(config).__name__}) is a model of images and text, not of text alone; "
            "use AutoModelForImageTextToText, or give config.get_text_config() to from_config for its language model "
            "alone"
        )
    if not takes_images and auto_class != "AutoModelForCausalLM" and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type} ({type(config).__name__}) is a text-only model without a vision tower; use "
            "AutoModelForCausalLM, or a model of images and text such as idefics3, llava or qwen3_vl"
        )
