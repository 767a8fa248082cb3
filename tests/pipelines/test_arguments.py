"""MDTPipeline's arguments: each mistake gets one line that names the argument, before anything is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file

from mdt_fast import DiffusionConfig, MDTPipeline, UserError
from mdt_fast.config import ModelConfig, SamplerName
from mdt_fast.models.hub import WEIGHTS
from mdt_fast.models.zoo import build_model
from mdt_fast.pipelines import published_scheduler

SCHEDULER = published_scheduler(DiffusionConfig(), sampler="ddim")
MODEL = ModelConfig(
    family="mdtv2", input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2,
    num_classes=10, decode_layer=1,
)  # fmt: skip
USUAL: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "latent"}
ZEROS = torch.zeros(2, 4, 4, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_model(MODEL)


def piped(model: Any, scheduler: Any = SCHEDULER, **parts: Any) -> MDTPipeline:
    pipe = MDTPipeline(model, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 1.5}, "class_labels: got 1.5, expected 0 to 9"),
        ({"class_labels": None}, "class_labels: got None, expected 0 to 9"),
        ({"class_labels": torch.tensor([1.0, 2.0])}, "class_labels: got 1.0, expected 0 to 9"),
        ({"guidance_scale": "4"}, "guidance_scale: got '4', expected a number"),
        ({"guidance_scale": [2]}, "guidance_scale: got [2], expected a number"),
        ({"guidance_scale": torch.ones(2, 2)}, "guidance_scale: got tensor("),
        ({"scale_pow": "x"}, "scale_pow: got 'x', expected None, 'auto' or a number"),
        ({"guided_channels": 1.5}, "guided_channels: got 1.5, expected 1 to 4"),
        ({"guided_channels": True}, "guided_channels: got True, expected 1 to 4"),
        ({"eta": "a"}, "eta: got 'a', expected a number"),
        ({"eta": None}, "eta: got None, expected a number"),
        ({"generator": [None, None]}, "generator: got NoneType in a list, expected a torch.Generator"),
        ({"generator": "ab"}, "generator: got str in a list, expected a torch.Generator"),
        ({"num_inference_steps": True}, "num_inference_steps: got True, expected 1 to 1000"),
        ({"num_inference_steps": None}, "num_inference_steps: got None, expected 1 to 1000"),
        ({"output_type": 3}, "output_type: got 3, expected pil, np, pt, latent"),
        ({"latents": ZEROS.numpy()}, "latents: got ndarray, expected a tensor or None"),
        (
            {"latents": ZEROS.to(torch.complex64)},
            "latents: dtype torch.complex64, expected a floating-point",
        ),
        ({"latents": ZEROS.long()}, "latents: dtype torch.int64, expected a floating-point"),
        ({"latents": ZEROS * float("nan")}, "latents: got NaN or infinities, expected finite numbers"),
    ],
)
def test_refused_calls(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        piped(model)(**{**USUAL, **arguments})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_taken(model: Any) -> None:
    def drawn(**how: Any) -> torch.Tensor:
        return piped(model)(**{**USUAL, "latents": ZEROS + 1, **how}).images

    numbers = {"class_labels": np.array([1, 2]), "num_inference_steps": np.int64(3), "eta": np.float32(0)}
    got = drawn(**numbers, guidance_scale=np.float64(2), guided_channels=np.int32(4), scale_pow=np.float32(2))
    assert torch.equal(got, drawn(num_inference_steps=3, guidance_scale=2, guided_channels=4, scale_pow=2))


def test_refused_parts(model: Any) -> None:
    for parts, message in (
        ({"scheduler": None}, "scheduler: got NoneType, expected one of diffusers'"),
        ({"scheduler": "x"}, "scheduler: got str, expected one of diffusers'"),
        ({"id2label": ["cat"]}, "id2label: got list, expected names by class"),
        ({"id2label": "cat"}, "id2label: got str, expected names by class"),
        ({"id2label": {"one": "cat"}}, "id2label: got the class 'one', expected a number"),
        ({"id2label": {1.5: "cat"}}, "id2label: got the class 1.5, expected a number"),
        ({"id2label": {1: 5}}, "id2label: got 5 for class 1, expected a string"),
        ({"id2label": {-1: "cat"}}, "id2label: got the class -1, expected 0 to 9"),
    ):
        with pytest.raises(UserError) as caught:
            piped(model, **parts)
        assert str(caught.value).startswith(message)
    pipe = piped(model, id2label={1: "cat", "2": "dog"})
    assert pipe.get_label_ids(("dog", "cat")) == [2, 1]
    for label in (5, None):
        with pytest.raises(UserError, match=f"label: got {label}, expected a name or several"):
            pipe.get_label_ids(label)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_schedules_that_end_in_noise_alone(model: Any, cls: Any) -> None:
    """Predicted noise would be divided by zero; a predicted image needs no division."""
    ends = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(UserError, match="rescale_betas_zero_snr=True: its first step starts from pure noise"):
        piped(model, cls(**ends))(**USUAL)
    images = piped(model, cls(**ends, prediction_type="sample"))(**USUAL).images
    assert images.isfinite().all()


def refused(folder: Path, message: str, **how: Any) -> None:
    with pytest.raises(UserError) as caught:
        MDTPipeline.from_pretrained(folder, **how)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders(model: Any, tmp_path: Path) -> None:
    piped(model).save_pretrained(tmp_path)
    half = MDTPipeline.from_pretrained(tmp_path, torch_dtype="float16")
    assert half.transformer.dtype == torch.float16
    refused(tmp_path, "torch_dtype: got torch.int8, expected float32, ", torch_dtype=torch.int8)
    refused(tmp_path, "torch_dtype: got 'half', expected float32, ", torch_dtype="half")
    weights = tmp_path / "transformer" / WEIGHTS
    whole, state = weights.read_bytes(), load_file(weights)
    key = "final_layer.linear.weight"
    save_file({**state, key: torch.full_like(state[key], float("nan"))}, weights)
    refused(tmp_path, f"weights that are not finite: 1 tensors ({key})")
    weights.write_bytes(whole)
    config = weights.with_name("config.json")
    config.write_text(config.read_text().replace('"mask_ratio": 0.3', '"mask_ratio": 0.4'))
    refused(tmp_path, "was saved with another config.json than the one beside it")


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_a_solver_takes_no_noise_level_twice(model: Any, sampler: SamplerName, karras: bool) -> None:
    """Diffusers returns NaN for as many steps as were trained, or fails inside."""
    scheduler = published_scheduler(DiffusionConfig(diffusion_steps=50), sampler=sampler)
    pipe = piped(model, type(scheduler).from_config(scheduler.config, use_karras_sigmas=karras))
    with pytest.raises(UserError, match=r"^num_inference_steps: got 50, expected fewer: "):
        pipe(**{**USUAL, "num_inference_steps": 50})
    assert pipe(**{**USUAL, "num_inference_steps": 40}).images.isfinite().all()
