"""The autoencoder between images and latents: diffusers' ``AutoencoderKL``, from a folder or the hub."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, not_importable, one_line

DECODED_AT_ONCE = 16 * 256**2
"""Pixels per decoded batch: 16 images of 256 x 256, whose activations take about 4 GiB in float32."""


class Autoencoder:
    """Encodes images [B, C, H, W] in [-1, 1] to moments [B, 2c, h, w] of their latents, and decodes latents.

    ``latent_channels``: c. ``factor``: pixels per latent, H / h. The model sees the autoencoder's latent z as
    ``(z - shift) * scale``. ``name``: the hub name, or the folder's absolute path. ``fingerprint``: SHA-256
    over names, shapes and float32 values of the weights as read.
    """

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name
        self.fingerprint = _fingerprint(model)
        config = model.config
        self.image_channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)

    @classmethod
    def load(
        cls, name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Autoencoder":
        """Load from a folder written by ``save_pretrained`` (or a pipeline's, with ``vae/``), or the hub.

        Weights are read from safetensors only. Raises ``UserError`` if diffusers is missing, or ``name`` is
        not an ``AutoencoderKL`` or cannot be loaded.
        """
        try:
            from diffusers import AutoencoderKL
        except (ImportError, RuntimeError) as error:  # diffusers raises its import failures as RuntimeError
            raise not_importable("the autoencoder comes with diffusers", error, "latents") from None
        if not str(name):
            raise UserError("vae: got '', expected a folder or a hub name of an AutoencoderKL")
        folder = _local_folder(name)
        try:
            with _quiet():
                model, loading = AutoencoderKL.from_pretrained(
                    str(folder or name),
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    torch_dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:  # hub, network, JSON, safetensors and torch raise their own types
            reason = one_line(error)
            what = f"the folder {str(folder)!r}" if folder else f"the hub's {str(name)!r}"
            raise UserError(f"vae: cannot load an AutoencoderKL from {what}: {reason}") from None
        if missing := loading["missing_keys"]:  # diffusers leaves these at random values
            raise UserError(f"vae: {str(name)!r} lacks {len(missing)} weights, such as {missing[0]!r}")
        if model.config.get("latents_mean") is not None:
            raise UserError(f"vae: {str(name)!r} scales each channel separately, which is not supported")
        loaded = cls(model.eval().requires_grad_(False), str(folder.resolve() if folder else name))
        with _quiet():
            model.to(device=device, dtype=dtype)
        return loaded

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, C, H, W] in [-1, 1] -> [B, 2c, h, w] float32: the mean, then the log variance."""
        weight = next(self.model.parameters())
        posterior = self.model.encode(pixels.to(weight.device, weight.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float().contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, scale: float | None = None, shift: float | None = None) -> Tensor:
        """latents [B, c, h, w] as the model sees them -> pixels [B, C, H, W] float32, about [-1, 1].

        ``scale`` and ``shift``: what the model was trained with, if it differs from the autoencoder's.
        Decodes a few images at a time, to bound memory.
        """
        weight = next(self.model.parameters())
        scale, shift = self.scale if scale is None else scale, self.shift if shift is None else shift
        return in_parts(self.model, (latents.float() / scale + shift).to(weight.device, weight.dtype))


def in_parts(model: Any, z: Tensor) -> Tensor:
    """The autoencoder's latents z [B, c, h, w] -> pixels [B, C, H, W] float32, a few images at a time."""
    pixels = 4 ** (len(model.config.block_out_channels) - 1) * z.shape[-2] * z.shape[-1]
    return torch.cat(
        [model.decode(part).sample.float() for part in z.split(max(1, DECODED_AT_ONCE // pixels))]
    )


def sample_posterior(moments: Tensor, noise: Tensor, scale: float, shift: float = 0.0) -> Tensor:
    """moments [B, 2c, h, w] and standard normal noise [B, c, h, w] -> latents [B, c, h, w] float32."""
    mean, logvar = moments.float().chunk(2, dim=-3)
    return (mean + torch.exp(0.5 * logvar) * noise - shift) * scale


def _fingerprint(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _local_folder(name: str | Path) -> Path | None:
    """The folder of the autoencoder, if ``name`` is one; None for a hub name. ``UserError`` for neither."""
    path = Path(name)
    if path.is_dir():
        folder = path if (path / "config.json").exists() or not (path / "vae").is_dir() else path / "vae"
        file = folder / "config.json"
        try:
            kind = json.loads(file.read_text())["_class_name"]
        except FileNotFoundError:
            raise UserError(f"vae: no autoencoder in {str(path)!r}: it has no config.json") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"vae: {str(file)!r} is not the config.json of an AutoencoderKL") from None
        if kind != "AutoencoderKL":
            raise UserError(f"vae: {str(folder)!r} holds {kind!r}; an AutoencoderKL is needed")
        return folder
    if path.exists():
        raise UserError(f"vae: {str(path)!r} is a file; the folder of an AutoencoderKL is needed")
    if path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) != 2:
        raise UserError(
            f"vae: no folder {str(name)!r}, nor is it a hub name such as stabilityai/sd-vae-ft-ema"
        )
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers and the hub; the errors raised here repeat what matters."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
