"""Between what the loader gives and what the model is trained on: pixels as they are, or latents.

B images; pixels [B, 3 or 1, H, W] in [-1, 1]; C, S channels and side of what the model sees.
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
    """Pixels as they are. ``channels`` and ``size``: C and S; ``random``: it takes noise; ``clip``: what is
    sampled lies in [-1, 1]."""

    random, clip = False, True

    def __init__(self, channels: int, size: int):
        self.channels, self.size = channels, size

    def __call__(self, batch: Tensor, noise: Tensor | None) -> Tensor:
        """What the loader gave, on the device -> x [B, C, S, S]; ``noise`` of that shape, if ``random``."""
        return batch

    @property
    def factor(self) -> int:
        """Pixels per S."""
        return 1

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3 or 1, H, W] -> the most likely x [B, C, S, S], for which no noise is drawn."""
        return pixels

    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, S, S] -> pixels, float32."""
        return x

    def described(self) -> dict[str, Any] | None:
        """What :func:`described_stage` makes it from; None: pixels."""
        return None


class Latents(FirstStage):
    """Latents of moments that were encoded before, or, where ``encodes``, of pixels as they come.

    ``vae``: the autoencoder, loaded when it is first needed; ``fingerprint``: its, if it has to be this one.
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
    ):
        super().__init__(channels, size)
        self.fingerprint = fingerprint
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
        """The autoencoder, loaded at the first call; ``UserError`` where it cannot be had."""
        if self.autoencoder is None:
            if self.vae is None:
                raise UserError("data.vae: images of latents need the autoencoder; none is named")
            loaded = load_autoencoder(self.vae, self.device)
            if self.fingerprint not in (None, loaded.fingerprint):
                raise UserError(
                    f"data.vae: {self.vae!r} is not the autoencoder that the latents were made with"
                )
            if self.channels != loaded.latent_channels:
                raise UserError(
                    f"data.vae: the latents of {self.vae!r} have {loaded.latent_channels} channels, the "
                    f"model's {self.channels}"
                )
            self.autoencoder = loaded
        return self.autoencoder

    def described(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("channels", "size", "scale", "shift", "vae", "fingerprint")
        }


def load_autoencoder(vae: str, device: Any) -> Any:
    """The autoencoder in float32; ``UserError`` if it cannot be loaded."""
    return Autoencoder.load(vae, device, torch.float32)


def described_stage(described: dict[str, Any] | None, config: DataConfig, device: Any = "cpu") -> FirstStage:
    """The first stage of a run that described its own so; ``config.vae`` names another autoencoder."""
    if described is None:
        return FirstStage(config.channels, config.image_size)
    vae = config.vae or described["vae"]
    fingerprint = described["fingerprint"] if vae == described["vae"] else None
    return Latents(**{**described, "vae": vae, "fingerprint": fingerprint}, device=device)


def open_first_stage(config: DataConfig, images: ImageSet, device: Any = "cpu") -> FirstStage:
    """What stands between ``images`` and the model. ``UserError`` for an autoencoder that does not fit."""
    if isinstance(images, LatentSet):
        vae = config.vae or images.autoencoder
        # Another one by name (a finer decoder of the same latents, say) is the user's own choice.
        fingerprint = images.fingerprint if vae == images.autoencoder else None
        return Latents(images.channels, images.size, images.scale, images.shift, vae, fingerprint, device)
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
