"""Where the packages lie; everything else is in ``pyproject.toml``.

The kernel rooms stand at the top of the repository and are installed as ``mdt_fast.kernels``: a
top-level package called ``kernels`` would collide with a published one.
"""

import setuptools
from setuptools import find_packages, setup

# Only `pip install --no-build-isolation` can meet an old one; it would fail on the licence field.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"mdt-fast is built with setuptools 77 or later, found {setuptools.__version__}: "
        "pip install --upgrade 'setuptools>=77'"
    )

packages = find_packages(include=["mdt_fast", "mdt_fast.*"])
rooms = ["mdt_fast.kernels"] + [f"mdt_fast.kernels.{room}" for room in find_packages("kernels")]

setup(
    packages=packages + rooms,
    package_dir={"mdt_fast": "mdt_fast", "mdt_fast.kernels": "kernels"},
    package_data={"mdt_fast": ["py.typed"], **{room: ["README.md"] for room in rooms}},
)
