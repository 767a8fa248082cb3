"""Feature networks: by name, by path of a program, or as a user's function.

A network takes uint8 [B, C, H, W], 0 to 255, and returns one of

- ``pooled`` [B, D],
- ``(pooled, spatial)``, spatial [B, K, h, w],
- a dictionary of ``pooled`` and any of ``spatial``, ``logits`` [B, K], ``probabilities`` [B, K].
"""

import hashlib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest, one_line
from .inception import INCEPTION, load_inception

NAMES = (INCEPTION,)
PROGRAMS = (".pt", ".pth", ".ts", ".pt2")
SUM_OFF = 1e-2  # allowed deviation from 1 of the sum of a row of probabilities, in half precision


@dataclass(frozen=True)
class Outputs:
    """A network's outputs for B images: ``pooled`` [B, D] and, if it has them, ``spatial`` [B, K, h, w] and
    ``probabilities`` [B, K] (non-negative, rows sum to 1)."""

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """``name`` identifies the network and its weights: features are comparable only if it is the same."""

    name: str
    network: Callable[[Tensor], Any]
    given: str  # as the user specified it

    def __call__(self, images_BCHW: Tensor) -> Outputs:
        """Raises ``UserError`` if the network fails, or returns something other than it should. On a GPU,
        convolutions and products run without TF32, as published values were computed without it."""
        with _whole_float32(images_BCHW.is_cuda):
            return self._called(images_BCHW)

    def _called(self, images_BCHW: Tensor) -> Outputs:
        try:
            with torch.no_grad():
                return self._read(self.network(images_BCHW), len(images_BCHW))
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # raised by a user's program
            reason = one_line(error)
            raise UserError(
                f"features: {self.given!r} failed on uint8 {list(images_BCHW.shape)}: {reason}"
            ) from error

    def _read(self, returned: Any, count: int) -> Outputs:
        if isinstance(returned, Tensor):
            named: dict[str, Any] = {"pooled": returned}
        elif isinstance(returned, tuple | list) and len(returned) == 2:
            named = dict(zip(("pooled", "spatial"), returned))
        elif isinstance(returned, Mapping) and "pooled" in returned:
            named = dict(returned)
        else:
            raise UserError(
                f"features: {self.given!r} returned {type(returned).__name__}; pooled [B, D], (pooled, "
                "spatial), or a dictionary with 'pooled' and any of 'spatial', 'logits', 'probabilities' is "
                "needed"
            )
        for name, ndim in (("pooled", 2), ("spatial", 4), ("logits", 2), ("probabilities", 2)):
            value = named.get(name)
            if value is None and name != "pooled":
                continue
            if not isinstance(value, Tensor) or value.ndim != ndim or len(value) != count or 0 in value.shape:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"features: {self.given!r} returned {name} {shape}; {ndim} dimensions, the first of "
                    f"them {count}, are needed, and none empty"
                )
        probabilities = named.get("probabilities")
        if named.get("logits") is not None:
            probabilities = named["logits"].double().softmax(1).float()
        elif probabilities is not None and probabilities.isfinite().all():
            sums = probabilities.double().sum(1)
            if (probabilities < 0).any() or ((sums - 1).abs() > SUM_OFF).any():
                raise UserError(
                    f"features: {self.given!r} returned probabilities that are below 0 or do not sum to 1; "
                    "return values before the softmax as 'logits'"
                )
        return Outputs(named["pooled"], named.get("spatial"), probabilities)


@contextmanager
def _whole_float32(on_a_gpu: bool) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn  # its stubs lack `conv`
    backends = (cudnn.conv, torch.backends.cuda.matmul) if on_a_gpu else ()
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def open_extractor(
    given: str, *, device: torch.device | str = "cpu", weights: str | None = None, trust: bool = False
) -> Extractor:
    """Open the network that ``given`` names, on ``device`` and in eval mode.

    ``inception-v3-compat``: torch-fidelity's Inception, with ``weights`` as its local file. A path: a
    TorchScript or ``torch.export`` program; loading it runs code from the file, so ``trust`` must permit
    that. ``module:name``: a function, a module or a module class that Python can import, also from the
    current folder. Nothing is ever downloaded. Raises ``UserError``.
    """
    if weights is not None and given not in NAMES:
        raise UserError(f"weights: is for {INCEPTION} only; {given!r} brings its own")
    if given == INCEPTION:
        identity, network = load_inception(weights)
        return Extractor(identity, network.to(device), given)
    if Path(given).suffix in PROGRAMS or Path(given).is_file():
        return _open_program(given, device, trust)
    if ":" in given:
        return _open_function(given, device)
    raise UserError(
        f"features: got {given!r}{nearest(given, NAMES)}, expected {', '.join(NAMES)}, a TorchScript "
        "or torch.export file, or module:function"
    )


def _open_program(given: str, device: torch.device | str, trust: bool) -> Extractor:
    path = Path(given)
    if not path.is_file():
        raise UserError(f"features: no file {given!r}")
    if not trust:
        raise UserError(
            f"features: {given!r} is a program, and reading it can run anything; if you know where it "
            "comes from, add --trust-features"
        )
    with open(path, "rb") as file:
        identity = f"program sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated, but its files remain
            if path.suffix == ".pt2":
                network: Any = torch.export.load(path).module().to(device)
            else:
                network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        raise UserError(
            f"features: {given!r} is neither a TorchScript nor a torch.export program: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from None
    if "return_features" in _argument_names(network):
        network = TorchScriptInception(network)
    return Extractor(identity, network, given)


class TorchScriptInception:
    """NVIDIA's ``inception-2015-12-05.pt``, and programs with its conventions: ``return_features=True`` for
    features, ``no_output_bias=True`` for probabilities without the last bias. Grey becomes RGB."""

    def __init__(self, program: Any):
        self.program = program

    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        images = images_BCHW.expand(-1, 3, -1, -1)
        found = {"pooled": self.program(images, return_features=True)}
        if "no_output_bias" in _argument_names(self.program):
            found["probabilities"] = self.program(images, no_output_bias=True)
        return found


def _argument_names(program: Any) -> list[str]:
    schema = getattr(getattr(program, "forward", None), "schema", None)
    return [argument.name for argument in schema.arguments] if schema is not None else []


def _open_function(given: str, device: torch.device | str) -> Extractor:
    module_name, _, name = given.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"features: cannot import {module_name!r}: {reason}") from error
    if not hasattr(module, name):
        raise UserError(f"features: {module_name!r} has no {name!r}{nearest(name, dir(module))}")
    found = getattr(module, name)
    try:
        if inspect.isclass(found):
            found = found()
        if isinstance(found, nn.Module):
            found = found.to(device).eval()
    except Exception as error:
        raise UserError(f"features: cannot make {given!r}: {one_line(error)}") from error
    if not callable(found):
        raise UserError(
            f"features: {given!r} is {type(found).__name__}; a function or a torch.nn.Module is needed"
        )
    file = getattr(module, "__file__", None)
    source = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else "unknown"
    return Extractor(f"{given} sha256:{source}{_weights_digest(found)}", found, given)


def _weights_digest(network: Any) -> str:
    """Distinguishes two modules from the same source file with different weights."""
    if not isinstance(network, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not isinstance(tensor, Tensor):  # extra state
            digest.update(f"{name} {type(tensor).__name__}\n".encode())
            continue
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return f" weights sha256:{digest.hexdigest()[:16]}"
