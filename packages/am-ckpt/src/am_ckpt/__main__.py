"""`python -m am_ckpt`: the command `am-ckpt`."""

import sys

from am_ckpt._cli import main

if __name__ == "__main__":
    sys.exit(main())
