"""MDTPipeline within autocast."""

from typing import Any

import pytest
import torch

from mdt_fast import DiffusionConfig, MDTPipeline
from mdt_fast.pipelines import published_scheduler
from small_models import made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_holds_in_it(dtype: torch.dtype) -> None:
    model, seen = made("mdtv2", torch.float32).eval(), set()
    model.en_inblocks[0].attn.proj.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    pipe = MDTPipeline(model, published_scheduler(DiffusionConfig(), sampler="ddim"))
    pipe.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    how["latents"] = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        inside = pipe([1, 2], **how).images
        with torch.autocast("cpu", enabled=False):
            off = pipe([1, 2], **how).images
        assert torch.is_autocast_enabled("cpu")
    assert seen == {dtype, torch.float32}
    outside = pipe([1, 2], **how).images
    assert inside.dtype == torch.float32
    assert torch.equal(off, outside)
    assert 0 < (inside - outside).norm() / outside.norm() < 0.03
