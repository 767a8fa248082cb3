"""The options of ``sample`` and ``export``, and their help."""

from typing import Any

from .config import SAMPLERS, SHARD_SIZE

SAMPLE_HELP = """\
Sample images with a run's EMA weights. Labels cycle through all classes unless --labels names some.

  mdt-fast sample runs/digits --num-samples 200 --steps 50 --cfg-scale 2 --npz samples.npz
  mdt-fast sample runs/digits --labels 3,7 --num-samples 20 --grid threes-and-sevens.png
  mdt-fast sample runs/photos --labels cat,dog --sampler dpm++ --steps 20 --grid pets.png
  mdt-fast sample mdt_xl2_v2_ckpt.pt --dtype bfloat16 --labels 207,360 --num-samples 8 --grid dogs.png
  mdt-fast sample runs/photos --image cat.jpg --mask hole.png --labels cat --num-samples 8

  torchrun --nproc-per-node 8 -m mdt_fast sample runs/xl2 --num-samples 50000 --out samples

With --image and --mask, the white part of the mask is generated and the rest is kept (docs/inpainting.md).
With --out, run the same command again after a stop or kill, with any number of processes, to resume; other
settings or another checkpoint are refused."""

EXPORT_HELP = """\
Write one sampling step with a run's EMA weights as a .pt2 file that runs without this package: an exported
program, or with --aoti one compiled by AOTInductor (docs/export.md).

  mdt-fast export runs/digits step.pt2
  mdt-fast export runs/digits step.pt2 --aoti --batch 8"""

OF_RUN = "(default: the run's)"
RUN_HELP = "a run's folder, one of its checkpoints, or a weights file (.pt, .safetensors)"
THREADS_HELP = "CPU threads (default: all cores); on a shared machine 1 is often the fastest"


def add_sample(commands: Any) -> None:
    sample = commands.add_parser("sample", help="sample images from a trained run", description=SAMPLE_HELP)
    add = sample.add_argument
    add("run", metavar="RUN", help=RUN_HELP)
    add("--num-samples", type=int, metavar="N", help=f"how many images {OF_RUN}")
    add("--steps", type=int, metavar="N", help=f"sampling steps {OF_RUN}")
    add(
        "--sampler",
        choices=SAMPLERS,
        help=f"ddpm: ancestral, as published; dpm++ and unipc need diffusers {OF_RUN}",
    )
    add("--eta", type=float, metavar="X", help=f"ddim noise: 0 none, 1 as ddpm {OF_RUN}")
    add("--cfg-scale", type=float, metavar="X", help=f"classifier-free guidance scale; 1 is none {OF_RUN}")
    add(
        "--scale-pow",
        metavar="P|none|auto",
        help=f"exponent of the cosine guidance schedule; none: constant; auto: as published {OF_RUN}",
    )
    add(
        "--cfg-interval",
        metavar="LOW,HIGH",
        help=f"guide only from timestep LOW to HIGH; fractions of them all if HIGH is at most 1 {OF_RUN}",
    )
    add(
        "--skip-below",
        type=float,
        metavar="X",
        help=f"no guidance where its weight is within X of 1: faster, not exact {OF_RUN}",
    )
    add("--guided-channels", type=int, metavar="N", help=f"guide only the first N channels {OF_RUN}")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help=f"compute dtype of the model {OF_RUN}",
    )
    add(
        "--float8",
        action="store_true",
        help="with --dtype bfloat16: float8 matmuls in the blocks, not exact (GPUs since Ada and Hopper)",
    )
    add(
        "--labels",
        metavar="A,B,...",
        help="classes by name or index, cycled up to --num-samples (default: all)",
    )
    add(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="ema (default), or model: the last step's weights, which are better early in training",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help=f"image i depends only on the seed, i, its class and the settings {OF_RUN}",
    )
    add("--batch-size", type=int, metavar="N", help=f"images per batch {OF_RUN}")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    add("--threads", type=int, metavar="N", help=THREADS_HELP)
    add("--vae", metavar="PATH|NAME", help="autoencoder (default: the one the run was trained with)")
    add(
        "--image",
        metavar="FILE",
        help="an image to inpaint where --mask is white, or a .npy in the model's own space",
    )
    add("--mask", metavar="FILE", help="same size as --image: white is generated, black is kept")
    add(
        "--hide",
        type=float,
        metavar="X",
        help="fraction of sampling, from its start, that hides unknown tokens from the encoder (default: 0)",
    )
    add("--resample", type=int, metavar="N", help="do each step N times, re-noised in between (default: 1)")
    add("--npz", metavar="FILE", help="arr_0 uint8 [N, S, S, C] and arr_1 labels")
    add("--grid", metavar="FILE", help="one PNG, a row per class (default: RUN/grid.png)")
    add("--png", metavar="DIR", help="one PNG per image")
    add("--out", metavar="DIR", help="shards, so that sampling can resume; then samples_NxHxWxC.npz")
    add("--shard-size", type=int, metavar="N", help=f"with --out: images per shard (default: {SHARD_SIZE})")


def add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="write a sampling step as a .pt2 file, to run elsewhere", description=EXPORT_HELP
    )
    add = export.add_argument
    add("run", metavar="RUN", help=RUN_HELP)
    add("target", metavar="FILE", help="the .pt2 file to write")
    add("--aoti", action="store_true", help="compile it for this machine (needs a C++ compiler)")
    add("--batch", default="dynamic", metavar="N|dynamic", help="batch size (default: dynamic, any)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    add("--threads", type=int, metavar="N", help=THREADS_HELP)
