"""`python -m opensora_perflow` is `opensora-perflow`."""

import sys

from opensora_perflow.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
