"""Data: labelled image sets, the autoencoder that encodes them to latents, and the resumable loader."""

from .autoencoder import Autoencoder, sample_posterior
from .first_stage import FirstStage, Latents, described_stage, open_first_stage
from .images import ImageSet, check_classes, checked_set, open_images
from .latents import LatentSet
from .loader import Loader
from .shards import WebDataset

__all__ = [
    "Autoencoder",
    "FirstStage",
    "ImageSet",
    "LatentSet",
    "Latents",
    "Loader",
    "WebDataset",
    "check_classes",
    "checked_set",
    "described_stage",
    "open_first_stage",
    "open_images",
    "sample_posterior",
]
