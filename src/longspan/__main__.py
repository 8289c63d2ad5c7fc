"""`python -m longspan`: the same as the command `longspan`."""

from __future__ import annotations

import sys

from longspan.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
