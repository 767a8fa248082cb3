"""``python -m mdt_fast`` is ``mdt-fast``."""

import sys

from .cli import main

sys.exit(main())
