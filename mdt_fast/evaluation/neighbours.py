"""Improved precision and recall (Kynkäänniemi et al. 2019): do samples lie where the reference does, and the
reverse?

A set's manifold is the union of balls around its points; each ball reaches to the point's k-th nearest
neighbour in the same set. Distances are float64 and computed one tile at a time: the N x M distances are
never in memory together.
"""

import torch
from torch import Tensor

from ..errors import UserError

NEIGHBOURS = 3
TILE = 2048, 8192  # rows and columns: 128 MiB of float64


def precision_recall(
    samples_ND: Tensor,
    reference_MD: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    tile: tuple[int, int] = TILE,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Precision is the share of samples within the reference's manifold; recall is the reverse.

    Each set needs more than ``neighbours`` points (``UserError``). The tile size does not affect the result.
    """
    for name, points in (("samples", samples_ND), ("reference", reference_MD)):
        if len(points) <= neighbours:
            raise UserError(
                f"precision, recall: got {len(points)} {name}, expected {neighbours + 1} or more "
                f"(each needs {neighbours} neighbours)"
            )
    # Relative to a common centre: distances are differences, and lose fewer digits near the origin.
    centre = reference_MD.mean(0, dtype=torch.float64)
    samples, reference = (
        points.to(device, torch.float64) - centre.to(device) for points in (samples_ND, reference_MD)
    )
    return (
        _share_within(samples, reference, neighbours, tile),
        _share_within(reference, samples, neighbours, tile),
    )


def _share_within(points: Tensor, others: Tensor, neighbours: int, tile: tuple[int, int]) -> float:
    """The share of ``points`` that lie in a ball around at least one of ``others``."""
    radii = _radii(others, neighbours, tile)
    inside = 0
    for rows in points.split(tile[0]):
        found = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, radius in zip(others.split(tile[1]), radii.split(tile[1])):
            squared, off = _squared(rows, columns)
            found |= (squared <= radius + off).any(1)  # a point on the surface is inside, as without rounding
        inside += int(found.sum())
    return inside / len(points)


def _radii(points: Tensor, neighbours: int, tile: tuple[int, int]) -> Tensor:
    """Squared distances [N] to the k-th neighbour; a point counts as its own zeroth neighbour."""
    radii = []
    for rows in points.split(tile[0]):
        nearest = rows.new_full((len(rows), 0), 0)
        for columns in points.split(tile[1]):
            both = torch.cat([nearest, squared_distances(rows, columns)], 1)
            nearest = both.topk(min(neighbours + 1, both.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def squared_distances(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Squared distances [N, M]. Values within rounding of zero become 0, so copies have distance 0."""
    squared, off = _squared(a_ND, b_MD)
    return torch.where(squared <= off, 0.0, squared)


def _squared(a_ND: Tensor, b_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances [N, M] by one matrix product, and how far rounding may have moved them."""
    lengths = a_ND.square().sum(1)[:, None] + b_MD.square().sum(1)
    off = 4 * torch.finfo(a_ND.dtype).eps * a_ND.shape[1] * lengths
    return torch.addmm(lengths, a_ND, b_MD.T, alpha=-2), off
