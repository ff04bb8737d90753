"""`python -m smartbatch_lightning`, the same as `smartbatch`."""

import sys

from smartbatch_lightning.cli import main

sys.argv[0] = "smartbatch"  # the name shown in help and error messages
main()
