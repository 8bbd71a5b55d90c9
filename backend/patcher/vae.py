"""The VAE as the engine uses it: pictures to latents and back, in batches that fit, in tiles if a picture does not fit, and in fp32 if half
precision overflows.

Shapes: BHWC pictures with values 0..1; BCHW latents as the network outputs them, not scaled for the UNet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from backend import memory_management, profiler
from backend.memory.errors import OutOfMemory
from backend.memory.module_bytes import count_module_bytes
from backend.patcher.base import ModelPatcher
from backend.patcher.vae_tiles import Tiling, run_tiled

if TYPE_CHECKING:
    from backend.families.latent_format import LatentFormat

logger = logging.getLogger(__name__)

_PUBLISHED_WIDTH = 128
_SAFETY = 2.0
_ENCODE_BYTES_PER_PIXEL = _SAFETY * 643
_DECODE_BYTES_PER_PIXEL = _SAFETY * 768
"""Working memory of the published networks per pixel and byte of the dtype; narrower networks need proportionally less. The second factor is what
tensors take at the peak (benchmarks/memory_estimates.md); the first leaves room for kernels' scratch memory."""
_DECODE_TILES = (64, 32, 16)
_ENCODE_TILES = (512, 256, 128)
"""Sides of tiles, in latent and in picture pixels, in the order they are tried after running out of memory."""


