"""`python -m megatron_r1.cli`, as launchers start it."""

from __future__ import annotations

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main())
