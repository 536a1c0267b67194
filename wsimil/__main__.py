"""`python -m wsimil` is the command `wsimil`."""

from __future__ import annotations

import sys

from wsimil.cli import main

if __name__ == "__main__":
    sys.exit(main())
