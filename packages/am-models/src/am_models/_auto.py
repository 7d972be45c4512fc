"""transformers' Auto classes with our kernels inside: same arguments, same returned class."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from am_models._families import Family, VisionFamily
from am_models._optimize import optimize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` whose models went through `optimize`. Never instantiated.

    A configuration with a vision tower is a ValueError: transformers would refuse some and build others without it.
    """

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        kernels: str | Mapping[str, str | bool] = "auto",
        family: Family | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a model; arguments, errors and returned class are transformers', `kernels` and `family` `optimize`'s.

        Also returns what transformers returns beside the model (`output_loading_info=True`: a tuple).
        """
        loaded = _from_pretrained("AutoModelForCausalLM", pretrained_model_name_or_path, model_args, kwargs)
        optimize(loaded[0] if isinstance(loaded, tuple) else loaded, kernels=kernels, family=family)
        # As transformers annotates it, which leaves the tuple out too.
        return cast("PreTrainedModel", loaded)

    @staticmethod
    def from_config(
        config: PreTrainedConfig,
        *,
        kernels: str | Mapping[str, str | bool] = "auto",
        family: Family | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Build a model with fresh weights (or on the meta device inside `with torch.device("meta")`), optimised."""
        model = _from_config("AutoModelForCausalLM", config, kwargs)
        optimize(model, kernels=kernels, family=family)
        return model


class AutoModelForImageTextToText:
    """`transformers.AutoModelForImageTextToText`, its models optimised as `optimize` says.

    The language model gets the kernels of its family, the vision tower stays stock. A text-only configuration is a
    ValueError.
    """

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        kernels: str | Mapping[str, str | bool] = "auto",
        family: Family | None = None,
        vision_family: VisionFamily | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """As `AutoModelForCausalLM.from_pretrained`."""
        loaded = _from_pretrained("AutoModelForImageTextToText", pretrained_model_name_or_path, model_args, kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        optimize(model, kernels=kernels, family=family, vision_family=vision_family)
        return cast("PreTrainedModel", loaded)  # As above.

    @staticmethod
    def from_config(
        config: PreTrainedConfig,
        *,
        kernels: str | Mapping[str, str | bool] = "auto",
        family: Family | None = None,
        vision_family: VisionFamily | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """As `AutoModelForCausalLM.from_config`."""
        model = _from_config("AutoModelForImageTextToText", config, kwargs)
        optimize(model, kernels=kernels, family=family, vision_family=vision_family)
        return model


def _from_pretrained(
    auto_class: str, path: str | os.PathLike[str], model_args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    import transformers

    config = kwargs.get("config")
    if not isinstance(config, transformers.PreTrainedConfig):
        config = _read_config(path if config is None else config, kwargs)
    if config is not None:
        _check_config(config, auto_class)
    return getattr(transformers, auto_class).from_pretrained(path, *model_args, **kwargs)


def _from_config(auto_class: str, config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    import transformers

    _check_config(config, auto_class)
    return getattr(transformers, auto_class).from_config(config, **kwargs)


def _read_config(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The configuration in `path`; None where there is none: an adapter's folder names its base model elsewhere."""
    from transformers import AutoConfig

    arguments = {name: kwargs[name] for name in (*_HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    try:
        return AutoConfig.from_pretrained(path, **arguments)
    except OSError:
        return None


def _check_config(config: PreTrainedConfig, auto_class: str) -> None:
    """Refuse a model with images as a text model, the reverse, and activations that do not exist.

    What transformers does not know is its own business.
    """
    from transformers.activations import ACT2FN
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
    if not takes_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    text = config.get_text_config().to_dict()
    for key in ("hidden_act", "hidden_activation"):
        if isinstance(text.get(key), str) and text[key] not in ACT2FN:
            nearest = difflib.get_close_matches(text[key], list(ACT2FN), n=3, cutoff=0.4)
            raise ValueError(
                f"{config.model_type}: {key}={text[key]!r} is no activation of transformers; choose among "
                f"{', '.join(nearest or sorted(ACT2FN))}"
            )
