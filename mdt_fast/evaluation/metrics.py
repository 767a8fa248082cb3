"""The metrics by name: their requirements and values."""

from collections.abc import Sequence

import torch

from ..errors import UserError, nearest
from .features import Features
from .frechet import frechet_distance
from .inception_score import SPLIT, inception_score
from .moments import Moments
from .neighbours import NEIGHBOURS, precision_recall

METRICS = ("fid", "sfid", "is", "precision", "recall")


def parse_metrics(text: str) -> list[str]:
    """Parse ``fid,is`` into a list in the order of METRICS; ``UserError`` for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise UserError(f"metrics: got {name!r}{nearest(name, METRICS)}, expected {', '.join(METRICS)}")
    if not names:
        raise UserError(f"metrics: got none, expected one or more of {', '.join(METRICS)}")
    return [name for name in METRICS if name in names]


def missing(metric: str, samples: Features, reference: Features | None) -> str | None:
    """The reason why ``metric`` cannot be computed, or None."""
    if metric == "is":
        if samples.probabilities is None:
            return f"the features of {samples.name!r} come without class probabilities"
        return None
    if reference is None:
        return "it needs --reference"
    sides = (samples, reference)
    if metric in ("precision", "recall"):
        lacking = [side.name for side in sides if side.pooled is None]
        if lacking:
            return f"{lacking[0]!r} has statistics only; images or features are needed"
        for side in sides:
            if side.pooled is not None and len(side.pooled) <= NEIGHBOURS:
                return f"{side.name!r} has {len(side.pooled)} images; at least {NEIGHBOURS + 1} are needed"
        return None
    parts = [side.moments if metric == "fid" else side.spatial for side in sides]
    for side, part in zip(sides, parts):
        if part is None and metric == "fid":
            return f"{side.name!r} has neither images nor the statistics mu and sigma"
        if part is None:
            return f"{side.name!r} has no spatial features or statistics"
    a, b = (part.dim for part in parts if part is not None)
    if a != b:
        return (
            f"{samples.name!r} has {a} features, {reference.name!r} {b}; both must come from the same network"
        )
    return None


def check_same_network(samples: Features, reference: Features) -> None:
    """Raise ``UserError`` if both sides name the network of their features, and the names differ."""
    if samples.extractor and reference.extractor and samples.extractor != reference.extractor:
        raise UserError(
            f"reference: its features come from {reference.extractor!r}, the samples' from "
            f"{samples.extractor!r}; they must come from the same network"
        )


def evaluate(
    samples: Features,
    reference: Features | None,
    metrics: Sequence[str],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Values by name; ``is`` also gives ``is_std``. ``UserError`` for a metric whose inputs are missing.

    ``device``: where the distances for precision and recall are computed.
    """
    for metric in metrics:
        if (reason := missing(metric, samples, reference)) is not None:
            raise UserError(f"metrics: {metric} cannot be computed: {reason}")
    if reference is not None:
        check_same_network(samples, reference)
    values: dict[str, float] = {}
    for metric in metrics:
        if metric == "is":
            assert samples.probabilities is not None
            values["is"], values["is_std"] = inception_score(samples.probabilities)
        elif metric in ("fid", "sfid"):
            assert reference is not None
            names = (f"the features of {samples.name!r}", f"the features of {reference.name!r}")
            values[metric] = frechet_distance(*pair(metric, samples, reference), names)
        elif "precision" not in values and "recall" not in values:
            assert reference is not None
            assert samples.pooled is not None
            assert reference.pooled is not None
            precision, recall = precision_recall(samples.pooled, reference.pooled, device=device)
            both = {"precision": precision, "recall": recall}
            values |= {name: both[name] for name in metrics if name in both}
    return values


def pair(metric: str, samples: Features, reference: Features | None) -> tuple[Moments, Moments]:
    assert reference is not None
    a, b = (side.moments if metric == "fid" else side.spatial for side in (samples, reference))
    assert a is not None
    assert b is not None
    return a, b


def warnings(samples: Features, reference: Features | None, metrics: Sequence[str]) -> list[str]:
    """Warnings that a reader of the values needs, one line each."""
    lines = []
    for metric in [name for name in ("fid", "sfid") if name in metrics]:
        for side, part in zip((samples, reference), pair(metric, samples, reference)):
            if side is not None and part.count is not None and part.count <= part.dim:
                lines.append(
                    f"{metric}: {part.count} images in {side.name} for {part.dim} features: their covariance "
                    f"is singular and the value too high; at least {part.dim + 1} are needed, 50000 are usual"
                )
    if "is" in metrics and samples.probabilities is not None and len(samples.probabilities) < SPLIT:
        lines.append(f"is: one part of {len(samples.probabilities)} images; {SPLIT} in each of 10 are usual")
    return lines
