"""FLOPs of a step against the published numbers and plain averaging; peaks by the names of GPUs."""

import subprocess
import sys

import pytest
import torch

from mdt_fast.config import ModelConfig
from mdt_fast.masking import draw_len_keep
from mdt_fast.models import flops
from mdt_fast.models.zoo import model_config
from mdt_fast.training import speed
from mdt_fast.training.speed import Peak, Speed, kept_shares, peak_flops, peak_of, step_flops

TINY = ModelConfig(
    input_size=8, patch_size=1, in_channels=1, hidden_size=16, depth=2, num_heads=2, decode_layer=1
)


@pytest.mark.parametrize(
    ("name", "decode_layer", "tflop"),
    [("MDTv2_S_2", 6, 0.0756), ("MDTv2_B_2", 4, 0.276), ("MDT_XL_2", 2, 1.2455), ("MDTv2_XL_2", 4, 1.31)],
)
def test_step_flops_are_as_published(name: str, decode_layer: int, tflop: float) -> None:
    config = model_config(name, mask_ratio=0.3, decode_layer=decode_layer)
    assert step_flops(config) / 1e12 == pytest.approx(tflop, rel=2e-3)


def test_three_counts_give_the_mean_over_all_kept_lengths() -> None:
    shares = kept_shares(TINY)
    assert len(shares) > 3
    mean = sum(share * flops.train_step(TINY, K).flops for K, share in shares.items())
    assert step_flops(TINY) == pytest.approx(mean, rel=1e-9)


def test_few_lengths_are_counted_one_by_one() -> None:
    config = ModelConfig(
        input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, decode_layer=0
    )
    shares = kept_shares(config)
    assert len(shares) <= 3
    mean = sum(share * flops.train_step(config, K).flops for K, share in shares.items())
    assert step_flops(config) == pytest.approx(mean, rel=1e-12)


def test_a_model_without_masks_has_one_pass() -> None:
    dit = ModelConfig(
        family="dit", input_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, mask_ratio=None
    )
    assert step_flops(dit) == flops.train_step(dit, None).flops


def test_shares_are_those_of_the_draws() -> None:
    config = model_config("MDTv2_S_2", mask_ratio=0.3, decode_layer=6)
    shares = kept_shares(config)
    assert list(shares) == list(range(128, 180))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[150] == pytest.approx(5 / 256)
    assert shares[179] == pytest.approx(1 / 256)
    torch.manual_seed(0)
    drawn = [draw_len_keep(256, 0.3) for _ in range(20_000)]
    assert set(drawn) == set(shares)
    assert sum(drawn) / len(drawn) == pytest.approx(sum(K * share for K, share in shares.items()), abs=0.4)


def test_mdt_v1_keeps_one_length() -> None:
    assert kept_shares(model_config("MDT_XL_2", mask_ratio=0.3, decode_layer=2)) == {179: 1.0}


def test_counting_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    step_flops.__wrapped__(TINY)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 480GB", 990, 67),
        ("NVIDIA H800", 989.5, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("Tesla V100-PCIE-16GB", None, 14.0),
        # Names that contain one of the table's but are not in it.
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peak_by_the_name_of_the_gpu(name: str, bfloat16: float | None, float32: float | None) -> None:
    for dtype, tflop in (("bfloat16", bfloat16), ("float32", float32)):
        assert peak_of(name, dtype) == (None if tflop is None else pytest.approx(tflop * 1e12))


def test_tf32_is_float32_where_there_is_none() -> None:
    assert peak_of("NVIDIA A100-SXM4-40GB", "tf32") == 156e12
    assert peak_of("Tesla V100-SXM2-32GB", "tf32") == 15.7e12


def test_float32_peak_follows_what_torch_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak_flops(torch.device("cuda"), "float32") == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert peak_flops(torch.device("cuda"), "float32") == 156e12
        assert peak_flops(torch.device("cuda"), "bfloat16") == 312e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_row_of_the_table_is_found_by_its_own_name() -> None:
    for row in speed.PEAKS:
        assert peak_of(f"NVIDIA {row.name}", "float16") == row.float16 * 1e12, row.name
        for narrow, wide in ((row.float32, row.tf32), (row.tf32, row.bfloat16), (row.bfloat16, row.float16)):
            assert narrow is None or wide is None or narrow <= wide, row.name


def test_a_cpu_has_no_share_of_peak() -> None:
    measured = Speed(TINY, torch.device("cpu"), "float32", world_size=2)
    columns = measured.of(images=300, seconds=1.5)
    assert list(columns) == ["img_per_s", "tflop_per_s", "memory_gib"]
    assert columns["img_per_s"] == 200
    assert columns["tflop_per_s"] == pytest.approx(100 * step_flops(TINY) / 1e12)  # by one of two processes
    assert 0.05 < columns["memory_gib"] < 64
    assert measured.of(images=0, seconds=0.0)["img_per_s"] == 0


def test_share_of_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peak_flops", lambda device, dtype: 1000 * step_flops(TINY))
    columns = Speed(TINY, torch.device("cpu"), "float32", world_size=4).of(images=1000, seconds=1.0)
    assert columns["share_of_peak"] == pytest.approx(0.25)


def test_resident_memory_is_in_bytes() -> None:
    """A process that fills 300 MiB reports 300 MiB more than before."""
    code = (
        "from mdt_fast.training.speed import peak_resident_bytes as peak; before = peak(); "
        "full = b'x' * (300 << 20); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(300 << 20, rel=0.1)


def test_the_table_is_frozen() -> None:
    with pytest.raises(AttributeError):
        speed.PEAKS[0].float32 = 1.0  # type: ignore[misc]
    assert isinstance(speed.PEAKS, tuple)
    assert all(isinstance(row, Peak) for row in speed.PEAKS)


@pytest.mark.gpu
def test_memory_is_the_peak_since_the_last_call() -> None:
    device = torch.device("cuda")
    measured = Speed(TINY, device, "bfloat16")
    resting = measured.of(1, 1.0)["memory_gib"]
    torch.empty(1 << 28, dtype=torch.uint8, device=device)
    assert measured.of(1, 1.0)["memory_gib"] == pytest.approx(resting + 0.25, abs=0.01)
    assert measured.of(1, 1.0)["memory_gib"] == pytest.approx(resting, abs=0.01)
