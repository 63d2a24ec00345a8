"""`python -m opensora_perflow` is `opensora-perflow`."""

import sys

from opensora_perflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
