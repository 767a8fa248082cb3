"""Images in: labelled sets and the resumable loader."""

from .first_stage import FirstStage, described_stage, open_first_stage
from .images import ImageSet, check_classes, open_images
from .loader import Loader

__all__ = [
    "FirstStage",
    "ImageSet",
    "Loader",
    "check_classes",
    "described_stage",
    "open_first_stage",
    "open_images",
]
