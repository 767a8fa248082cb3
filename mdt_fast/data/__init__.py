"""Images in: labelled sets, the autoencoder and its latents, and the resumable loader."""

from .autoencoder import Autoencoder, sample_posterior
from .images import ImageSet, check_classes, open_images
from .latents import LatentSet
from .loader import Loader
from .shards import WebDataset

__all__ = [
    "Autoencoder",
    "ImageSet",
    "LatentSet",
    "Loader",
    "WebDataset",
    "check_classes",
    "open_images",
    "sample_posterior",
]
