"""`python -m tokensel`, as torchrun starts it: the command line."""

import sys

from tokensel.cli import main

sys.exit(main())
