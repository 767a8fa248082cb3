"""MDTPipeline: the pictures of ``mdt_fast.sample`` and of diffusers' own pipeline; folders; refusals."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from diffusers.utils import is_scipy_available
from PIL import Image

import mdt_fast
from mdt_fast import DiffusionConfig, MDTPipeline, SampleConfig, Transformer, UserError
from mdt_fast.config import Family, ModelConfig, SamplerName
from mdt_fast.models.zoo import build_model
from mdt_fast.pipelines import published_scheduler
from mdt_fast.pipelines.schedulers import ready
from mdt_fast.sampling.generate import PerImageNoise
from tolerances import FLOAT32, relative_error

LABELS = [3, 1, 3, 5]
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "white shark"}


def made(family: Family = "mdtv2", **changes: Any) -> Any:
    """A small model with random weights."""
    shape = {
        "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 4, "num_heads": 2,
        "num_classes": 10, "decode_layer": 0 if family == "dit" else 2,
    }  # fmt: skip
    model = build_model(ModelConfig(family=family, **{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def piped(model: Any, scheduler: Any = None, **parts: Any) -> MDTPipeline:
    pipe = MDTPipeline(model, scheduler or published_scheduler(DiffusionConfig()), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def vae(tiny_vae: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False).eval()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
def test_the_pictures_are_those_of_sample(family: Family, sampler: SamplerName) -> None:
    """With the same noise and the published respacing: 21 steps do not divide 1000, one falls on a half."""
    model = made(family)
    config = SampleConfig(steps=21, sampler=sampler, cfg_scale=3.8, scale_pow=4.0, seed=3)
    expected = mdt_fast.sample(model, DiffusionConfig(), LABELS, config, clip_denoised=False)
    pipe = piped(model, published_scheduler(DiffusionConfig(), sampler=sampler))
    noise = PerImageNoise(3, 0, len(LABELS)).generators
    got = pipe(LABELS, 3.8, noise, 21, "latent", scale_pow=4.0).images
    assert relative_error(got, expected) <= FLOAT32


@pytest.mark.parametrize("changes", [{"predict_xstart": True}, {"noise_schedule": "squaredcos_cap_v2"}])
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_every_process(sampler: SamplerName, learn_sigma: bool, changes: dict[str, Any]) -> None:
    """For pixels, which are clamped; without guidance; DDIM with noise."""
    model = made(in_channels=3, learn_sigma=learn_sigma)
    trained, eta = DiffusionConfig(**changes), 0.5 if sampler == "ddim" else 0.0
    config = SampleConfig(steps=9, sampler=sampler, cfg_scale=1, eta=eta)
    expected = mdt_fast.sample(model, trained, LABELS, config)
    pipe = piped(model, published_scheduler(trained, learn_sigma=learn_sigma, clip=True, sampler=sampler))
    got = pipe(LABELS, 1, PerImageNoise(0, 0, 4).generators, 9, "latent", eta=eta).images
    # diffusers' noise schedules are float32, and pictures are below 1 where their noise was 4.
    assert relative_error(got, expected) <= 10 * FLOAT32
    pictures = pipe(LABELS, 1, PerImageNoise(0, 0, 4).generators, 9, "np", eta=eta).images
    np.testing.assert_allclose(pictures, (got / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-6)


def test_timesteps_are_the_published_respacing() -> None:
    for sampler in ("ddpm", "ddim"):
        scheduler = published_scheduler(DiffusionConfig(), sampler=sampler)
        for steps in (1, 2, 21, 50, 250, 333, 1000):
            found = ready(scheduler, steps, torch.device("cpu"), True)
            assert found.times[::-1] == mdt_fast.create_diffusion(str(steps)).timestep_map
            assert len(found.timesteps) == steps


def same_weights_in_diffusers(model: Any) -> Any:
    """Diffusers' DiT, set to compute what was published (``mdt_fast/models/dit_of_diffusers.py``)."""
    from mdt_fast.models.dit_of_diffusers import AROUND, BLOCK, LABELS

    config, ours = model.config, model.state_dict()
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=4, out_channels=8, num_layers=config.depth, sample_size=config.input_size,
        num_embeds_ada_norm=config.num_classes, norm_eps=1e-6,
    )  # fmt: skip
    state = {}
    for part in ("weight", "bias"):
        for name, own in AROUND.items():
            state[f"{name}.{part}"] = ours[f"{own}.{part}"]
        for i in range(config.depth):
            there, here = f"transformer_blocks.{i}", f"blocks.{i}"
            for name, own in BLOCK.items():
                state[f"{there}.{name}.{part}"] = ours[f"{here}.{own}.{part}"]
            for name, own in zip("qkv", ours[f"{here}.attn.qkv.{part}"].chunk(3)):
                state[f"{there}.attn1.to_{name}.{part}"] = own
    state[LABELS] = ours["y_embedder.embedding_table.weight"]
    for key, value in list(state.items()):
        if ".norm1.emb." in key:
            for i in range(1, config.depth):
                state[key.replace("blocks.0", f"blocks.{i}", 1)] = value
    theirs.load_state_dict(state)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs.eval()


