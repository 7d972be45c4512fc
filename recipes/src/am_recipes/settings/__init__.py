"""Typed settings from a YAML file, command-line overrides and the environment.

An engine that names no recipe and no section: `load` gives a tree of values that know where they stand, `override` and
`resolve` change it, `read_section` turns it into a frozen dataclass, `plain`, `written` and `dump` turn that into YAML
again. A `Target` is a callable with its arguments. Imports neither torch nor anything a file names.
"""

from __future__ import annotations

from am_recipes.settings.references import references, resolve, rewritten, variable
from am_recipes.settings.saved import command_line, fingerprints, leaves, replaced, written
from am_recipes.settings.schema import AsWritten, Check, Inline, NumberAsText, Prefixed, plain, read, read_section
from am_recipes.settings.secrets import in_clear, is_secret, without_secrets
from am_recipes.settings.target import ArgumentError, Call, Checked, DefaultTarget, Target, checked
from am_recipes.settings.yaml import (
    ConfigError,
    Node,
    Place,
    UnusableError,
    did_you_mean,
    dump,
    first_name,
    inline,
    load,
    nearest,
    override,
    unusable,
    walk,
    with_folder,
)

__all__ = [
    "ArgumentError",
    "AsWritten",
    "Call",
    "Check",
    "Checked",
    "ConfigError",
    "DefaultTarget",
    "Inline",
    "Node",
    "NumberAsText",
    "Place",
    "Prefixed",
    "Target",
    "UnusableError",
    "checked",
    "command_line",
    "did_you_mean",
    "dump",
    "fingerprints",
    "first_name",
    "in_clear",
    "inline",
    "is_secret",
    "leaves",
    "load",
    "nearest",
    "override",
    "plain",
    "read",
    "read_section",
    "references",
    "replaced",
    "resolve",
    "rewritten",
    "unusable",
    "variable",
    "walk",
    "with_folder",
    "without_secrets",
    "written",
]
