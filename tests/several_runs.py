"""Several command lines, one after the other in one launch: ``torchrun several_runs.py JSON``."""

import json
import os
import sys

from mdt_fast.cli import main

if __name__ == "__main__":
    codes = []
    for number, arguments in enumerate(json.loads(sys.argv[1])):
        # Each run gets its own part of torchrun's store for rendezvous, as after a restart.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        codes.append(main(arguments))
    sys.exit(max(codes))
