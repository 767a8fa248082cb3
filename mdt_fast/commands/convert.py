"""``mdt-fast convert``."""

import argparse
from pathlib import Path
from typing import Any

from ..config import to_dict
from ..errors import UserError
from ..models.convert import read_weights, write_weights
from ..sampling import check_writable
from ..training.run import open_or_advise
from ..training.states import whole_state


def convert(args: argparse.Namespace) -> int:
    source, target = Path(args.source), Path(args.target)
    metadata: dict[str, Any] = {}
    if source.is_file() and target.exists() and source.samefile(target):
        raise UserError(f"convert: {str(source)!r} and {str(target)!r} are the same file")
    check_writable(target)
    if source.is_file():
        state = read_weights(source)
    else:
        opened = open_or_advise(source, [args.weights], "mdt-fast convert {}")
        state = whole_state(opened, args.weights)
        metadata = {"model": to_dict(opened.config.model), "step": opened.step, "weights": args.weights}
    write_weights(target, state, **metadata)
    print(f"{len(state)} tensors in {target}")
    return 0
