"""The sample file for ADM's evaluator, written batch by batch.

50,000 images of 256x256 are 9.8 GB: they are never all in memory, nor copied.
"""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import aside


def adm_name(count: int, height: int, width: int, channels: int = 3) -> str:
    """The usual file name: ``samples_50000x256x256x3.npz``."""
    return f"samples_{count}x{height}x{width}x{channels}.npz"


def save_npz(
    path: str | os.PathLike[str], images_NHWC: np.ndarray | Iterable[np.ndarray], labels: Sequence[int]
) -> None:
    """Write ``arr_0`` uint8 [N, H, W, C] and ``arr_1`` int64 [N], uncompressed, for ADM's evaluator.

    ``images_NHWC``: one array, or batches of it in order (a generator is consumed while they are written), as
    many images as ``labels``. The file appears only when complete; the same images give the same bytes.
    Raises ``UserError`` for batches of another dtype or size, and for another number of images.
    """
    classes = np.asarray(labels, dtype=np.int64)
    batches = [images_NHWC] if isinstance(images_NHWC, np.ndarray) else images_NHWC
    with aside(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            written, shape = 0, None
            for batch in batches:
                if batch.dtype != np.uint8 or batch.ndim != 4:
                    raise UserError(
                        f"images: got {batch.dtype} {list(batch.shape)}, expected uint8 [N, H, W, C]"
                    )
                if shape is None:
                    shape = batch.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(classes), *shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                if batch.shape[1:] != shape:
                    raise UserError(
                        f"images: {list(batch.shape[1:])} comes after {list(shape)}; one size is needed"
                    )
                member.write(np.ascontiguousarray(batch).data)
                written += len(batch)
            if shape is None or written != len(classes):
                raise UserError(f"images: {len(classes)} labels need as many images, got {written}")
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, classes, allow_pickle=False)
