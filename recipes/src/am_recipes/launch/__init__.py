"""Starting a run: on this machine, on several, or through a scheduler that is told what to start.

`local` runs ranks through torchrun. A scheduler turns a `Job` into files and a command of its own; what it starts on
each machine is `local` again. The table of schedulers (`RunConfig.launchers`) is closed on purpose: each has a section
of the config whose keys are checked by name, so that one more is a field of `RunConfig`, not a row of a user's. What is
written by hand for another one starts the command of docs/several-nodes.md on each machine.
"""

from __future__ import annotations

from am_recipes.launch.local import as_worker, run, torchrun_arguments, worst_status
from am_recipes.launch.nodes import PREEMPTED, Nodes, is_whole
from am_recipes.launch.nodes import parse as parse_nodes

__all__ = ["PREEMPTED", "Nodes", "as_worker", "is_whole", "parse_nodes", "run", "torchrun_arguments", "worst_status"]
