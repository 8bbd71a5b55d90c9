"""Describes a family's latents: the number of channels, the pixels per side, and how the VAE's values map to the denoiser's.

Shapes: B pictures, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

Values = float | tuple[float, ...]
PreviewTable = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFormat:
    """The denoiser sees (z - shift) * scale, where z are the VAE's latents; both are one number, or one per channel.

    `factor`: pixels per side of a latent. `cell`: latents per side of one token of the denoiser; pictures consist of whole cells.
    `fold`: latents of the VAE per side that are one of the denoiser's, whose channels are all of theirs (Flux.2: 2, 32 channels become 128).
    `preview`: a color per channel of the VAE and then the constant, rows of red, green, blue in 0..1; None: fitted to the VAE when needed.
    """

    channels: int
    factor: int
    scale: Values
    shift: Values = 0.0
    cell: int = 1
    fold: int = 1
    preview: PreviewTable | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "factor", "cell", "fold"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatentFormat {name} is {getattr(self, name)}; it must be at least 1.")
        if self.channels % self.fold**2 or self.factor % self.fold:
            raise ValueError(
                f"LatentFormat fold is {self.fold}, so channels must be a multiple of {self.fold**2} and factor one of {self.fold}; they are "
                f"{self.channels} and {self.factor}."
            )
        for name in ("scale", "shift"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(values) != self.channels:
                raise ValueError(f"LatentFormat {name} has {len(values)} numbers for {self.channels} channels. Give one, or one per channel.")
        if self.preview is not None and len(self.preview) != self.vae_channels + 1:
            raise ValueError(
                f"LatentFormat preview has {len(self.preview)} rows; give {self.vae_channels + 1}: one per channel and one for the constant."
            )

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this."""
        return self.factor * self.cell

    @property
    def vae_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.channels // self.fold**2

    @property
    def vae_factor(self) -> int:
        """Pixels per side of one of the VAE's latents."""
        return self.factor // self.fold

    def from_vae(self, z_BCHW: Tensor) -> Tensor:
        """Convert the VAE's latents to the denoiser's."""
        z_BCHW = self.folded(z_BCHW)
        centred_BCHW = z_BCHW if self.shift == 0.0 else z_BCHW - _like(self.shift, z_BCHW)
        return centred_BCHW * _like(self.scale, z_BCHW)

    def to_vae(self, x_BCHW: Tensor) -> Tensor:
        """Convert the denoiser's latents to the VAE's."""
        z_BCHW = x_BCHW / _like(self.scale, x_BCHW)
        return self.unfolded(z_BCHW if self.shift == 0.0 else z_BCHW + _like(self.shift, x_BCHW))

    def folded(self, z_BCHW: Tensor) -> Tensor:
        """Latents of the VAE's size (.., C, H, W) in the denoiser's size, with its channels."""
        return functional.pixel_unshuffle(z_BCHW, self.fold)

    def unfolded(self, x_BCHW: Tensor) -> Tensor:
        """The inverse of `folded`."""
        return functional.pixel_shuffle(x_BCHW, self.fold)


def _like(values: Values, latents_BCHW: Tensor) -> float | Tensor:
    return latents_BCHW.new_tensor(values)[None, :, None, None] if isinstance(values, tuple) else values
