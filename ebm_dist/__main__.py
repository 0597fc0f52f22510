"""`python -m ebm_dist` is `ebm-dist`."""

from __future__ import annotations

import sys

from ebm_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
