"""The judge of samples in ``convergence.py``: a small classifier of the training images, whose features are
used for the Fréchet distance to held-out real images.

B: images [B, C, S, S], pixels or latents; D: features.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdt_fast.config import DataConfig
from mdt_fast.data import open_first_stage, open_images
from mdt_fast.data.encode import source_digest
from mdt_fast.data.first_stage import FirstStage
from mdt_fast.data.images import Digits, ImageSet, SourceSet, mirrored
from mdt_fast.errors import UserError
from mdt_fast.evaluation import Moments, frechet_distance, moments
from mdt_fast.files import aside
from mdt_fast.training.run import derive_seed

SPLIT, NOISE, WEIGHTS, ORDER = 20, 21, 22, 23  # seed streams
MAX_SHARE = 0.3  # of the images that may be held out
WIDTHS = (32, 64, 64)
UPDATES, BATCH = 400, 64


class Part:
    """A subset of an image set. With ``size`` (for the digits), images are enlarged to it once."""

    def __init__(self, images: ImageSet, indices: np.ndarray, size: int | None = None):
        self.images, self.indices = images, indices
        self.labels, self.classes = images.labels[indices], images.classes
        self.in_memory, shape = images.in_memory, images.shape
        self.shape = shape if size is None else (shape[0], size, size)
        self.enlarged: list[np.ndarray] | None = None
        if size is not None and size != shape[-1]:
            self.enlarged = [_enlarged(images.load(int(i), random.Random(0)), size) for i in indices]

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> np.ndarray:
        if self.enlarged is None:
            return self.images.load(int(self.indices[index]), rng, mirror)
        return mirrored(self.enlarged[index]) if mirror else self.enlarged[index]


def _enlarged(values: np.ndarray, size: int) -> np.ndarray:
    x = F.interpolate(torch.from_numpy(values)[None], (size, size), mode="bicubic")
    return x[0].clamp(-1, 1).numpy()


@dataclass(frozen=True)
class Data:
    """The images to learn from, the held-out images, and the stage that turns either into a model's input.

    ``digest`` is that of a folder's names, sizes and labels, or of its latents, so that other images in the
    same folder get another judge.
    """

    learnt: Part
    apart: Part
    stage: FirstStage
    digest: str | None

    def tensors(self, part: Part, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first ``count`` images of a part [N, C, S, S] and their labels [N]."""
        rows = [part.load(i, random.Random(i)) for i in range(min(count, len(part.labels)))]
        batch = torch.from_numpy(np.stack(rows)).to(device)
        noise = None
        if self.stage.random:
            generator = torch.Generator(device).manual_seed(derive_seed(0, NOISE))
            shape = len(batch), self.stage.channels, self.stage.size, self.stage.size
            noise = torch.randn(shape, generator=generator, device=device)
        labels = torch.from_numpy(part.labels[: len(rows)]).to(device)
        return self.stage(batch, noise), labels


def open_data(config: DataConfig, samples: int, device: torch.device) -> Data:
    """Split the images of ``config`` and hold out ``samples``. Raises ``UserError`` if there are too few."""
    digits = config.source == "digits"
    images: ImageSet = Digits(DataConfig()) if digits else open_images(config)
    total, size = len(images.labels), config.image_size if digits else None
    if samples < 2 or samples > MAX_SHARE * total:
        raise UserError(
            f"--samples: got {samples} images to hold out, expected 2 to {int(MAX_SHARE * total)} "
            f"of the {total} in {config.source!r}"
        )
    order = np.random.default_rng([0, SPLIT]).permutation(total)
    learnt, apart = Part(images, order[samples:], size), Part(images, order[:samples], size)
    stage = FirstStage(1, config.image_size) if digits else open_first_stage(config, images, device)
    digest = None if digits else getattr(images, "digest", None) or source_digest(cast(SourceSet, images))
    return Data(learnt, apart, stage, digest)


class Classifier(nn.Module):
    """Convolutions down to a side of at most 4, then the mean of each channel as ``features`` [B, 64]."""

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, WIDTHS[0], 3, padding=1), nn.GELU()]
        width = WIDTHS[0]
        for following in WIDTHS[1:]:
            stride = 2 if size > 4 else 1
            layers += [nn.Conv2d(width, following, 3, stride, 1), nn.GroupNorm(8, following), nn.GELU()]
            width, size = following, -(-size // stride)
        while size > 4:
            layers += [nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(8, width), nn.GELU()]
            size = -(-size // 2)
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Judge:
    """``classifier`` and the moments of the ``real`` held-out features. ``floor`` is the Fréchet distance of
    the same number of training images; ``real_accuracy`` is the accuracy on the held-out images."""

    def __init__(self, classifier: Classifier, data: Data, samples: int, device: torch.device):
        self.classifier, self.device = classifier.to(device).eval(), device
        apart, labels = data.tensors(data.apart, samples, device)
        self.real = self.moments(apart)
        self.real_accuracy = self.accuracy(apart, labels)
        learnt, _ = data.tensors(data.learnt, len(apart), device)
        self.floor = frechet_distance(self.moments(learnt), self.real)

    @torch.no_grad()
    def moments(self, x: Tensor) -> Moments:
        return moments(torch.cat([self.classifier.features(part.to(self.device)) for part in x.split(500)]))

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor | Sequence[int]) -> float:
        """The share of images that the classifier recognises as their labels, never a non-finite one."""
        labels = torch.as_tensor(labels, device=self.device)
        scores = torch.cat([self.classifier(part.to(self.device)) for part in x.split(500)])
        recognised = (scores.argmax(1) == labels) & scores.isfinite().all(1)
        return recognised.float().mean().item()

    def distance(self, x: Tensor) -> float:
        """Fréchet distance of images to the held-out real ones; infinite if features are not finite."""
        found = self.moments(x)
        if not (found.mean.isfinite().all() and found.covariance.isfinite().all()):
            return math.inf
        return frechet_distance(found, self.real)


def train_classifier(data: Data, classes: int, device: torch.device, updates: int = UPDATES) -> Classifier:
    """Train on the training images only, with noise added, because samples are never quite clean."""
    x, y = data.tensors(data.learnt, 50_000, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(0, WEIGHTS))
        classifier = Classifier(x.shape[1], x.shape[-1], classes).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            chosen = torch.randint(len(x), (BATCH,)).to(device)
            noisy = x[chosen] + 0.1 * torch.randn_like(x[chosen])
            loss = F.cross_entropy(classifier(noisy), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier


def save_classifier(path: Path, classifier: Classifier) -> None:
    with aside(path) as file:
        save_file(classifier.state_dict(), file)


def load_judge(path: Path, data: Data, classes: int, samples: int, device: torch.device) -> Judge:
    """The judge with the classifier that :func:`save_classifier` wrote to ``path``. Raises ``UserError`` if
    the file is damaged."""
    classifier = Classifier(data.stage.channels, data.stage.size, classes)
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError):
        raise UserError(
            f"{path}: not a classifier of these images; delete the file to train it again"
        ) from None
    return Judge(classifier, data, samples, device)
