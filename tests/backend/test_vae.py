"""The VAE: values against diffusers' AutoencoderKL, and its behavior when memory or number range are exceeded."""

from __future__ import annotations

import logging
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.patcher import vae as vae_module
from backend.patcher.vae import VAE, NansError
from backend.patcher.vae_tiles import Tiling, run_tiled, spans
from tests.support.checkpoints import build_models

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cpu_engine():
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))


@pytest.fixture
def network(tmp_path):
    return build_models(tmp_path / "x", "sd15").vae


@torch.no_grad()
def _reference_decode(network, latents):
    return (network.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1)


@torch.no_grad()
def test_decode_and_encode_equal_the_librarys(network):
    vae = VAE(network)
    latents, pixels = torch.randn(3, 4, 6, 8), torch.rand(2, 40, 48, 3)
    decoded = vae.decode(latents)
    assert decoded.shape == (3, 48, 64, 3) and decoded.dtype == torch.float32
    assert torch.equal(decoded, _reference_decode(network, latents))
    encoded = vae.encode(pixels)
    assert torch.equal(encoded, network.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mean)
    assert torch.equal(encoded, vae.encode(pixels))


def test_facts_are_derived_from_the_network(network):
    vae = VAE(network)
    assert (vae.latent_channels, vae.downscale_ratio) == (4, 8)
    full_width_share = 32 / 128
    assert vae.memory_used_decode((1, 4, 64, 64), torch.float32) == int(2.0 * 768 * 64 * 64 * 64 * 4 * full_width_share)
    assert vae.memory_used_encode((1, 3, 512, 512), torch.float16) == int(2.0 * 643 * 512 * 512 * 2 * full_width_share)


def test_batches_are_as_large_as_free_memory_allows(network, monkeypatch):
    vae = VAE(network)
    latents = torch.randn(5, 4, 4, 4)
    need_bytes = vae.memory_used_decode(tuple(latents.shape), torch.float32)
    sizes = []
    original = network.decode
    monkeypatch.setattr(network, "decode", lambda z, **kwargs: (sizes.append(len(z)), original(z, **kwargs))[1])
    monkeypatch.setattr(memory_management, "get_free_memory", lambda device=None: int(need_bytes * 2.5))
    decoded = vae.decode(latents)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(decoded, _reference_decode(network, latents), rtol=0, atol=1e-5)  # another batch size, another order of sums


def _fails_above(network, monkeypatch, name, max_pixels):
    original = getattr(network, name)
    seen = []

    def limited(x, **kwargs):
        seen.append(tuple(x.shape[-2:]))
        if x.shape[-1] * x.shape[-2] > max_pixels:
            raise torch.OutOfMemoryError("made up")
        return original(x, **kwargs)

    monkeypatch.setattr(network, name, limited)
    return seen


def _with_small_tiles(monkeypatch):
    monkeypatch.setattr(vae_module, "_DECODE_TILES", (16,))
    monkeypatch.setattr(vae_module, "_ENCODE_TILES", (128,))


def test_out_of_memory_falls_back_to_tiles_with_a_message(network, monkeypatch, caplog):
    latents = functional.interpolate(torch.randn(1, 4, 3, 4), (18, 20), mode="bicubic")
    whole = _reference_decode(network, latents)
    seen = _fails_above(network, monkeypatch, "decode", 16 * 16)
    _with_small_tiles(monkeypatch)
    vae = VAE(network)
    with caplog.at_level(logging.WARNING):
        decoded = vae.decode(latents)
    assert "Out of memory while decoding 20x18 latents" in caplog.text
    assert seen[0] == (18, 20) and {(16, 16), (8, 20), (18, 8)} == set(seen[1:])
    assert decoded.shape == whole.shape
    assert (decoded - whole).abs().mean() < 0.1  # each tile has its own norm statistics


def test_encoding_falls_back_to_tiles_too(network, monkeypatch, caplog):
    _fails_above(network, monkeypatch, "encode", 128 * 128)
    _with_small_tiles(monkeypatch)
    vae = VAE(network)
    with caplog.at_level(logging.WARNING):
        latents = vae.encode(torch.rand(1, 136, 160, 3))
    assert "Out of memory while encoding a 160x136 picture" in caplog.text
    assert latents.shape == (1, 4, 17, 20) and latents.isfinite().all()


def test_tiled_from_the_start_when_requested(network, monkeypatch):
    monkeypatch.setattr(memory_management, "VAE_ALWAYS_TILED", True)
    seen = _fails_above(network, monkeypatch, "decode", 64 * 64)
    VAE(network).decode(torch.randn(1, 4, 70, 8))
    assert (70, 8) not in seen[:2] and len(seen) > 3


@torch.no_grad()
def test_one_tile_that_covers_everything_equals_the_full_pass(network):
    vae = VAE(network)
    latents, pixels = torch.randn(2, 4, 5, 7), torch.rand(2, 40, 56, 3)
    torch.testing.assert_close(vae.decode_tiled(latents), vae.decode(latents), rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.encode_tiled(pixels), vae.encode(pixels), rtol=0, atol=2e-4)  # unscaled latents, values up to 20


