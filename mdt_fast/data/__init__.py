"""Images in: labelled sets and the resumable loader."""

from .images import ImageSet, check_classes, open_images
from .loader import Loader

__all__ = ["ImageSet", "Loader", "check_classes", "open_images"]
