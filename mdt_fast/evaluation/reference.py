"""From a path to ``Features``: a features file, ADM's statistics and images, or images still to process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import UserError, nearest
from .extractors import Extractor, TorchScriptInception
from .features import Features, extract, load_features
from .inception import is_published
from .metrics import METRICS
from .moments import Moments
from .npz import Npz
from .sources import DIGITS, DigitImages, FolderImages, Images, NpzImages

STATISTICS = {"moments": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Opened:
    """The contents of a path: ``features`` (from a features file, or a ``.npz``'s statistics), ``images``, or
    both."""

    features: Features | None
    images: Images | None


def open_source(source: str | Path, what: str, image_size: int | None = None) -> Opened:
    """Open a path; ``what`` is the name the user knows it by (SAMPLES, --reference). The word ``digits`` is
    the data set, as in ``--data``, and ``./digits`` a folder. Raises ``UserError``."""
    if source == DIGITS:
        return Opened(None, DigitImages())
    path = Path(source)
    if path.is_dir():
        return Opened(None, FolderImages(path, what, image_size))
    if not path.is_file():
        raise UserError(f"{what}: no file or folder {str(path)!r}")
    if image_size is not None:
        raise UserError(f"image_size: crops images in folders; {str(path)!r} is a file")
    if path.suffix == ".safetensors":
        return Opened(load_features(path, what), None)
    if path.suffix != ".npz":
        raise UserError(
            f"{what}: {str(path)!r} is no .npz, no .safetensors of features and no folder of images"
        )
    npz = Npz(path, what)
    features = _statistics(npz)
    if features is not None and "arr_0" not in npz.headers:
        return Opened(features, None)
    if features is None and "arr_0" not in npz.headers:
        wanted = ("arr_0", "mu", "sigma")
        close = next(filter(None, (nearest(name, npz.headers) for name in wanted)), "")
        raise UserError(
            f"{what}: {str(path)!r} holds {', '.join(sorted(npz.headers)) or 'nothing'}{close}; arr_0 "
            "(images, uint8 [N, H, W, C]) or mu [D] and sigma [D, D] are needed"
        )
    return Opened(features, NpzImages(npz))


def complete(
    opened: Opened,
    extractor: Callable[[], Extractor],
    *,
    samples: Features | None = None,
    metrics: Sequence[str] = METRICS,
    what: str,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> Features:
    """All features that ``metrics`` need. Images, if there are any, are run through ``extractor()``.

    ``samples``: the samples that this is the reference for. If a reference has both statistics and images,
    statistics of the same network take precedence (:func:`statistics_for`), as ADM's cover more images than
    the file contains. If the statistics suffice, the images are not processed.
    """
    if opened.images is None:
        assert opened.features is not None
        return opened.features
    statistics = None if samples is None else statistics_for(opened, samples, extractor)
    if suffice(statistics, metrics):
        assert statistics is not None
        return statistics
    seen = extract(
        opened.images, extractor(), device=device, batch_size=batch_size, what=what, on_batch=on_batch
    )
    if statistics is None:
        return seen
    return replace(seen, moments=statistics.moments, spatial=statistics.spatial or seen.spatial)


def statistics_for(
    reference: Opened, samples: Features, extractor: Callable[[], Extractor] | None = None
) -> Features | None:
    """The statistics of a file that also has images, as far as they are comparable with the samples'
    features: these must come from the published Inception, which made the statistics in ADM's files, or from
    NVIDIA's program of it. Another network may have as many features, so then the images are used."""
    given = reference.features
    if given is None or given.moments is None or samples.moments is None:
        return None
    published = is_published(samples.extractor)
    if not published and extractor is not None:
        network = extractor()
        published = isinstance(network.network, TorchScriptInception) and network.name == samples.extractor
    if not published or given.moments.dim != samples.moments.dim:
        return None
    dims = [None if part is None else part.dim for part in (given.spatial, samples.spatial)]
    return given if dims[0] == dims[1] else replace(given, spatial=None)


def suffice(statistics: Features | None, metrics: Sequence[str]) -> bool:
    """Whether ``metrics`` need nothing more of a reference; the Inception Score needs none at all."""
    return statistics is not None and all(
        metric in ("fid", "is") or (metric == "sfid" and statistics.spatial is not None) for metric in metrics
    )


def _statistics(npz: Npz) -> Features | None:
    found: dict[str, Moments] = {}
    for kind, (mean_name, covariance_name) in STATISTICS.items():
        present = [name for name in (mean_name, covariance_name) if name in npz.headers]
        if not present:
            continue
        if len(present) == 1:
            raise UserError(
                f"{npz.what}: {str(npz.path)!r} has {present[0]}; both {mean_name} and "
                f"{covariance_name} are needed"
            )
        mean, covariance = (
            torch.from_numpy(npz.array(mean_name, 1)),
            torch.from_numpy(npz.array(covariance_name, 2)),
        )
        if covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{npz.what}: in {str(npz.path)!r} {mean_name} is {list(mean.shape)} and {covariance_name} "
                f"{list(covariance.shape)}; [D] and [D, D] are needed"
            )
        found[kind] = Moments(mean, covariance)
    if not found:
        return None
    return Features(str(npz.path), "", None, moments=found.get("moments"), spatial=found.get("spatial"))