def test_diffusers_own_pipeline_draws_the_same(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1000 classes, as ``DiTPipeline``'s null class is 1000; it guides all four channels."""
    model = made("dit", num_classes=1000)
    model.pos_embed.data = build_model(model.config).pos_embed.data
    scheduler = DDIMScheduler(clip_sample=False)  # its own default timesteps
    theirs = diffusers.DiTPipeline(same_weights_in_diffusers(model), vae, scheduler)
    theirs.set_progress_bar_config(disable=True)
    ours = piped(model, scheduler, vae=vae)
    seeded: Callable[[], torch.Generator] = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    for scale in (4.0, 1.0):
        expected = theirs([207, 360], scale, seeded(), 10, "pt").images
        got = ours([207, 360], scale, seeded(), 10, "pt", guided_channels=4).images
        assert relative_error(got, expected) <= 10 * FLOAT32
    published = ours([207, 360], 4.0, seeded(), 10, "pt").images
    assert relative_error(published, expected) > 1e-3  # three channels


DETERMINISTIC = [
    "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
RANDOM = ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler"]


def test_schedulers_are_interchangeable() -> None:
    """Each draws finite pictures, and those that solve the same equation nearly the same ones."""
    pipe, noise = piped(made("dit", hidden_size=8, depth=1)), torch.randn(2, 4, 8, 8)
    published, pictures = pipe.scheduler.config, {}
    for name in DETERMINISTIC + RANDOM:
        if name == "LMSDiscreteScheduler" and not is_scipy_available():
            continue
        pipe.scheduler = getattr(diffusers, name).from_config(published)
        generator = torch.Generator().manual_seed(0)
        pictures[name] = pipe([3, 5], 2.0, generator, 40, "latent", latents=noise).images
        assert pictures[name].shape == (2, 4, 8, 8)
        assert pictures[name].isfinite().all(), name
        if name in DETERMINISTIC:
            assert relative_error(pictures[name], pictures["DDIMScheduler"]) < 0.15, name


def test_a_folder_comes_back(vae: AutoencoderKL, tmp_path: Path) -> None:
    pipe = piped(made(), vae=vae, id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MDTPipeline"
    assert index["transformer"] == ["mdt_fast", "MDTv2"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["id2label"] == {str(key): value for key, value in NAMES.items()}

    again = MDTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.labels == pipe.labels
    assert again.scheduler.config.timestep_spacing == "linspace"
    how: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    expected = pipe([1, 2], generator=torch.Generator().manual_seed(1), **how).images
    assert torch.equal(again([1, 2], generator=torch.Generator().manual_seed(1), **how).images, expected)
    assert expected.shape == (2, 3, 16, 16)

    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["id2label"] == index["id2label"]
    half = MDTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == half.dtype == torch.bfloat16
    model = Transformer.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(model.final_layer.linear.weight, pipe.transformer.final_layer.linear.weight)
    exchanged = MDTPipeline.from_pretrained(tmp_path, vae=None, transformer=model)
    assert exchanged.vae is None
    assert exchanged.transformer is model


def test_from_the_hub(vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers treats this package's transformer like its own, and asks the hub for its files."""
    from diffusers.pipelines import pipeline_utils

    saved, cache = tmp_path / "saved", tmp_path / "cache"
    piped(made(), vae=vae).save_pretrained(saved)
    cache.mkdir()
    shutil.copy(saved / "model_index.json", cache)
    names = [path.relative_to(saved).as_posix() for path in saved.rglob("*.*")]
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    asked: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], **how: Any) -> str:
        asked.extend(allow_patterns)
        return str(saved)

    for name, stand_in in (
        ("model_info", lambda *args, **how: listed),
        ("hf_hub_download", lambda *args, **how: str(cache / "model_index.json")),
        ("snapshot_download", snapshot),
        ("_resolve_revision", lambda *args, **how: "main"),
    ):
        monkeypatch.setattr(pipeline_utils, name, stand_in, raising=False)
    assert type(MDTPipeline.from_pretrained("me/mdt").transformer) is mdt_fast.MDTv2
    assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(asked)


def test_a_model_in_training_goes_on_with_it() -> None:
    model = made().train()
    piped(model)([1, 2], num_inference_steps=2, output_type="latent")
    assert all(module.training for module in model.modules())


def test_pixels_need_no_autoencoder(tmp_path: Path) -> None:
    pipe = piped(made(in_channels=1), published_scheduler(DiffusionConfig(), clip=True, sampler="ddim"))
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    again = MDTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    result = again(3, num_inference_steps=2)
    assert isinstance(result.images[0], Image.Image)
    assert (result.images[0].size, result.images[0].mode) == ((8, 8), "L")
    (pictures,) = again(np.array([1, 2]), num_inference_steps=2, output_type="np", return_dict=False)
    assert pictures.shape == (2, 8, 8, 1)
    assert (pictures >= 0).all()
    assert (pictures <= 1).all()


def test_the_device_and_dtype_move(vae: AutoencoderKL) -> None:
    pipe = piped(made("dit"), vae=vae).to("cpu", torch.bfloat16)
    assert pipe.transformer.dtype == vae.dtype == torch.bfloat16
    images = pipe([1], num_inference_steps=2, output_type="pt").images
    assert images.dtype == torch.float32
    assert pipe([1], num_inference_steps=2, output_type="latent").images.dtype == torch.float32
    double = piped(made("dit").double())
    assert double([1], num_inference_steps=2, output_type="latent").images.dtype == torch.float64


def test_what_is_wrapped_is_called_whole() -> None:
    """With ``torch.compile``, or a forward in front of the model's own, the model is not run in parts."""
    model = made("mdt", depth=2, decode_layer=1)
    noise, calls = torch.randn(2, 4, 8, 8), []
    how: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "latents": noise}
    ddim = published_scheduler(DiffusionConfig(), sampler="ddim")
    expected = piped(model, ddim)([1, 2], **how).images
    inner = model.forward
    model.forward = lambda *args: calls.append(len(args[0])) or inner(*args)
    assert relative_error(piped(model, ddim)([1, 2], **how).images, expected) <= FLOAT32
    assert calls == [2, 4, 4]  # at the first step the guidance weight is 1
    del model.forward
    with torch.compiler.set_stance("force_eager"):  # compilation itself does not matter here
        assert relative_error(piped(torch.compile(model), ddim)([1, 2], **how).images, expected) <= FLOAT32


def test_names_of_classes() -> None:
    pipe = piped(made(), id2label=NAMES)
    assert pipe.get_label_ids(["white shark", "Tinca tinca", "tench"]) == [2, 0, 0]
    assert pipe.get_label_ids("goldfish") == [1]
    assert pipe.get_label_ids([NAMES[0], "tench"]) == [0, 0]
    with pytest.raises(UserError, match=r"label: 'goldfsh' is no class \(did you mean 'goldfish'\?\)"):
        pipe.get_label_ids(["goldfsh"])
    with pytest.raises(UserError, match="has no names of classes"):
        piped(made()).get_label_ids("goldfish")


def test_one_generator_for_each_image() -> None:
    pipe = piped(made())
    seeded: Callable[[int], torch.Generator] = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    both = pipe([1, 2], generator=[seeded(1), seeded(2)], num_inference_steps=3, output_type="latent").images
    one = pipe([2], generator=[seeded(2)], num_inference_steps=3, output_type="latent").images
    assert relative_error(both[1:], one) <= FLOAT32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [3, 10]}, "class_labels: got 10, expected 0 to 9"),
        ({"class_labels": -1}, "class_labels: got -1, expected 0 to 9"),
        ({"class_labels": [1.5]}, "class_labels: got 1.5, expected 0 to 9"),
        ({"class_labels": []}, "class_labels: got none, expected one or more"),
        ({"class_labels": "cat"}, "class_labels: got 'cat'; get_label_ids finds classes by name"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, expected 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps: got 1001, expected 1 to 1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: got 2.5, expected 1 to 1000"),
        ({"generator": [torch.Generator()]}, "generator: got 1 in a list, expected one"),
        ({"generator": 3}, "generator: got int, expected a torch.Generator"),
        ({"eta": 0.5}, "eta: got 0.5, expected 0 to 1 with DDIM, and 0 with others"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan, expected a finite number"),
        ({"scale_pow": -1.0}, "scale_pow: got -1.0, expected None, or finite and at least 0"),
        ({"guided_channels": 5}, "guided_channels: got 5, expected 1 to 4"),
        ({"output_type": "png"}, "output_type: got 'png', expected pil, np, pt, latent"),
        ({"output_type": "pil"}, "output_type: 4 channels make no picture without a vae; use 'latent'"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents: got [1, 4, 8, 8], expected shape [2, 4, 8, 8]"),
    ],
)
def test_refused_calls(arguments: dict[str, Any], message: str) -> None:
    usual = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(UserError) as caught:
        piped(made())(**{**usual, **arguments})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_no_guidance_without_label_dropout() -> None:
    pipe = piped(made(class_dropout_prob=0))
    with pytest.raises(UserError, match="guidance_scale: a model trained without label dropout"):
        pipe([1], 4.0, num_inference_steps=2, output_type="latent")
    seed, few = torch.Generator().manual_seed, {"num_inference_steps": 2, "output_type": "latent"}
    usual, plain = (pipe([1], scale, seed(0), **few).images for scale in (None, 1.0))
    assert torch.equal(usual, plain)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler predicts None"),
        (DDIMScheduler(prediction_type="v_prediction"), "DDIMScheduler predicts 'v_prediction'"),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler uses timesteps -"),
        (DDPMScheduler(variance_type="learned"), "models of this kind learn its range (learned_range)"),
    ],
)
def test_refused_schedulers(scheduler: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        piped(made(), scheduler)([1], num_inference_steps=2, output_type="latent")
    assert message in str(caught.value)
    with pytest.raises(UserError, match="do not learn it"):
        piped(made(learn_sigma=False))([1], num_inference_steps=2, output_type="latent")


def test_refused_parts(vae: AutoencoderKL) -> None:
    scheduler = published_scheduler(DiffusionConfig())
    for parts, message in (
        ({"transformer": torch.nn.Linear(1, 1)}, "transformer: got Linear, expected an MDTv2, MDT or DiT"),
        ({"transformer": made(in_channels=3), "vae": vae}, "latents have 4 channels, the transformer's 3"),
        ({"transformer": made(), "vae": made()}, "vae: got MDTv2, expected an AutoencoderKL or None"),
        ({"transformer": made(), "id2label": {10: "x"}}, "id2label: got the class 10, expected 0 to 9"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            MDTPipeline(scheduler=scheduler, **parts)
        assert message in str(caught.value)


def refused(folder: Any, message: str, **how: Any) -> None:
    with pytest.raises(UserError) as caught:
        MDTPipeline.from_pretrained(folder, **how)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_folders(tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    piped(made()).save_pretrained(folder)
    refused(tmp_path / "none", "expected a folder or a hub name")
    refused("nowhere", "got 'nowhere', expected a folder or a hub name")
    refused(tmp_path, "no model_index.json in")
    refused(folder / "transformer", "it may be a model's: Transformer.from_pretrained loads those")
    refused(folder, "pickled weights are never read", use_safetensors=False)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path / "run", "it is a run: MDTPipeline.from_run makes a pipeline of it")

    config = folder / "transformer" / "config.json"
    whole = config.read_text()
    for text, message in (
        ("{", "not a readable config.json"),
        (json.dumps({**json.loads(whole), "depth": 6}), "weights of another model"),
    ):
        config.write_text(text)
        refused(folder, message)
    config.write_text(whole)
    index = folder / "model_index.json"
    for text in ("{", json.dumps({**json.loads(index.read_text()), "transformer": ["mdt_fast", "MTDv2"]})):
        index.write_text(text)
        refused(folder, "no pipeline can be made of")


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"MDTPipeline: needs diffusers.*'mdt-fast\[latents\]'"):
        _ = mdt_fast.MDTPipeline
