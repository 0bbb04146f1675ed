"""`python -m modeling_keye` is the `keye` command."""

import sys

from .cli_keye import main

if __name__ == "__main__":
    sys.exit(main())
