"""`python -m vitslim` is the `vitslim` command."""

import sys

from .cli import main

sys.exit(main())
