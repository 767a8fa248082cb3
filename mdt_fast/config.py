"""The configuration of a run: frozen, keyword-only dataclasses. The presets are in ``presets.py``.

A run prints its configuration and saves it as ``config.json``; :func:`from_dict` reads it back and
rejects unknown keys.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UserError, nearest

Family = Literal["mdtv2", "mdt", "dit"]

RATIO_RANGE = 0.2
"""MDTv2 draws its mask ratio uniformly from ``[mask_ratio, mask_ratio + RATIO_RANGE)``."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a model. Field names match the constructor's keyword arguments (see ``models/mdt.py``)."""

    family: Family = "mdtv2"
    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    mask_ratio: float | None = 0.3
    decode_layer: int = 4

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
        ):
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected an integer")
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        if self.input_size % self.patch_size:
            near = (str(n * self.patch_size) for n in (self.grid_size, self.grid_size + 1) if n)
            raise UserError(
                f"input_size: got {self.input_size}, expected a multiple of patch_size {self.patch_size}, "
                f"such as {' or '.join(near)}"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_heads {self.num_heads} "
                "and of 4 (position embedding)"
            )
        if not _is_number(self.mlp_ratio) or not 1 / self.hidden_size <= self.mlp_ratio <= 1024:
            raise UserError(f"mlp_ratio: got {self.mlp_ratio}, expected a positive number up to 1024")
        if not _is_number(self.class_dropout_prob) or not 0 <= self.class_dropout_prob <= 1:
            raise UserError(f"class_dropout_prob: got {self.class_dropout_prob}, expected 0..1")
        if self.family == "dit":
            return
        highest = 1 - RATIO_RANGE if self.family == "mdtv2" else 1.0
        if self.mask_ratio is not None and not 0 <= self.mask_ratio <= highest:
            raise UserError(
                f"mask_ratio: got {self.mask_ratio}, expected 0..{highest} for {self.family}, or None"
            )
        lowest = 0 if self.family == "mdtv2" else 1  # v1 joins *before* block depth - decode_layer
        if not lowest <= self.decode_layer <= self.depth:
            raise UserError(
                f"decode_layer: got {self.decode_layer}, "
                f"expected {lowest}..{self.depth} (depth) for {self.family}"
            )

    @classmethod
    def of(
        cls, family: Family, *, mask_ratio: Any = None, decode_layer: Any = None, **kwargs: Any
    ) -> "ModelConfig":
        """Build from a constructor's arguments. ``mask_ratio`` and ``decode_layer`` may be strings (as from
        a command line); ``decode_layer`` None means 4 in MDTv2 and 2 in MDT v1, as in the published
        recipes except MDTv2_S_2, which uses 6."""
        if family == "dit":
            if mask_ratio is not None or decode_layer is not None:
                raise UserError("DiT takes neither mask_ratio nor decode_layer")
            decode_layer = 0
        elif decode_layer is None:
            decode_layer = 4 if family == "mdtv2" else 2
        try:
            mask_ratio = None if mask_ratio is None else float(mask_ratio)
        except (ValueError, TypeError):
            raise UserError(f"mask_ratio: got {mask_ratio!r}, expected a number or None") from None
        try:
            if isinstance(decode_layer, float) and not decode_layer.is_integer():
                raise ValueError
            decode_layer = int(decode_layer)
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"decode_layer: got {decode_layer!r}, expected an integer or None") from None
        return cls(family=family, mask_ratio=mask_ratio, decode_layer=decode_layer, **kwargs)

    @property
    def grid_size(self) -> int:
        """G: tokens along one side of the latent."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Output channels: twice the input channels if the variance is learnt."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    def kwargs(self) -> dict[str, Any]:
        """The constructor's keyword arguments (DiT takes neither ``mask_ratio`` nor ``decode_layer``)."""
        kwargs = dataclasses.asdict(self)
        if kwargs.pop("family") == "dit":
            del kwargs["mask_ratio"], kwargs["decode_layer"]
        return kwargs


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Optimisations of the fast models over a plain implementation. All are exact up to rounding.

    ``packed``: run the two passes of a training step as one batch. ``sorted_tokens``: keep the visible tokens
    in ascending order. ``masked_side``: compute only the masked tokens in the side block. ``thin_skip``:
    MDTv2's decoder mixes in the embedded input with a matmul as narrow as the patch. ``fused_attention``:
    read the bias from its table while computing scores. ``fused_adaln``: gate, norm and modulation in one
    step. ``fused_tokens``: embed patches and move tokens in one write. ``fused_mlp``: bias and GELU in one
    step. ``recompute``: recompute the inputs that ``fused_adaln`` and ``fused_mlp`` pass to a linear layer in
    the backward pass instead of storing them (off: more memory, one write less; not measured yet).
    ``batched_adaln``: compute the modulations of all blocks with one matmul, from a copy of all their weights
    (off by default: it pays only where kernel launches cost more than that copy). ``stored_scores``: on a
    GPU, store the gradients of the attention scores and derive those of queries and bias table from them,
    instead of recomputing the scores for each (off by default: on an H200 it was faster at 64 tokens, and up
    to twice as slow with only some of 256 tokens kept).
    """

    packed: bool = True
    sorted_tokens: bool = True
    masked_side: bool = True
    thin_skip: bool = True
    fused_attention: bool = True
    fused_adaln: bool = True
    fused_tokens: bool = True
    fused_mlp: bool = True
    recompute: bool = True
    batched_adaln: bool = False
    stored_scores: bool = False

    @classmethod
    def none(cls) -> "Switches":
        """All off."""
        return cls(**dict.fromkeys((field.name for field in dataclasses.fields(cls)), False))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data.

    ``source``: ``digits`` (scikit-learn's, 8x8 grey, no download), a folder of images or of webdataset
    shards, or the output of ``mdt-fast encode``. ``image_size``: crop size in pixels. ``vae``: an
    AutoencoderKL (a local folder or a hub name) that encodes images to latents on the fly and decodes
    sampled latents; None: the model works on pixels. ``conditional`` False: labels are ignored.
    ``on_unreadable``: stop the run at a bad file, or replace it by a good one. ``workers``: decoding threads.
    """

    source: str = "digits"
    image_size: int = 8
    channels: Literal[1, 3] = 1
    vae: str | None = None
    conditional: bool = True
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    on_unreadable: Literal["stop", "skip"] = "stop"
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Arguments of :func:`mdt_fast.diffusion.create_diffusion`."""

    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    diffusion_steps: int = 1000
    predict_xstart: bool = False
    min_snr_gamma: float | None = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training recipe. ``steps`` counts optimiser updates; learning rates are per update.

    ``batch_size``: images per update, over all processes and all ``accumulate`` micro-batches. ``passes``:
    run both passes of the objective as one batch (``together``), or ``in_turn``, each followed by its own
    backward pass: three fifths of the activation memory, for a few percent more time. ``dtype``: compute
    dtype; statistics are float32. ``weights``: bfloat16 keeps the network's weights, gradients (with
    ``accumulate``, their sum is float32) and block activations in that dtype; the optimiser keeps float32
    weights, which are what checkpoints hold (needs ``dtype`` bfloat16, not sharded). ``moments``: dtype of
    the optimiser's moments; bfloat16 needs ``csrc/``. ``float8``: run the blocks' matmuls in float8, on GPUs
    that support it, with our kernels or torchao (``float8_by``). ``keep``: how many of the newest checkpoints
    to keep, besides those of every ``keep_every``-th step (0: none). ``max_skips``: updates with a non-finite
    loss or gradient are skipped; after more than this many in a row the run stops. While there are such
    updates, one checkpoint from before them is kept, too.

    ``parallel``, with several processes: ``fsdp`` shards weights across all processes; ``hybrid`` shards
    within a node and replicates across nodes; ``ddp`` replicates weights and averages gradients after the
    backward passes. ``compile``: each ``block``, the whole ``model`` (not sharded), or ``none``.
    ``cuda_graphs``: run a step's passes as one graph launch; weights must not be sharded (half the step time
    on an H100 at batch 32). ``checkpointing``: what to recompute in the backward pass, see
    ``set_checkpointing``. ``async_save``: write checkpoints in the background while training continues.
    ``tensorboard`` None: log to it if it is installed. ``wandb``: the project to report to.
    """

    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1
    passes: Literal["together", "in_turn"] = "together"
    optimizer: Literal["adan", "adamw"] = "adan"
    lr: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    lr_anneal_steps: int = 0
    ema_decay: float = 0.9999
    max_skips: int = 10
    seed: int = 0
    log_every: int = 10
    save_every: int = 250
    keep: int = 3
    keep_every: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    weights: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["float32", "bfloat16"] = "float32"
    float8: bool = False
    float8_by: Literal["kernels", "torchao"] = "kernels"
    parallel: Literal["fsdp", "hybrid", "ddp"] = "fsdp"
    compile: Literal["none", "block", "model"] = "none"
    cuda_graphs: bool = False
    checkpointing: Literal["none", "selective", "full"] = "none"
    async_save: bool = True
    tensorboard: bool | None = None
    wandb: str | None = None


