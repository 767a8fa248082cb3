"""Inpainting: the known part of an image is put back at each step, and the sampler draws the rest.

N images of C channels and side S, a grid of G x G = L tokens.
Source: Lugmayr et al. 2022 (RePaint, arXiv:2201.09865), algorithm 1; Gao et al. 2023 (MDT, arXiv:2303.14389),
section 3.2, for the side-interpolater.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ..config import DiffusionConfig, ModelConfig, SampleConfig, SampleSwitches
from ..diffusion import GaussianDiffusion
from ..errors import UserError
from ..masking import MaskPlan
from .generate import ALL, DEFAULT, OnBatch, OnStep, PerImageNoise, Sampler, in_eval, respaced
from .schedulers import SOLVERS

KNOWN = 1
"""The stream for the known part's noise, so that the sampler's own noise is the same as without an image."""


def inpaint(
    model: nn.Module,
    diffusion: GaussianDiffusion | DiffusionConfig,
    labels: Sequence[int],
    image: Tensor,
    unknown: Tensor,
    config: SampleConfig = DEFAULT,
    *,
    hide: float = 0.0,
    resample: int = 1,
    clip_denoised: bool | None = None,
    first_index: int = 0,
    on_batch: OnBatch | None = None,
    on_step: OnStep | None = None,
    switches: SampleSwitches = ALL,
) -> Tensor:
    """``image`` with its unknown part sampled, once per label: [N, C, S, S] on the CPU.

    ``image``: in the model's space, pixels in [-1, 1] or latents; floating [C, S, S] for all N, or [N, C, S,
    S]. ``unknown``: bool [S, S] or [N, S, S], True where to draw; elsewhere the result is exactly ``image``.
    Before each step, the known part is replaced by ``image`` with the step's noise. This noise has its own
    generators, so with everything unknown the result is that of ``sample``. ``resample``: the number of times
    each step is done, with noise added again in between (RePaint with jumps of one step; ``ddpm`` and
    ``ddim``).

    ``hide``: the fraction of the process, starting from noise, in which completely unknown tokens are hidden
    from the encoder and left to the side-interpolater, as in training: 0 never, 1 at every step. It needs a
    model with a ``mask_ratio``. Partly known tokens are seen. Other arguments are as in ``sample``; images
    with different numbers of hidden tokens are drawn in separate batches. Raises ``UserError`` for arguments
    that do not fit.
    """
    diffusion = respaced(model, diffusion, config)
    with in_eval(model):
        sampler = Inpainter(
            model, diffusion, config, image, unknown, hide=hide, resample=resample,
            first_index=first_index, clip_denoised=clip_denoised, switches=switches,
        )  # fmt: skip
        sampler.check_count(len(labels))
        return sampler.draw(labels, first_index, on_batch, on_step)


class Inpainter(Sampler):
    """A ``Sampler`` for ``inpaint``. ``first_index``: the number of the first of several images."""

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        config: SampleConfig,
        image: Tensor,
        unknown: Tensor,
        *,
        hide: float = 0.0,
        resample: int = 1,
        first_index: int = 0,
        clip_denoised: bool | None = None,
        switches: SampleSwitches = ALL,
    ):
        super().__init__(model, diffusion, config, clip_denoised=clip_denoised, switches=switches)
        image, unknown = _checked(image, unknown, self.shape)
        self.image = image.to(self.model.device, self.dtype)
        self.unknown = unknown.to(self.model.device)
        if not self.image.isfinite().all():
            raise UserError(f"image: has values that are not finite in {self.dtype}")
        check_inpainting(self.about, config, self.unknown[:, 0], hide=hide, resample=resample)
        self.hide, self.resample, self.first_index = hide, resample, first_index
        self.hidden = hidden_tokens(self.unknown[:, 0], self.about.patch_size) if hide else None

    def check_count(self, count: int) -> None:
        """Raise ``UserError`` unless there is one image and mask for all ``count`` labels, or for each."""
        for name, tensor in (("image", self.image), ("unknown", self.unknown)):
            if len(tensor) not in (1, count):
                raise UserError(f"{name}: {count} labels need 1 for all or 1 each, got {len(tensor)}")

    def batches(self, count: int) -> Iterator[range]:
        """Batches of images with the same number of hidden tokens."""
        hidden = [0] if self.hidden is None else self.hidden.sum(dim=1).tolist()
        for _, same in groupby(range(count), lambda i: hidden[i % len(hidden)]):
            members = list(same)
            for span in super().batches(len(members)):
                yield range(members[0] + span.start, members[0] + span.stop)

    def _steps(self, noise: PerImageNoise) -> Callable[[Tensor, int], Tensor]:
        step = super()._steps(noise)
        image, unknown, plan = self._of(noise.images)
        known_noise = PerImageNoise(self.config.seed, noise.images.start, len(noise.images), KNOWN)

        def painted(x: Tensor, index: int) -> Tensor:
            self.model.plan = plan if self._hides(index) else None
            for again in range(self.resample):
                if again:
                    x = self._noised_again(x, index, known_noise(x))
                x = step(torch.where(unknown, x, self._at_level(image, index, known_noise(x))), index)
            return x if index else torch.where(unknown, x, image)

        return painted

    def _of(self, images: range) -> tuple[Tensor, Tensor, MaskPlan | None]:
        """Image, unknown part and plan of a batch."""
        rows = torch.tensor(images, device=self.model.device) - self.first_index
        image, unknown = (v[rows] if len(v) > 1 else v for v in (self.image, self.unknown))
        if self.hidden is None:
            return image, unknown, None
        hidden = self.hidden[rows] if len(self.hidden) > 1 else self.hidden.expand(len(rows), -1)
        kept = torch.argsort(hidden.int(), dim=1, stable=True)[:, : int((~hidden[0]).sum())]
        return image, unknown, MaskPlan.from_keep(kept, hidden.shape[1]).sorted()

    def _hides(self, index: int) -> bool:
        steps = self.diffusion.original_num_steps
        return self.diffusion.timestep_map[index] >= (1 - self.hide) * steps

    def _at_level(self, image: Tensor, index: int, noise: Tensor) -> Tensor:
        """The image at the noise level of a step's input."""
        t = torch.full((len(noise),), index, device=noise.device)
        return self.diffusion.q_sample(image.expand_as(noise), t, noise)

    def _noised_again(self, x: Tensor, index: int, noise: Tensor) -> Tensor:
        """Noise a step's result back to the level of the step's input."""
        beta = float(self.diffusion.betas[index])
        return (1 - beta) ** 0.5 * x + beta**0.5 * noise


