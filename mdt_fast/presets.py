"""Recipes by name: two that a CPU can train, and the published ones for ImageNet at 256 x 256 pixels."""

from .config import DataConfig, DiffusionConfig, Family, ModelConfig, RunConfig, SampleConfig, TrainConfig

PRESETS: dict[str, RunConfig] = {
    # scikit-learn's handwritten digits in pixel space: minutes on two CPU cores.
    "digits": RunConfig(
        model=ModelConfig(
            family="mdtv2",
            input_size=8,
            patch_size=2,
            in_channels=1,
            hidden_size=128,
            depth=6,
            num_heads=4,
            num_classes=10,
            decode_layer=2,
        ),
        data=DataConfig(source="digits", image_size=8, channels=1),
        diffusion=DiffusionConfig(noise_schedule="squaredcos_cap_v2"),
        train=TrainConfig(
            steps=1000,
            batch_size=64,
            optimizer="adamw",
            lr=3e-3,
            warmup_steps=50,
            ema_decay=0.995,
        ),
        sample=SampleConfig(scale_pow=None),
    ),
    # Any folder of images, in pixel space, at a size that a CPU can still train.
    "images": RunConfig(
        model=ModelConfig(
            family="mdtv2",
            input_size=32,
            patch_size=4,
            in_channels=3,
            hidden_size=192,
            depth=8,
            num_heads=3,
            num_classes=10,
            decode_layer=2,
        ),
        data=DataConfig(source="", image_size=32, channels=3, flip=True),
        diffusion=DiffusionConfig(noise_schedule="squaredcos_cap_v2"),
        train=TrainConfig(
            steps=5000,
            batch_size=64,
            optimizer="adamw",
            lr=1e-3,
            warmup_steps=100,
            ema_decay=0.999,
        ),
        sample=SampleConfig(scale_pow=None),
    ),
}

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCHES: dict[Family, tuple[str, tuple[int, ...]]] = {
    "mdtv2": ("MDTv2", (2,)),
    "mdt": ("MDT", (2, 4, 8)),
    "dit": ("DiT", (2, 4, 8)),
}
VAE = "stabilityai/sd-vae-ft-mse"


def decode_layer(family: Family, size: str) -> int:
    """The published number of decoder blocks."""
    return {"mdtv2": 6 if size == "S" else 4, "mdt": 2, "dit": 0}[family]


def published(family: Family, size: str, patch: int) -> RunConfig:
    """The published recipe of a model, for latents of 256 x 256 pixels and batch size 256.

    It uses bfloat16 and compiled blocks, whereas the published runs were float32 and eager;
    ``train.dtype=float32 train.compile=none`` reproduces that. The length of the published runs was not
    fixed: ``steps`` is that of the papers' comparisons, and for MDTv2-XL/2 that of the best model.
    """
    mdtv2, dit = family == "mdtv2", family == "dit"
    return RunConfig(
        model=ModelConfig(
            family=family,
            patch_size=patch,
            mask_ratio=None if dit else 0.3,
            decode_layer=decode_layer(family, size),
            depth=SIZES[size]["depth"],
            hidden_size=SIZES[size]["hidden_size"],
            num_heads=SIZES[size]["num_heads"],
        ),
        data=DataConfig(source="", image_size=256, channels=3, flip=True, vae=VAE, workers=8),
        diffusion=DiffusionConfig(min_snr_gamma=5.0 if mdtv2 else None),
        train=TrainConfig(
            steps=2_000_000 if mdtv2 and size == "XL" else 400_000,
            batch_size=256,
            optimizer="adan" if mdtv2 else "adamw",
            lr=1e-4 if dit else 5e-4 if mdtv2 and size == "S" else 3e-4,
            max_grad_norm=1.0 if mdtv2 else 0.0,
            log_every=100,
            save_every=10_000,
            keep_every=100_000,
            dtype="bfloat16",
            compile="block",
        ),
        sample=SampleConfig(
            steps=250,
            sampler="ddpm",
            cfg_scale=4.0 if dit else 3.8,
            scale_pow=None if dit else 4.0,
            batch_size=32,
        ),
    )


PRESETS |= {
    f"{name.lower()}-{size.lower()}{patch}": published(family, size, patch)
    for family, (name, patches) in PATCHES.items()
    for size in SIZES
    for patch in patches
}
