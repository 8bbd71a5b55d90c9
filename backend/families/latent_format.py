"""Describes a family's latents: the number of channels, the pixels per side, and how the VAE's values map to the denoiser's.

Shapes: B pictures, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Values = float | tuple[float, ...]
PreviewTable = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFormat:
    """The denoiser sees (z - shift) * scale, where z are the VAE's latents; both are one number, or one per channel.

    `factor`: pixels per side of a latent. `cell`: latents per side of one token of the denoiser; pictures consist of whole cells.
    `preview`: a color per channel and then the constant, (C + 1) rows of red, green, blue in 0..1; None: fitted to the VAE when needed.
    """

    channels: int
    factor: int
    scale: Values
    shift: Values = 0.0
    cell: int = 1
    preview: PreviewTable | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "factor", "cell"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatentFormat {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("scale", "shift"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(values) != self.channels:
                raise ValueError(f"LatentFormat {name} has {len(values)} numbers for {self.channels} channels. Give one, or one per channel.")
        if self.preview is not None and len(self.preview) != self.channels + 1:
            raise ValueError(
                f"LatentFormat preview has {len(self.preview)} rows; give {self.channels + 1}: one per channel and one for the constant."
            )

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this."""
        return self.factor * self.cell

    def from_vae(self, z_BCHW: Tensor) -> Tensor:
        """Convert the VAE's latents to the denoiser's."""
        centred_BCHW = z_BCHW if self.shift == 0.0 else z_BCHW - _like(self.shift, z_BCHW)
        return centred_BCHW * _like(self.scale, z_BCHW)

    def to_vae(self, x_BCHW: Tensor) -> Tensor:
        """Convert the denoiser's latents to the VAE's."""
        z_BCHW = x_BCHW / _like(self.scale, x_BCHW)
        return z_BCHW if self.shift == 0.0 else z_BCHW + _like(self.shift, x_BCHW)


def _like(values: Values, latents_BCHW: Tensor) -> float | Tensor:
    return latents_BCHW.new_tensor(values)[None, :, None, None] if isinstance(values, tuple) else values
