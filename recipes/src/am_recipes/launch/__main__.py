"""`python -m am_recipes.launch PROCESSES MODULE|FILE.py [ARGUMENT ...]`, see `am_recipes.launch.local`."""

from am_recipes.launch.local import main

raise SystemExit(main())