SamplerName = Literal["ddim", "ddpm", "dpm++", "unipc"]
SAMPLERS: tuple[SamplerName, ...] = typing.get_args(SamplerName)
SHARD_SIZE = 1000
"""Default number of images per shard of `mdt-fast sample --out`."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sampling settings. ``num_samples`` applies to ``mdt-fast sample``; in Python each label is one image.

    ``sampler``: ancestral sampling (``ddpm``), DDIM with ``eta``, or diffusers' DPM-Solver++ (``dpm++``) and
    UniPC, both of order 2. ``scale_pow``: the exponent of the guidance's power-cosine schedule; None:
    constant guidance; "auto": as published, 4 for MDT and constant for DiT. ``cfg_interval`` (low, high):
    guide only from original timestep low to high, both inclusive; fractions of the timesteps if high is at
    most 1. ``skip_below``: where the guidance weight differs from 1 by less than this, use 1, which halves
    the cost of the step (0: exact). ``guided_channels``: guide only the first N channels; None: 3 of 4, as
    published, else all. ``dtype``: the model's autocast dtype; noise, sampler steps and images are float32.
    """

    num_samples: int = 100
    steps: int = 50
    sampler: SamplerName = "ddim"
    eta: float = 0.0
    cfg_scale: float = 2.0
    scale_pow: float | Literal["auto"] | None = "auto"
    cfg_interval: tuple[float, float] | None = None
    skip_below: float = 0.0
    guided_channels: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 100
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SampleSwitches:
    """Optimisations of sampling over the plain loop. All are exact up to rounding.

    ``batched_modulations``: compute the modulations of a chunk of steps with one matmul per layer, once per
    class. ``shared_embedding``: embed the patches once for both guidance halves. ``fused_step``: guidance and
    sampler step in one kernel (ddpm, ddim). ``skip_unit``: skip the unconditional half where the guidance
    weight is 1. ``cuda_graph``: on a GPU, run each step as one CUDA graph. ``cast_once``: in half precision,
    cast the blocks' weights once per batch rather than per step; the sampler keeps the copies.
    """

    batched_modulations: bool = True
    shared_embedding: bool = True
    fused_step: bool = True
    skip_unit: bool = True
    cuda_graph: bool = True
    cast_once: bool = True

    @classmethod
    def none(cls) -> "SampleSwitches":
        """All off."""
        return cls(**dict.fromkeys((field.name for field in dataclasses.fields(cls)), False))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dicts (JSON-ready)."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Build ``cls`` from nested dicts; ``UserError`` names an unknown key or a value of the wrong type."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'config'}: got {type(values).__name__}, expected a table of settings")
    hints = typing.get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(
                f"{where or 'config'}: unknown key {key!r}{nearest(key, hints)}; allowed: {', '.join(hints)}"
            )
        hint, path = hints[key], f"{where}.{key}" if where else key
        if dataclasses.is_dataclass(hint):
            made[key] = from_dict(typing.cast(type, hint), value, path)
        else:
            made[key] = _checked(hint, value, path)
    return cls(**made)