def check_inpainting(
    model: ModelConfig, config: SampleConfig, unknown_NSS: Tensor, *, hide: float, resample: int
) -> None:
    """Raise ``UserError`` for settings that ``inpaint`` does not support."""
    if not unknown_NSS.flatten(1).any(dim=1).all():
        raise UserError("unknown: a mask is all False, there is nothing to draw")
    if isinstance(hide, bool) or not isinstance(hide, int | float) or not 0 <= hide <= 1:
        raise UserError(f"hide: got {hide!r}, expected 0 to 1")
    if type(resample) is not int or resample < 1:
        raise UserError(f"resample: got {resample!r}, expected an integer, 1 or more")
    if resample > 1 and config.sampler in SOLVERS:
        raise UserError(f"resample: {config.sampler} uses earlier steps and cannot go back; use ddpm or ddim")
    if hide and (model.family == "dit" or model.mask_ratio is None):
        raise UserError("hide: the model was not trained with hidden tokens; use 0")
    if hide and hidden_tokens(unknown_NSS, model.patch_size).all(dim=1).any():
        raise UserError("hide: everything is unknown, the encoder would see no token; use 0")


def hidden_tokens(unknown_NSS: Tensor, patch: int) -> Tensor:
    """Which tokens are completely unknown: bool [N, S, S] -> [N, L]."""
    N, S, _ = unknown_NSS.shape
    G = S // patch
    return unknown_NSS.view(N, G, patch, G, patch).all(dim=4).all(dim=2).flatten(1)


def _checked(image: Tensor, unknown: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Both as [N or 1, C, S, S] and [N or 1, 1, S, S]."""
    C, S, _ = shape
    for name, value in (("image", image), ("unknown", unknown)):
        if not isinstance(value, Tensor) or value.device.type == "meta":
            came = "one on the meta device" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name}: got {came}, expected a torch.Tensor with values")
    if image.ndim not in (3, 4) or tuple(image.shape[-3:]) != shape or not image.is_floating_point():
        raise UserError(
            f"image: got {image.dtype} {list(image.shape)}, expected floats [{C}, {S}, {S}] or "
            f"[N, {C}, {S}, {S}]"
        )
    if unknown.ndim not in (2, 3) or unknown.shape[-2:] != (S, S) or unknown.dtype != torch.bool:
        raise UserError(
            f"unknown: got {unknown.dtype} {list(unknown.shape)}, expected bool [{S}, {S}] or [N, {S}, {S}]"
        )
    return image.reshape(-1, C, S, S), unknown.reshape(-1, 1, S, S)