class NansError(RuntimeError):
    """The VAE returned NaN in full precision: the latents or the file are broken."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeJob:
    """What a SlotDecoder needs to decode latents.

    `network` is on `device` when `patcher` is loaded. Results go to `output_device`, in fp32, -1..1. `need_bytes`: working memory for one latent.
    """

    network: nn.Module
    patcher: ModelPatcher
    device: torch.device
    output_device: torch.device
    dtype: torch.dtype
    need_bytes: int


class SlotDecoder(Protocol):
    """Decodes latents BCHW on several slots. Returns None if one slot should do it."""

    def __call__(self, job: DecodeJob, latents_BCHW: Tensor, /) -> Tensor | None: ...


class VAE:
    """An AutoencoderKL with its patcher. A clone shares the network but has its own model options.

    `auto_fp32`: if half precision gives NaN, switch to fp32 permanently and repeat the picture; otherwise return the NaN.
    `slot_decoder` decodes on several slots if there are several; without it the VAE's own device decodes.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        no_init: bool = False,
        *,
        slot_decoder: SlotDecoder | None = None,
        latent: LatentFormat | None = None,
    ) -> None:
        if no_init:
            return
        if model is None:
            raise ValueError("VAE() was called without a network. Pass a model, or use VAE(no_init=True) for an empty one.")
        self.first_stage_model = model
        self.slot_decoder = slot_decoder
        self.device = device or memory_management.vae_device(count_module_bytes(model).total_bytes)
        self.output_device = memory_management.intermediate_device()
        self.auto_fp32 = True
        self._read_shape(model, latent)
        _set_dtype(model, dtype or memory_management.vae_dtype(self.device))
        self.patcher = ModelPatcher(
            model,
            load_device=self.device,
            offload_device=memory_management.vae_offload_device(),
            current_device=next(model.parameters()).device,
        )

    def _read_shape(self, model: Any, latent: LatentFormat | None) -> None:
        self.latent_channels = int(model.config.latent_channels) if latent is None else latent.vae_channels
        self.downscale_ratio = 2 ** (len(model.config.block_out_channels) - 1) if latent is None else latent.vae_factor
        self._width_share = model.config.block_out_channels[0] / _PUBLISHED_WIDTH

    @property
    def vae_dtype(self) -> torch.dtype:
        """The network's current dtype, which clones share."""
        return next(self.first_stage_model.parameters()).dtype

    def clone(self) -> VAE:
        copy = VAE(no_init=True)
        copy.__dict__.update(self.__dict__)
        copy.patcher = self.patcher.clone()
        return copy

    # --- working memory -------------------------------------------------------------------------------------------------------------

    def memory_used_encode(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes to encode one picture of shape (..., H, W)."""
        return int(_ENCODE_BYTES_PER_PIXEL * shape[-2] * shape[-1] * dtype.itemsize * self._width_share)

    def memory_used_decode(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes to decode one latent of shape (..., h, w)."""
        return int(_DECODE_BYTES_PER_PIXEL * shape[-2] * shape[-1] * self.downscale_ratio**2 * dtype.itemsize * self._width_share)

    # --- decode ---------------------------------------------------------------------------------------------------------------------

    def decode(self, samples_in: Tensor) -> Tensor:
        """Latents BCHW -> pictures BHWC, 0..1, fp32 on the output device. A `model_vae_decode_wrapper` in the patcher's options wraps it."""
        wrapper = self.patcher.model_options.get("model_vae_decode_wrapper")
        return self.decode_inner(samples_in) if wrapper is None else cast("Tensor", wrapper(self.decode_inner, samples_in))

    def decode_inner(self, samples_in: Tensor) -> Tensor:
        """Decode whole pictures, as many at once as fit; in tiles if one picture does not fit."""
        if memory_management.VAE_ALWAYS_TILED:
            return self.decode_tiled(samples_in)
        if samples_in.shape[0] == 1 and (shared_BHWC := self.decode_on_all_slots(samples_in)) is not None:
            return shared_BHWC
        need_bytes = self.memory_used_decode(tuple(samples_in.shape), self.vae_dtype)
        picture_BCHW = self._unless_out_of_memory(lambda: self._in_batches(self._decode_batch, samples_in, need_bytes, "decoding"))
        if picture_BCHW is not None:
            return picture_BCHW.movedim(1, -1)
        logger.warning("Out of memory while decoding %s latents with the VAE; decoding again in tiles.", _size_text(samples_in))
        return self._in_smaller_tiles(lambda tile: self.decode_tiled(samples_in, tile, tile, tile // 4), _DECODE_TILES)

    @torch.no_grad()
    def decode_on_all_slots(self, samples_in: Tensor) -> Tensor | None:
        """Latents BCHW -> pictures BHWC, 0..1, each decoded alone: dealt to the slots or split over them. None if one slot should do it."""
        decode = self.slot_decoder
        if decode is None or len(memory_management.compute_slots()) < 2 or memory_management.VAE_ALWAYS_TILED:
            return None

        def run() -> Tensor:
            decoded = decode(self._decode_job(samples_in), samples_in)
            return samples_in.new_empty(0) if decoded is None else decoded.add(1.0).div_(2.0).clamp_(0.0, 1.0)

        pixels_BCHW = self._checked(run, "decoding")
        return pixels_BCHW.movedim(1, -1) if pixels_BCHW.numel() else None

    def _decode_job(self, latents_BCHW: Tensor) -> DecodeJob:
        return DecodeJob(
            network=self.first_stage_model,
            patcher=self.patcher,
            device=self.device,
            output_device=self.output_device,
            dtype=self.vae_dtype,
            need_bytes=self.memory_used_decode(tuple(latents_BCHW.shape), self.vae_dtype),
        )

    @torch.no_grad()
    def decode_tiled(self, samples: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> Tensor:
        """Latents BCHW -> pictures BHWC, 0..1, in tiles of `tile_x` by `tile_y` latent pixels, averaged over three tilings."""
        out_channels = cast("int", cast("Any", self.first_stage_model).config.out_channels)
        tiling, scale = Tiling(tile_w=tile_x, tile_h=tile_y, overlap=overlap), Fraction(self.downscale_ratio)
        self._load(self.memory_used_decode((tile_y, tile_x), self.vae_dtype))
        picture_BCHW = self._with_recovery(lambda: self._average_tilings(self._decode_batch, samples, tiling, scale, out_channels), "decoding")
        return picture_BCHW.movedim(1, -1)

    def _decode_batch(self, latents_BCHW: Tensor) -> Tensor:
        with profiler.recorder().measure("VAE", "decode", device=self.device, rows=len(latents_BCHW)):
            decoded = cast("Any", self.first_stage_model).decode(latents_BCHW.to(device=self.device, dtype=self.vae_dtype), return_dict=False)[0]
            pixels_BCHW: Tensor = decoded.to(device=self.output_device, dtype=torch.float32)
        return pixels_BCHW.add_(1.0).div_(2.0).clamp_(0.0, 1.0)

    # --- encode ---------------------------------------------------------------------------------------------------------------------

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Pictures BHWC, 0..1 -> latents BCHW, fp32 on the output device: the mean of the posterior, the same at every call.

        In the patcher's options, a `model_vae_encode_wrapper` wraps it and a `model_vae_regulation` replaces the mean of the posterior.
        """
        wrapper = self.patcher.model_options.get("model_vae_encode_wrapper")
        return self.encode_inner(pixel_samples) if wrapper is None else cast("Tensor", wrapper(self.encode_inner, pixel_samples))

    def encode_inner(self, pixel_samples: Tensor) -> Tensor:
        """Encode whole pictures, as many at once as fit; in tiles if one picture does not fit."""
        if memory_management.VAE_ALWAYS_TILED:
            return self.encode_tiled(pixel_samples)
        pixels_BCHW = pixel_samples.movedim(-1, 1)
        need_bytes = self.memory_used_encode(tuple(pixels_BCHW.shape), self.vae_dtype)
        latents_BCHW = self._unless_out_of_memory(lambda: self._in_batches(self._encode_batch, pixels_BCHW, need_bytes, "encoding"))
        if latents_BCHW is not None:
            return latents_BCHW
        logger.warning("Out of memory while encoding a %s picture with the VAE; encoding again in tiles.", _size_text(pixels_BCHW))
        return self._in_smaller_tiles(lambda tile: self.encode_tiled(pixel_samples, tile, tile, tile // 8), _ENCODE_TILES)

    @torch.no_grad()
    def encode_tiled(self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64) -> Tensor:
        """Pictures BHWC, 0..1 -> latents BCHW, in tiles of `tile_x` by `tile_y` pixels, averaged over three tilings."""
        pixels_BCHW = pixel_samples.movedim(-1, 1)
        tiling, scale = Tiling(tile_w=tile_x, tile_h=tile_y, overlap=overlap), Fraction(1, self.downscale_ratio)
        self._load(self.memory_used_encode((tile_y, tile_x), self.vae_dtype))
        return self._with_recovery(lambda: self._average_tilings(self._encode_batch, pixels_BCHW, tiling, scale, self.latent_channels), "encoding")

    def _encode_batch(self, pixels_BCHW: Tensor) -> Tensor:
        with profiler.recorder().measure("VAE", "encode", device=self.device, rows=len(pixels_BCHW)):
            posterior = cast("Any", self.first_stage_model).encode((pixels_BCHW.to(self.device) * 2.0 - 1.0).to(self.vae_dtype), return_dict=False)[0]
            regulation = self.patcher.model_options.get("model_vae_regulation")
            latents: Tensor = posterior.mode() if regulation is None else regulation(posterior)
            return latents.to(device=self.output_device, dtype=torch.float32)

    # --- shared ---------------------------------------------------------------------------------------------------------------------

    def _unless_out_of_memory(self, run: Callable[[], Tensor]) -> Tensor | None:
        """`run()`, or None after releasing idle memory. The caller continues outside the handler, so that the failed attempt's memory is free."""
        try:
            return run()
        except (memory_management.OOM_EXCEPTION, OutOfMemory):
            pass
        memory_management.soft_empty_cache(force=True)
        return None

    def _in_smaller_tiles(self, run: Callable[[int], Tensor], tiles: tuple[int, ...]) -> Tensor:
        """`run(tile)` with the largest tile side that memory allows. Raises: OutOfMemory if the smallest is too large."""
        for tile in tiles[:-1]:
            result = self._unless_out_of_memory(partial(run, tile))
            if result is not None:
                return result
            logger.warning("Out of memory with tiles of %d; trying smaller ones.", tile)
        return run(tiles[-1])

    def _with_recovery(self, run: Callable[[], Tensor], doing: str) -> Tensor:
        """`run()`, checked for NaN and repeated with more and more memory freed if it runs out. Raises: OutOfMemory, NansError."""
        return memory_management.run_with_recovery(
            lambda: self._checked(run, doing), what=f"{doing} tiles with the VAE", device=self.device, keep=[self.patcher]
        )

    @torch.no_grad()
    def _in_batches(self, function: Callable[[Tensor], Tensor], x_BCHW: Tensor, need_bytes: int, doing: str) -> Tensor:
        self._load(need_bytes)
        batch = max(1, int(memory_management.get_free_memory(self.device) / max(1, need_bytes)))

        def run() -> Tensor:
            return torch.cat([function(x_BCHW[start : start + batch]) for start in range(0, x_BCHW.shape[0], batch)])

        return self._checked(run, doing)

    def _load(self, need_bytes: int) -> None:
        memory_management.load_models_gpu([self.patcher], memory_required=need_bytes)

    def _average_tilings(self, function: Callable[[Tensor], Tensor], x_BCHW: Tensor, tiling: Tiling, scale: Fraction, out_channels: int) -> Tensor:
        variants = tiling.variants()
        total: Tensor | None = None
        for variant in variants:
            result = run_tiled(function, x_BCHW, variant, scale=scale, out_channels=out_channels, output_device=self.output_device)
            total = result if total is None else total.add_(result)
        assert total is not None
        return total.div_(len(variants))

    def _checked(self, run: Callable[[], Tensor], doing: str) -> Tensor:
        """`run()`, repeated in fp32 if it gives NaN in half precision.

        Raises: NansError if fp32 gives NaN too.
        """
        result = run()
        if not bool(result.isnan().any()):
            return result
        if self.vae_dtype != torch.float32:
            if not self.auto_fp32:
                return result
            logger.warning(
                "The VAE produced NaN while %s in %s. It is switched to 32-bit floats and the picture is repeated. Start with --no-half-vae to use "
                "32 bits from the start, or turn off 'Repeat a failed VAE pass in 32 bits' (auto_vae_precision).",
                doing,
                str(self.vae_dtype).removeprefix("torch."),
            )
            self._revert_to_fp32()
            result = run()
        if bool(result.isnan().any()):
            raise NansError(
                f"The VAE produced NaN while {doing}, even in 32-bit floats. The latents or the VAE file are broken: try another sampler or seed, "
                "lower the CFG scale, or choose another VAE."
            )
        return result

    def _revert_to_fp32(self) -> None:
        memory_management.unload_model_clones(self.patcher)
        _set_dtype(self.first_stage_model, torch.float32)
        self._load(0)


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    nn.Module.to(model, dtype)  # diffusers' own `to` warns about every change of dtype


def _size_text(x_BCHW: Tensor) -> str:
    return f"{x_BCHW.shape[-1]}x{x_BCHW.shape[-2]}"
