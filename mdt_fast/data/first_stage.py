"""The stage between loader and model: passes pixels through, or makes latents.

B images; pixels [B, 3 or 1, H, W] in [-1, 1]; C and S: channels and side of the model's input.
"""

from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .autoencoder import Autoencoder, sample_posterior
from .images import ImageSet
from .latents import LatentSet


class FirstStage:
    """Passes pixels through. ``channels`` and ``size``: C and S; ``random``: whether it takes noise;
    ``clip``: whether samples lie in [-1, 1]."""

    random, clip = False, True

    def __init__(self, channels: int, size: int):
        self.channels, self.size = channels, size

    def __call__(self, batch: Tensor, noise: Tensor | None) -> Tensor:
        """The loader's batch, on the device -> x [B, C, S, S]; ``noise`` has that shape, if ``random``."""
        return batch

    @property
    def factor(self) -> int:
        """Pixels per S."""
        return 1

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3 or 1, H, W] -> the most likely x [B, C, S, S], without noise."""
        return pixels

    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, S, S] -> pixels, float32."""
        return x

    def described(self) -> dict[str, Any] | None:
        """The description from which :func:`described_stage` rebuilds this stage; None: pixels."""
        return None


class Latents(FirstStage):
    """Samples latents from moments encoded earlier, or, if ``encodes``, encodes pixels on the fly.

    ``vae``: the autoencoder, loaded when first needed; ``fingerprint``: required of its weights, or None.
    ``encoder``: the fingerprint of the weights that encode the latents, if known; ``vae`` may be another one.
    Latents are (z - ``shift``) * ``scale``.
    """

    random, clip = True, False

    def __init__(
        self,
        channels: int,
        size: int,
        scale: float,
        shift: float,
        vae: str | None,
        fingerprint: str | None = None,
        device: Any = "cpu",
        autoencoder: Any = None,
        encoder: str | None = None,
    ):
        super().__init__(channels, size)
        self.fingerprint, self.encoder = fingerprint, encoder or fingerprint
        self.scale, self.shift, self.vae, self.device = scale, shift, vae, device
        self.autoencoder, self.encodes = autoencoder, autoencoder is not None

    def __call__(self, batch: Tensor, noise: Tensor | None) -> Tensor:
        moments = self.autoencoder.moments(batch) if self.encodes else batch
        assert noise is not None
        return sample_posterior(moments, noise, self.scale, self.shift)

    @property
    def factor(self) -> int:
        return self.opened().factor

    def encode(self, pixels: Tensor) -> Tensor:
        moments = self.opened().moments(pixels)
        return sample_posterior(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]), self.scale, self.shift)

    def decode(self, x: Tensor) -> Tensor:
        return self.opened().decode(x.to(self.device), self.scale, self.shift)

    def opened(self) -> Any:
        """The autoencoder, loaded at the first call; ``UserError`` if it cannot be loaded."""
        if self.autoencoder is None:
            if self.vae is None:
                raise UserError("data.vae: decoding latents needs an autoencoder, but none is named")
            loaded = load_autoencoder(self.vae, self.device)
            if self.fingerprint not in (None, loaded.fingerprint):
                raise UserError(f"data.vae: {self.vae!r} is not the autoencoder that encoded the latents")
            if self.channels != loaded.latent_channels:
                raise UserError(
                    f"data.vae: the latents of {self.vae!r} have {loaded.latent_channels} channels, but the "
                    f"model's have {self.channels}"
                )
            self.autoencoder = loaded
        return self.autoencoder

    def described(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("channels", "size", "scale", "shift", "vae", "fingerprint")
        }


def load_autoencoder(vae: str, device: Any) -> Any:
    """Load the autoencoder in float32; ``UserError`` if it cannot be loaded."""
    return Autoencoder.load(vae, device, torch.float32)


def described_stage(described: dict[str, Any] | None, config: DataConfig, device: Any = "cpu") -> FirstStage:
    """Rebuild a run's first stage from its description; ``config.vae`` overrides the autoencoder."""
    if described is None:
        return FirstStage(config.channels, config.image_size)
    vae = config.vae or described["vae"]
    fingerprint = described["fingerprint"] if vae == described["vae"] else None
    return Latents(**{**described, "vae": vae, "fingerprint": fingerprint}, device=device)


def open_first_stage(config: DataConfig, images: ImageSet, device: Any = "cpu") -> FirstStage:
    """The first stage between ``images`` and the model. ``UserError`` for an unsuitable autoencoder."""
    if isinstance(images, LatentSet):
        vae = config.vae or images.autoencoder
        # Naming a different one (such as a better decoder for the same latents) is the user's choice.
        fingerprint = images.fingerprint if vae == images.autoencoder else None
        return Latents(
            images.channels, images.size, images.scale, images.shift, vae, fingerprint, device,
            encoder=images.fingerprint,
        )  # fmt: skip
    if config.vae is None:
        return FirstStage(config.channels, config.image_size)
    found = load_autoencoder(config.vae, device)
    if config.channels != found.image_channels:
        raise UserError(f"data.channels: {config.channels}, but data.vae takes {found.image_channels}")
    if config.image_size % found.factor:
        raise UserError(
            f"data.image_size: {config.image_size} is not divisible by {found.factor}, the pixels per latent "
            "of data.vae"
        )
    size = config.image_size // found.factor
    return Latents(
        found.latent_channels, size, found.scale, found.shift, config.vae, found.fingerprint, device, found
    )  # fmt: skip
