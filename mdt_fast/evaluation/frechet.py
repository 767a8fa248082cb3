"""The Fréchet distance between two Gaussians (FID, sFID: Heusel et al. 2017, Nash et al. 2021)."""

import torch
from torch import Tensor

from ..errors import UserError
from .moments import Moments

NEGATIVE = 1e-4  # relative to the largest eigenvalue: further below zero than float32 rounding explains


def frechet_distance(a: Moments, b: Moments, names: tuple[str, str] = ("features", "features")) -> float:
    """``|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))``, in float64; at least 0.

    With ``S = R R'``, the last trace is the sum of the singular values of ``R_a' R_b``. R comes from the
    eigenvalues of the symmetric S, so nothing is ill-posed if S is singular: unlike with a square root of the
    product, no complex numbers arise, and no multiple of the identity has to be added to S.

    Error: eigenvalues of S are exact to ``e = D 2^-52 max(eigenvalue)``. By Powers and Størmer's inequality,
    the distance is then within ``2 (sqrt(D e_a tr S_b) + sqrt(D e_b tr S_a))``. The bound is reached only
    if both are singular, in different directions; the tests see less than 1e-6 of ``tr(S_a) + tr(S_b)``.

    Raises ``UserError``, beginning with one of ``names``, if a mean or covariance is not valid; also if the
    dimensions differ.
    """
    if a.dim != b.dim:
        raise UserError(f"features: of dimension {a.dim} and {b.dim}; they must come from the same network")
    root_a, root_b = (_root(part, name) for part, name in zip((a, b), names, strict=True))
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())


def _root(part: Moments, name: str) -> Tensor:
    """R [D, D] such that ``R R'`` is the covariance."""
    for what, numbers in (("mean", part.mean), ("covariance", part.covariance)):
        if not numbers.isfinite().all():
            raise UserError(f"{name}: their {what} is not finite")
    values, vectors = torch.linalg.eigh((part.covariance + part.covariance.T) / 2)
    if values[0] < -NEGATIVE * values[-1].abs():
        raise UserError(f"{name}: their covariance has the eigenvalue {values[0]:.3g}; none may be below 0")
    return vectors * values.clamp(min=0).sqrt()
