"""The autoencoder and its posterior against diffusers' own calls; what is not an autoencoder is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoders import save_tiny_vae
from mdt_fast.data import Autoencoder, autoencoder, sample_posterior
from mdt_fast.errors import UserError


@pytest.fixture(scope="module")
def vae(tiny_vae: Path) -> Autoencoder:
    return Autoencoder.load(tiny_vae)


def test_properties_are_the_configs(vae: Autoencoder, tiny_vae: Path, tmp_path: Path) -> None:
    assert (vae.latent_channels, vae.factor, vae.scale, vae.shift) == (4, 2, 0.18215, 0.0)
    assert (vae.image_channels, vae.name) == (3, str(tiny_vae))
    other = save_tiny_vae(
        tmp_path / "vae",
        latent_channels=2,
        scaling_factor=0.5,
        shift_factor=0.25,
        in_channels=1,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    loaded = Autoencoder.load(other)
    assert (loaded.latent_channels, loaded.factor, loaded.scale, loaded.shift) == (2, 4, 0.5, 0.25)
    assert loaded.image_channels == 1


def test_moments_and_posterior_are_those_of_diffusers(vae: Autoencoder) -> None:
    pixels = torch.rand(3, 3, 16, 12) * 2 - 1
    moments = vae.moments(pixels)
    assert (moments.shape, moments.dtype, moments.requires_grad) == ((3, 8, 8, 6), torch.float32, False)
    with torch.no_grad():
        posterior = vae.model.encode(pixels).latent_dist
    torch.manual_seed(1)
    expected = posterior.sample() * 0.18215
    torch.manual_seed(1)
    assert torch.equal(sample_posterior(moments, torch.randn(3, 4, 8, 6), vae.scale, vae.shift), expected)
    assert torch.equal(sample_posterior(moments, torch.zeros(3, 4, 8, 6), 2.0), posterior.mode() * 2)
    assert torch.equal(
        sample_posterior(moments, torch.zeros(3, 4, 8, 6), 2.0, 0.5), (posterior.mode() - 0.5) * 2
    )


def test_log_variance_is_clamped_as_in_diffusers(tiny_vae: Path) -> None:
    vae = Autoencoder.load(tiny_vae)
    with torch.no_grad():
        vae.model.quant_conv.bias[4:] = torch.tensor([100.0, -100.0, 0.0, 19.0])
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    _, logvar = vae.moments(pixels).chunk(2, dim=1)
    assert (logvar[:, 0] == 20).all()
    assert (logvar[:, 1] == -30).all()
    with torch.no_grad():
        assert torch.equal(logvar, vae.model.encode(pixels).latent_dist.logvar)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_decode_is_that_of_diffusers(vae: Autoencoder, shift: float) -> None:
    latents = torch.randn(2, 4, 5, 4)
    shifted = Autoencoder(vae.model, vae.name)
    shifted.shift = shift
    with torch.no_grad():
        expected = vae.model.decode(latents / 0.18215 + shift).sample
    pixels = shifted.decode(latents)
    assert torch.equal(pixels, expected)
    assert (pixels.shape, pixels.dtype, pixels.requires_grad) == ((2, 3, 10, 8), torch.float32, False)


@pytest.mark.parametrize("images", [1, 5])
def test_as_many_as_fit_are_decoded_at_once(
    images: int, vae: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, decode, sizes = torch.randn(images, 4, 5, 4), vae.model.decode, []
    with torch.no_grad():
        expected = decode(latents / 0.18215).sample
    monkeypatch.setattr(vae.model, "decode", lambda z: sizes.append(len(z)) or decode(z))
    monkeypatch.setattr(autoencoder, "DECODED_AT_ONCE", 2 * 10 * 8 + 7)
    assert torch.allclose(vae.decode(latents), expected, atol=1e-5)
    assert sizes == {1: [1], 5: [2, 2, 1]}[images]


def test_half_precision_computes_in_it_and_answers_in_float32(vae: Autoencoder, tiny_vae: Path) -> None:
    half = Autoencoder.load(tiny_vae, dtype=torch.bfloat16)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    assert half.model.dtype == torch.bfloat16
    assert half.fingerprint == vae.fingerprint
    moments = half.moments(pixels)
    assert moments.dtype == half.decode(moments[:, :4]).dtype == torch.float32
    torch.testing.assert_close(moments, vae.moments(pixels), atol=0.1, rtol=0.1)


def test_the_fingerprint_is_that_of_the_weights(vae: Autoencoder, tiny_vae: Path, tmp_path: Path) -> None:
    assert Autoencoder.load(shutil.copytree(tiny_vae, tmp_path / "copy")).fingerprint == vae.fingerprint
    assert Autoencoder.load(save_tiny_vae(tmp_path / "other", seed=1)).fingerprint != vae.fingerprint


def test_a_pipelines_folder_has_the_autoencoder_in_vae(tiny_vae: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vae, tmp_path / "pipeline" / "vae")
    assert Autoencoder.load(tmp_path / "pipeline").name == str(tmp_path / "pipeline" / "vae")


def test_what_is_no_autoencoder_is_named(tiny_vae: Path, tmp_path: Path) -> None:
    def edited(name: str, config: str | None, weights: bytes | None = b"") -> Path:
        folder = Path(shutil.copytree(tiny_vae, tmp_path / name))
        if config is not None:
            (folder / "config.json").write_text(config)
        if weights is None:
            (folder / "diffusion_pytorch_model.safetensors").unlink()
        elif weights:
            (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        return folder

    config = json.loads((tiny_vae / "config.json").read_text())
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("", "vae: got '', expected a folder or a hub name"),
        (tmp_path / "nowhere", "vae: no folder '.*nowhere', nor is it a hub name"),
        ("nowhere", "vae: no folder 'nowhere', nor"),
        ("./a/b", "vae: no folder './a/b', nor"),
        (tmp_path / "empty", "vae: no autoencoder in '.*empty': it has no config.json"),
        (tiny_vae / "config.json", "vae: '.*config.json' is a file"),
        (edited("json", "{"), "vae: '.*config.json' is not the config.json of an AutoencoderKL"),
        (edited("list", "[]"), "vae: '.*config.json' is not the config.json"),
        (edited("unet", '{"_class_name": "UNet2DModel"}'), "holds 'UNet2DModel'; an AutoencoderKL is needed"),
        (edited("bare", None, None), "vae: cannot load an AutoencoderKL from the folder '.*bare'"),
        (edited("cut", None, b"\x00" * 100), "vae: cannot load an AutoencoderKL from the folder '.*cut'"),
        (edited("wide", json.dumps({**config, "block_out_channels": [8, 16]})), "vae: cannot load"),
        (edited("per", json.dumps({**config, "latents_mean": [0.0] * 4})), "vae: .* scales each channel"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Autoencoder.load(path)
        assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(tiny_vae: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vae, tmp_path / "vae"))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["quant_conv.bias"]
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"vae: '.*vae' lacks 1 weights, such as 'quant_conv.bias'"):
        Autoencoder.load(folder)


def test_pickled_weights_are_not_read(tiny_vae: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vae, tmp_path / "vae"))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Autoencoder.load(tiny_vae).model.state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"vae: cannot load .*safetensors"):
        Autoencoder.load(folder)


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="vae: cannot load an AutoencoderKL from the hub's 'nobody/nothing'"):
        Autoencoder.load("nobody/nothing")


def test_without_diffusers_the_error_says_what_to_install(
    tiny_vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'mdt-fast\[latents\]'"):
        Autoencoder.load(tiny_vae)
