"""Features of a set of images: compute them, write them to a file, read them again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import aside
from ..models.convert import full_disk_named
from .extractors import Extractor
from .moments import Moments, MomentSum
from .sources import Images

FORMAT = "mdt_fast features 1"
SPATIAL_CHANNELS = 7  # as ADM: the first 7 of mixed_6/conv, 17x17: 2023 values, about as many as pooled ones


@dataclass(frozen=True)
class Features:
    """A network's features of a set of images; parts that a file or network does not provide are None.

    ``pooled`` [N, D] and ``probabilities`` [N, K] are float32, ``moments`` are those of the pooled features
    and ``spatial`` those of the flattened spatial ones. ``extractor`` is the network's identity, "" if a file
    does not give it.
    """

    name: str
    extractor: str
    count: int | None
    shape: tuple[int, int, int] | None = None
    pooled: Tensor | None = None
    moments: Moments | None = None
    spatial: Moments | None = None
    probabilities: Tensor | None = None


def extract(
    images: Images,
    extractor: Extractor,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    what: str = "SAMPLES",
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """Run the network over all images. Pooled features stay in memory (50,000 x 2048: 0.4 GB), spatial ones
    do not. The last batch is padded with its last image, so a program with a fixed batch size works too.

    Raises ``UserError`` for fewer than 2 images and for features that are not finite.
    """
    if images.count < 2:
        raise UserError(f"{what}: at least 2 images are needed, {images.name!r} has {images.count}")
    pooled, probabilities = [], []
    moments, spatial = MomentSum(), MomentSum()
    done = 0
    for batch in images.batches(batch_size):
        pixels = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2)
        filled = torch.cat([pixels, pixels[-1:].expand(batch_size - len(pixels), -1, -1, -1)])
        outputs = extractor(filled.contiguous().to(device))
        features = outputs.pooled[: len(batch)].float()
        finite = features.isfinite().all(1)
        if outputs.spatial is not None:
            part = outputs.spatial[: len(batch), :SPATIAL_CHANNELS].float()
            part = part.permute(0, 2, 3, 1).flatten(1)  # channels last, the order of ADM's mu_s
            finite &= part.isfinite().all(1)
            spatial.add(part)
        if outputs.probabilities is not None:
            probabilities.append(_copied(outputs.probabilities[: len(batch)]))
            finite &= probabilities[-1].isfinite().all(1).to(finite.device)
        if not finite.all():
            bad = images.label(done + int((~finite).nonzero()[0]))
            raise UserError(f"{what}: the features of {bad} in {images.name!r} are not finite")
        moments.add(features)
        pooled.append(_copied(features))
        done += len(batch)
        if on_batch:
            on_batch(done)
    return Features(
        images.name, extractor.name, done, images.shape, torch.cat(pooled), moments.result(),
        spatial.result() if spatial.count else None, torch.cat(probabilities) if probabilities else None,
    )  # fmt: skip


def _copied(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU: a network may overwrite its output at the next call."""
    return tensor.to("cpu", torch.float32, copy=True)


def save_features(path: Path, features: Features) -> None:
    """Write a ``.safetensors`` file for ``load_features``; reading it executes no code."""
    assert features.pooled is not None
    assert features.moments is not None
    tensors = {
        "pooled": features.pooled,
        "mean": features.moments.mean,
        "covariance": features.moments.covariance,
    }
    if features.spatial is not None:
        tensors |= {"spatial_mean": features.spatial.mean, "spatial_covariance": features.spatial.covariance}
    if features.probabilities is not None:
        tensors["probabilities"] = features.probabilities
    about = {"extractor": features.extractor, "images": features.name, "shape": features.shape}
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    with full_disk_named(path), aside(path) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def load_features(path: Path, what: str) -> Features:
    """Read a file written by ``save_features``. ``UserError``, beginning with ``what``, for any other."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{what}: {str(path)!r} is not a file that --save-features wrote")
            about = json.loads(metadata["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        pooled, probabilities = tensors["pooled"], tensors.get("probabilities")
        count, dim = pooled.shape
        loaded = Moments(tensors["mean"], tensors["covariance"], count)
        spatial = None
        if "spatial_mean" in tensors:
            spatial = Moments(tensors["spatial_mean"], tensors["spatial_covariance"], count)
        shape = tuple(about["shape"]) if about["shape"] else None
        consistent = loaded.dim == dim and (probabilities is None or len(probabilities) == count)
        for part in filter(None, (loaded, spatial)):
            consistent &= part.covariance.shape == (part.dim, part.dim)
            consistent &= part.mean.dtype == part.covariance.dtype == torch.float64
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: cannot read features from {str(path)!r}: {error}") from None
    if not consistent or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{what}: the features in {str(path)!r} do not fit together or are not finite")
    return Features(
        str(path), str(about["extractor"]), count, shape, pooled, loaded, spatial, probabilities
    )  # fmt: skip
