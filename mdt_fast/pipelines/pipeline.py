"""``MDTPipeline``: a transformer, a scheduler and optionally an autoencoder, as a diffusers pipeline.

n images; C channels and S side of the transformer's input.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils as loading
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import ModelConfig, SampleConfig, SampleSwitches
from ..data.autoencoder import in_parts
from ..errors import UserError, nearest, one_line
from ..models import Transformer
from ..models.hub import floating
from ..sampling.generate import in_eval
from ..sampling.guided import GuidedModel, Timesteps, as_published
from .arguments import (
    Generators,
    check_latents,
    check_output,
    checked_channels,
    checked_eta,
    checked_generator,
    checked_labels,
    checked_names,
    checked_power,
    checked_scale,
)
from .from_run import components_of_run
from .schedulers import ready

# Diffusers' tables of the libraries whose classes can be components, and of their save and load methods.
METHODS = ["save_component", "from_pretrained"]
loading.LOADABLE_CLASSES["mdt_fast"] = {"Transformer": METHODS}
loading.ALL_IMPORTABLE_CLASSES["Transformer"] = METHODS


class MDTPipeline(DiffusionPipeline):
    """Class-conditional images by MDTv2, MDT v1 or DiT; called like diffusers' ``DiTPipeline``.

    ``transformer``: a model of this package, optionally compiled by ``torch.compile``. ``scheduler``: any of
    diffusers' for models that predict the noise (or the image), such as the result of
    :func:`~mdt_fast.pipelines.published_scheduler`. ``vae``: an ``AutoencoderKL``; None if the transformer
    works on pixels. ``id2label``: names by class; a class's alternative names are separated by commas. Raises
    ``UserError`` for components that do not fit.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (diffusers asks for a list)

    def __init__(
        self,
        transformer: Transformer,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        id2label: Mapping[Any, str] | None = None,
    ) -> None:
        super().__init__()
        _check_parts(transformer, scheduler, vae)
        names = checked_names(id2label, transformer.num_classes)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label={str(key): names[key] for key in sorted(names)} or None)
        of_parts = ((name.strip(), key) for key, text in names.items() for name in text.split(","))
        self.labels = dict(sorted(of_parts)) | {text.strip(): key for key, text in names.items()}

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline from a folder written by ``save_pretrained``, or from a repository on the hub.

        ``kwargs`` are those of diffusers' pipelines (``torch_dtype``, also by name, ``revision``, components
        by name, ...). Weights are read from safetensors only. Raises ``UserError`` for anything but such a
        pipeline.
        """
        _check_folder(Path(name))
        if not kwargs.setdefault("use_safetensors", True):
            raise UserError("use_safetensors: got False, expected True: pickled weights are never read")
        if not isinstance(kwargs.get("torch_dtype"), dict):  # a dict is by component; diffusers checks it
            kwargs["torch_dtype"] = floating("torch_dtype", kwargs.get("torch_dtype"))
        if "device_map" not in kwargs:
            kwargs.setdefault("low_cpu_mem_usage", False)  # else diffusers warns if accelerate is missing
        try:
            return super().from_pretrained(str(name), **kwargs)
        except UserError:
            raise
        except Exception as error:  # hub, network, JSON, safetensors and torch each raise their own errors
            reason = one_line(error)
            raise UserError(f"from_pretrained: no pipeline can be made of {str(name)!r}: {reason}") from None

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        *,
        weights: Literal["ema", "model"] = "ema",
        vae: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The pipeline of a run of ``mdt-fast train``, of one of its checkpoints, or of a weight file as
        written by ``mdt-fast convert`` or published.

        Its scheduler is the run's own sampler (``sample.sampler``). ``vae``: an autoencoder to use instead of
        the run's. Raises ``UserError`` if the run or the autoencoder cannot be read.
        """
        return cls(**components_of_run(Path(run), weights, None if vae is None else str(vae)))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Look up classes by name; ``UserError`` (with the nearest name) for an unknown name."""
        if not isinstance(label, str | Sequence):
            raise UserError(f"label: got {label!r}, expected a name or several")
        names = [label] if isinstance(label, str) else list(label)
        if not self.labels:
            raise UserError("label: this pipeline has no names of classes (id2label)")
        for name in names:
            if name not in self.labels:
                raise UserError(f"label: {name!r} is no class{nearest(name, self.labels)}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float | None = None,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        *,
        scale_pow: float | Literal["auto"] | None = "auto",
        guided_channels: int | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image per class in ``class_labels``, as ``.images`` (or as the only item of a tuple).

        ``guidance_scale``: classifier-free guidance; 1 or less means none. None: 4, or 1 for a model trained
        without label dropout. ``scale_pow``: the power of the cosine schedule of the guidance, None for the
        same weight at every step; "auto": as published, 4 for MDT and None for DiT. ``guided_channels``: the
        number of guided channels; None: as published, 3 of 4 (``DiTPipeline`` guides all), or all of any
        other number. ``eta``: DDIM's noise. ``generator``: one for all images, or a list with one for each.
        ``latents`` [n, C, S, S]: the noise to start from.

        ``output_type``: "pil" images, "np" float32 [n, H, W, 3] in [0, 1] (1 channel for grey images), "pt"
        the same as a tensor [n, 3, H, W], "latent" the transformer's result [n, C, S, S]. Noise and steps are
        float32 for any dtype of the weights (float64 for a float64 model), and under autocast. Raises
        ``UserError`` for arguments out of range.
        """
        transformer = self.transformer
        about: ModelConfig = transformer.config
        labels = checked_labels(class_labels, transformer.num_classes)
        own = checked_generator(generator, len(labels))
        device = self._execution_device
        around: Any = "float32"  # or the dtype of the caller's autocast
        if torch.is_autocast_enabled(device.type):
            around = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        config = SampleConfig(
            cfg_scale=checked_scale(guidance_scale, about),
            scale_pow=checked_power(scale_pow),
            guided_channels=checked_channels(guided_channels, about),
            dtype=around,
        )
        check_output(output_type, about, self.vae is not None)
        if latents is not None:
            check_latents(latents, (len(labels), about.in_channels, about.input_size, about.input_size))
        steps = ready(self.scheduler, num_inference_steps, device, transformer.learn_sigma)
        timesteps = Timesteps(steps.times[::-1], self.scheduler.config.num_train_timesteps)
        model = GuidedModel(
            transformer, timesteps, as_published(config, about), False, SampleSwitches(), device=device
        )

        C, scheduler = about.in_channels, steps.scheduler
        known = inspect.signature(scheduler.step).parameters
        eta = checked_eta(eta, "eta" in known)
        x = self._noise(len(labels), latents, own, device) * scheduler.init_noise_sigma
        # DDIM's noise is derived from the clamped image, as in the published sampler.
        extra = {"eta": eta, "generator": own, "use_clipped_model_output": True}
        extra = {key: value for key, value in extra.items() if key in known}
        with in_eval(transformer):
            model.begin(labels)
            for i, t in enumerate(self.progress_bar(steps.timesteps)):
                output = model.prediction(scheduler.scale_model_input(x, t), len(steps.times) - 1 - i)
                given = output if steps.takes_variance else output[:, :C]
                x = scheduler.step(given, t, x, **extra, return_dict=False)[0].to(x.dtype)

        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self, count: int, latents: Tensor | None, generator: Generators, device: torch.device
    ) -> Tensor:
        C, S = self.transformer.in_channels, self.transformer.input_size
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        if latents is None:
            return randn_tensor((count, C, S, S), generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype)

    def _images(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            config = self.vae.config
            z = x / config.scaling_factor + (config.shift_factor or 0.0)
            x = in_parts(self.vae, z.to(self.vae.dtype))
        pixels = (x.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


def _check_parts(transformer: Any, scheduler: Any, vae: Any) -> None:
    whole = getattr(transformer, "_orig_mod", transformer)  # the model that torch.compile wraps
    if not isinstance(whole, Transformer):
        raise UserError(
            f"transformer: got {type(whole).__name__}, expected an MDTv2, MDT or DiT of mdt_fast "
            "(DiT.from_pretrained reads a DiTTransformer2DModel's folder)"
        )
    if not isinstance(scheduler, SchedulerMixin):
        raise UserError(
            f"scheduler: got {type(scheduler).__name__}, expected one of diffusers' "
            "(published_scheduler makes one)"
        )
    if vae is None:
        return
    if not isinstance(vae, AutoencoderKL):
        raise UserError(f"vae: got {type(vae).__name__}, expected an AutoencoderKL or None")
    if vae.config.latent_channels != whole.in_channels:
        raise UserError(
            f"vae: its latents have {vae.config.latent_channels} channels, the transformer's "
            f"{whole.in_channels}"
        )
    if vae.config.get("latents_mean") is not None:
        raise UserError("vae: it scales each channel on its own, which is not supported")


def _check_folder(path: Path) -> None:
    """Raise ``UserError`` for a path that is neither a pipeline's folder nor a name on the hub."""
    if path.exists():
        if not (path / DiffusionPipeline.config_name).is_file():
            reason = ""
            if (path / "checkpoints").is_dir():
                reason = "; it is a run: MDTPipeline.from_run makes a pipeline of it"
            elif (path / "config.json").is_file():
                reason = "; it may be a model's: Transformer.from_pretrained loads those"
            raise UserError(f"from_pretrained: no model_index.json in {str(path)!r}{reason}")
    elif path.is_absolute() or str(path).startswith((".", "~")) or len(path.parts) != 2:
        raise UserError(f"from_pretrained: got {str(path)!r}, expected a folder or a hub name (me/mdt)")
