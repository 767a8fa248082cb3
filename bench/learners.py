"""The learners of ``convergence.py``: sizes of the comparison, and studies, each a table of variants."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mdt_fast.config import (
    DataConfig,
    DiffusionConfig,
    Family,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from mdt_fast.models.zoo import Implementation
from mdt_fast.presets import SIZES as SHAPES

Passes = Literal["both", "all", "twice", "masked"]
Part = Literal["bias", "side"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of training. ``name`` appears in tables and rows; ``model``, ``diffusion`` and ``train``
    override the size's settings. ``passes`` of a step are both, one over all tokens, two over all tokens
    (each with its own noise and label drops, like both, but without a mask), or the masked one alone.
    ``without`` names parts to disable: the relative position bias or the side-interpolater. ``longer``
    multiplies the size's updates; ``finer`` divides the patch side, giving ``finer**2`` times the tokens."""

    name: str
    family: Family = "mdtv2"
    model: dict[str, Any] = field(default_factory=dict)
    diffusion: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    passes: Passes = "both"
    without: tuple[Part, ...] = ()
    implementation: Implementation = "fast"
    longer: int = 1
    finer: int = 1

    def settings(self, size: RunConfig) -> RunConfig:
        """All settings of this variant at a size."""
        dit = self.family == "dit"
        masked = {"mask_ratio": None, "decode_layer": 0} if dit else {}
        patch, steps = size.model.patch_size // self.finer, size.train.steps * self.longer
        return replace(
            size,
            model=replace(size.model, family=self.family, patch_size=patch, **masked | self.model),
            diffusion=replace(size.diffusion, **self.diffusion),
            train=replace(size.train, steps=steps, **self.train),
        )


DIT = Variant(name="DiT", family="dit")
MDT = Variant(name="MDT v1", family="mdt")
MDTV2 = Variant(name="MDTv2")
BFLOAT16 = Variant(name="bfloat16", train={"dtype": "bfloat16"})
LEAN = Variant(
    name="bfloat16, weights and moments, too",
    train={"dtype": "bfloat16", "weights": "bfloat16", "moments": "bfloat16"},
)
FLOAT8 = Variant(name="float8, rows", train={"dtype": "bfloat16", "float8": True})
TORCHAO = Variant(name="float8", train={"dtype": "bfloat16", "float8": True, "float8_by": "torchao"})
"""Named when this was the only kind of float8."""

STUDIES: dict[str, tuple[Variant, ...]] = {
    "models": (DIT, MDT, MDTV2),
    "tokens": tuple(replace(variant, finer=2) for variant in (DIT, MDTV2)),
    "updates": tuple(replace(variant, longer=3) for variant in (DIT, MDTV2)),
    "longest": tuple(replace(variant, longer=9) for variant in (DIT, MDTV2)),
    "mask-ratio": tuple(
        Variant(name=f"mask ratio {ratio}", family="mdt", model={"mask_ratio": ratio})
        for ratio in (0.3, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7)
    ),
    "decoder": tuple(
        Variant(name=f"{depth} decoder blocks", model={"decode_layer": depth}) for depth in (2, 0, 4)
    ),
    "parts": (
        MDTV2,
        Variant(name="no side-interpolater", without=("side",)),
        Variant(name="no relative position bias", without=("bias",)),
        Variant(name="all tokens alone", passes="all"),
        Variant(name="all tokens twice", passes="twice"),
        Variant(name="masked pass alone", passes="masked"),
        DIT,
    ),
    "min-snr": (
        Variant(name="min-SNR 5", diffusion={"min_snr_gamma": 5.0}),
        Variant(name="no min-SNR", diffusion={"min_snr_gamma": None}),
        Variant(name="DiT, min-SNR 5", family="dit", diffusion={"min_snr_gamma": 5.0}),
    ),
    "precision": (Variant(name="float32", train={"dtype": "float32"}), BFLOAT16, LEAN, FLOAT8, TORCHAO),
    "float8": (BFLOAT16, FLOAT8),  # the same, at a size that trains in bfloat16
    "path": (MDTV2, Variant(name="MDTv2, reference", implementation="reference")),
}
"""The first variant of each study is the baseline for the others."""

_DIGITS = RunConfig(
    model=ModelConfig(
        input_size=16, patch_size=4, in_channels=1, hidden_size=96, depth=6, num_heads=3, num_classes=10,
        decode_layer=2,
    ),
    data=DataConfig(source="digits", image_size=16, channels=1),
    diffusion=DiffusionConfig(noise_schedule="squaredcos_cap_v2", min_snr_gamma=None),
    train=TrainConfig(
        steps=1200, batch_size=64, optimizer="adamw", lr=2e-3, warmup_steps=50, ema_decay=0.99, device="cpu",
    ),
    sample=SampleConfig(
        num_samples=500, steps=10, sampler="unipc", cfg_scale=1.0, scale_pow=None, batch_size=125,
    ),
)  # fmt: skip

SIZES: dict[str, RunConfig] = {
    "cpu": _DIGITS,
    "gpu": replace(
        _DIGITS,
        model=replace(_DIGITS.model, input_size=32, patch_size=2, **SHAPES["S"]),
        data=replace(_DIGITS.data, image_size=32),
        train=replace(
            _DIGITS.train, steps=1500, batch_size=64, lr=5e-4, warmup_steps=100, ema_decay=0.998,
            device="cuda", dtype="bfloat16", cuda_graphs=True,
        ),
        # UniPC comes with diffusers, which the GPU machine may lack.
        sample=replace(_DIGITS.sample, sampler="ddim", steps=20),
    ),
    "imagenet": RunConfig(
        model=ModelConfig(**SHAPES["S"]),
        data=DataConfig(source="", image_size=256, channels=3, flip=True, workers=8),
        diffusion=DiffusionConfig(min_snr_gamma=None),
        train=TrainConfig(
            steps=400_000, batch_size=256, optimizer="adamw", lr=1e-4, device="cuda", dtype="bfloat16",
            compile="block",
        ),
        sample=SampleConfig(
            num_samples=10_000, steps=20, sampler="unipc", cfg_scale=1.0, scale_pow=None, batch_size=250,
        ),
    ),
}  # fmt: skip
"""``cpu`` takes half an hour on two cores; ``gpu`` trains S-size models of 32 x 32 pixels; ``imagenet``
trains S/2 on latents, with the same optimiser for all, as in the papers' comparison."""
