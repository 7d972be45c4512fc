"""transformers' Auto classes with our kernels inside: same arguments, same returned class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from am_models._optimize import optimize


class AutoModelForCausalLM:
    """`transformers.AutoModelForCausalLM` whose models went through :func:`am_models.optimize`. Never instantiated."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        kernels: str | Mapping[str, Any] = "auto",
        **kwargs: Any,
    ) -> Any:
        """Load a model; arguments, errors and returned class are transformers', `kernels` is :func:`optimize`'s.

        Also returns what transformers returns beside the model (`output_loading_info=True`: a tuple).
        """
        import transformers

        loaded = transformers.AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        optimize(loaded[0] if isinstance(loaded, tuple) else loaded, kernels=kernels)
        return loaded

    @staticmethod
    def from_config(config: Any, *, kernels: str | Mapping[str, Any] = "auto", **kwargs: Any) -> nn.Module:
        """Build a model with fresh weights (or on the meta device inside `with torch.device("meta")`), optimised."""
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(config, **kwargs)
        optimize(model, kernels=kernels)
        return model
