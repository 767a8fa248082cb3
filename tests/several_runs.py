"""Several command lines, one after the other in one launch: ``torchrun several_runs.py JSON``."""

import json
import sys

from mdt_fast.cli import main

if __name__ == "__main__":
    codes = []
    for arguments in json.loads(sys.argv[1]):
        codes.append(main(arguments))
    sys.exit(max(codes))
