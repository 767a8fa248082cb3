"""Run an unchanged script of the official checkout with the fast models.

``python -m mdt_fast.official scripts/image_train.py --data_dir ...`` (or ``torchrun ... -m
mdt_fast.official ...``) calls :func:`mdt_fast.install`, then runs the script as ``__main__``. Its own imports
(including its package ``masked_diffusion``) must be importable, as without mdt_fast.
"""

import runpy
import sys
from pathlib import Path

from .errors import UserError
from .models import install


def main() -> int:
    """The command line: the script's path, then its own arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m mdt_fast.official SCRIPT.py [its arguments]")
        return 2 if len(sys.argv) < 2 else 0
    script = Path(sys.argv[1])
    try:
        if not script.is_file():
            raise UserError(f"{script}: no such script")
        sys.path[0] = str(script.parent.resolve())
        install()
    except UserError as error:
        print(f"mdt_fast.official: error: {error}", file=sys.stderr)
        return 2
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