@pytest.mark.parametrize("shape", [(1, 3, 50, 71), (2, 3, 16, 16), (1, 3, 17, 200)])
def test_blended_tiles_of_a_local_function_are_seamless(shape):
    """If a function works on each pixel separately, tiles and fades must not be visible at all; closed-form reference."""
    x = torch.randn(shape)
    result = run_tiled(
        lambda tile: functional.interpolate(tile[:, :2] * 3 + 1, scale_factor=4, mode="nearest"),
        x,
        Tiling(tile_w=16, tile_h=24, overlap=6),
        scale=Fraction(4),
        out_channels=2,
        output_device=CPU,
    )
    torch.testing.assert_close(result, functional.interpolate(x[:, :2] * 3 + 1, scale_factor=4, mode="nearest"), rtol=0, atol=1e-5)


def test_downscaling_tiles_land_where_they_belong():
    x = torch.randn(1, 3, 88, 136)
    result = run_tiled(
        lambda tile: functional.avg_pool2d(tile, 8),
        x,
        Tiling(tile_w=48, tile_h=32, overlap=16),
        scale=Fraction(1, 8),
        out_channels=3,
        output_device=CPU,
    )
    torch.testing.assert_close(result, functional.avg_pool2d(x, 8), rtol=0, atol=1e-5)


def test_spans_cover_and_overlap():
    for length in range(1, 120):
        found = list(spans(length, 32, 8))
        assert found[0][0] == 0 and found[-1][1] == length
        assert all(end - start == min(32, length) for start, end in found)
        assert all(left[1] - right[0] >= 8 for left, right in pairwise(found))


@torch.no_grad()
def test_nan_in_half_precision_is_done_again_in_fp32(network, caplog):
    network.decoder.conv_in.weight.mul_(1e4)  # fp16 ends at 65504: this overflows there, and only there
    network.decoder.mid_block.resnets[0].conv1.weight.mul_(1e3)
    network.decoder.mid_block.resnets[0].conv2.weight.mul_(1e3)
    latents = torch.randn(1, 4, 4, 4) * 10
    vae = VAE(network, dtype=torch.float16)
    clone = vae.clone()
    assert vae.vae_dtype == torch.float16
    assert network.decode(latents.half()).sample.isnan().any()
    with caplog.at_level(logging.WARNING):
        decoded = vae.decode(latents)
    assert "switched to 32-bit floats" in caplog.text and "--no-half-vae" in caplog.text
    assert decoded.isfinite().all()
    assert vae.vae_dtype == clone.vae_dtype == torch.float32
    caplog.clear()
    assert torch.equal(clone.decode(latents), decoded) and not caplog.text


@torch.no_grad()
def test_nan_goes_through_when_the_retry_is_off(network):
    network.decoder.conv_in.weight.mul_(1e6)
    vae = VAE(network, dtype=torch.float16)
    vae.auto_fp32 = False
    assert vae.decode(torch.randn(1, 4, 4, 4)).isnan().any()
    assert vae.vae_dtype == torch.float16


def test_nan_in_fp32_is_an_error_that_says_what_to_try(network):
    vae = VAE(network)
    with pytest.raises(NansError, match=r"even in 32-bit floats.*another sampler or seed"):
        vae.decode(torch.full((1, 4, 4, 4), torch.nan))


def test_bfloat16_pictures_are_close_to_fp32(network):
    latents = torch.randn(1, 4, 6, 6)
    whole = _reference_decode(network, latents)
    half = VAE(network, dtype=torch.bfloat16).decode(latents)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().mean() < 0.02


def test_wrappers_and_regulation_of_extensions(network):
    vae = VAE(network)
    pixels, latents = torch.rand(1, 16, 16, 3), torch.randn(1, 4, 2, 2)
    plain_encoded, plain_decoded = vae.encode(pixels), vae.decode(latents)
    changed = vae.clone()
    changed.patcher.set_model_vae_encode_wrapper(lambda encode, x: encode(x) + 1)
    changed.patcher.set_model_vae_decode_wrapper(lambda decode, x: decode(x) * 0)
    changed.patcher.set_model_vae_regulation(lambda posterior: posterior.mean * 2)
    torch.testing.assert_close(changed.encode(pixels), plain_encoded * 2 + 1)
    assert not changed.decode(latents).any()
    assert torch.equal(vae.encode(pixels), plain_encoded) and torch.equal(vae.decode(latents), plain_decoded)


def test_a_network_is_needed():
    with pytest.raises(ValueError, match="called without a network"):
        VAE()


def test_decode_on_a_virtual_gpu_that_is_too_small_for_full_pictures(network, caplog, monkeypatch):
    """Every byte counts against the card's cap; the full picture does not fit, tiles do."""
    latents = torch.randn(1, 4, 40, 40)
    whole = _reference_decode(network, latents)
    config = BackendConfig(virtual_gpus_bytes=(48 * 2**20,))
    memory_management.configure(config, probe_devices(config))
    monkeypatch.setattr(memory_management, "current_inference_memory", 0)
    _with_small_tiles(monkeypatch)
    vae = VAE(network)
    with caplog.at_level(logging.WARNING):
        decoded = vae.decode(latents)
    assert vae.device.type == "vgpu" and decoded.device.type == "cpu"
    assert "decoding again in tiles" in caplog.text
    assert (decoded - whole).abs().mean() < 0.1
    memory_management.unload_all_models()
    assert next(network.parameters()).device.type == "cpu"