def as_saved(values: Any) -> Any:
    """A saved configuration, upgraded to the current settings."""
    train = values.get("train") if isinstance(values, dict) else None
    if isinstance(train, dict) and train.get("float8") and "float8_by" not in train:
        return {**values, "train": {**train, "float8_by": "torchao"}}  # the only one then
    return values


def setting_type(section: str, key: str) -> Any:
    """The type of one of :class:`RunConfig`'s settings, as declared."""
    return typing.get_type_hints(typing.get_type_hints(RunConfig)[section])[key]


def check_types(config: Any, prefix: str = "") -> None:
    """``UserError`` for a field of a settings dataclass whose value has the wrong type or is not among its
    choices; ``prefix`` precedes the field's name in the message."""
    for name, hint in typing.get_type_hints(type(config)).items():
        _checked(hint, getattr(config, name), prefix + name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """``value`` if it matches ``hint`` (an int is accepted where a float is expected)."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value in typing.get_args(hint) and not isinstance(value, bool | float):  # 1.0 equals 1
            return value
        known = [str(option) for option in typing.get_args(hint)]
        listed = ", ".join(map(repr, typing.get_args(hint)))
        raise UserError(f"{where}: got {value!r}{nearest(str(value), known)}, expected {listed}")
    if hint == tuple[float, float] | None:
        if value is None:
            return None
        if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
            return _checked(float, value[0], where), _checked(float, value[1], where)
        raise UserError(f"{where}: got {value!r}, expected None or two numbers")
    allowed = typing.get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,)
    words = [
        word for option in allowed if typing.get_origin(option) is Literal for word in typing.get_args(option)
    ]
    if isinstance(value, str) and value in words:
        return value
    allowed = tuple(option for option in allowed if typing.get_origin(option) is not Literal)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where}: {str(value)[:20]}... is too large") from None
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}: {value!r} has a null character")
    for option in allowed:
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    kinds = ["None" if o is type(None) else o.__name__ for o in allowed]
    names = " or ".join([*kinds, *map(repr, words)])
    raise UserError(f"{where}: got {value!r}, expected {names}")
