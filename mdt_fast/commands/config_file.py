"""A run's settings in a YAML file: any of the sections that ``--dry-run`` prints, overriding a preset."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig, as_saved, from_dict, to_dict
from ..errors import UserError, nearest, one_line

INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$")


class Loader(yaml.SafeLoader):
    """Plain data only, with JSON's numbers: YAML 1.1 reads ``1e-4`` as a string, ``1:30`` as 90 and ``010``
    as 8."""


Loader.yaml_implicit_resolvers = {  # no dates, and no base-60 or octal numbers: 1:30 is a string
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


class Dumper(yaml.SafeDumper):
    """Quotes the strings that :class:`Loader` would read as something else."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def read_config_file(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The preset that the file names with ``preset:``, if any, and the settings by section. ``UserError``
    names the file and the problem: not YAML, an unknown key (with the nearest one), a section that is not a
    table. Values are checked later."""
    try:
        values = yaml.load(path.read_text(), Loader)
    except OSError as error:
        raise UserError(f"--config: cannot read {str(path)!r}: {error.strerror}") from None
    except Exception as error:  # invalid numbers and dates, tags, and more
        raise UserError(f"--config: {path}: not YAML: {one_line(error)}") from None
    if values is None:
        return None, {}
    if not isinstance(values, dict):
        raise UserError(f"--config: {path}: got {type(values).__name__}, expected sections of settings")
    preset = values.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise UserError(f"--config: {path}: preset: got {preset!r}, expected a name")
    known = to_dict(RunConfig())
    for section, settings in values.items():
        if section not in known:
            hint = nearest(section, [*known, "preset"])
            raise UserError(
                f"--config: {path}: unknown section {section!r}{hint}; allowed: preset, {', '.join(known)}"
            )
        if not isinstance(settings, dict):
            raise UserError(f"--config: {path}: {section}: got {settings!r}, expected settings")
        for key in settings:
            if key not in known[section]:
                hint, allowed = nearest(key, known[section]), ", ".join(known[section])
                raise UserError(f"--config: {path}: {section}: unknown key {key!r}{hint}; allowed: {allowed}")
    return preset, values


def read_saved_config(path: Path) -> RunConfig:
    """Read a run's ``config.json``."""
    try:
        values = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: truncated or edited, it is not JSON") from None
    return from_dict(RunConfig, as_saved(values), str(path))


def as_yaml(config: RunConfig) -> str:
    """All settings, as ``--config`` reads them."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False)
