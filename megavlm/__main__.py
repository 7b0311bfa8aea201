"""`python -m megavlm`."""

import os
import sys

from megavlm.cli.main import main

if __name__ == "__main__":  # worker processes that are spawned import this file again
    code = main()
    if code and "RANK" in os.environ:
        # A rank of a job that failed: gloo's threads may still wait for peers in a collective, and the process would
        # abort ("terminate called") while the interpreter takes them down. Everything is closed and said by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
