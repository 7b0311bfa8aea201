"""`python -m megavlm`."""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":  # worker processes that are spawned import this file again
    sys.exit(main())
