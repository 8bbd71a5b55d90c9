"""What a family's latents are: how many channels, how many pixels a side, and how the denoiser's numbers follow from the VAE's.

Shapes: B pictures, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Values = float | tuple[float, ...]
PreviewTable = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFormat:
    """The denoiser sees (z - shift) * scale, z being the VAE's latents; both are one number, or one for each channel.

    `factor`: pixels a side of a latent. `cell`: latents a side of what the denoiser takes as one token; pictures are whole cells.
    `preview`: colours of each channel and then the constant, (C + 1) rows of red, green, blue in 0..1; None: fitted to the VAE when it is wanted.
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
                raise ValueError(f"LatentFormat {name}={getattr(self, name)} was given; it is 1 or more.")
        for name in ("scale", "shift"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(values) != self.channels:
                raise ValueError(f"LatentFormat {name} has {len(values)} numbers for {self.channels} channels; give one, or one for each channel.")
        if self.preview is not None and len(self.preview) != self.channels + 1:
            raise ValueError(
                f"LatentFormat preview has {len(self.preview)} rows; {self.channels} channels and the constant take {self.channels + 1}."
            )

    @property
    def multiple_px(self) -> int:
        """Sides of pictures are multiples of this."""
        return self.factor * self.cell

    def from_vae(self, z_BCHW: Tensor) -> Tensor:
        """The VAE's latents as the denoiser sees them."""
        centred_BCHW = z_BCHW if self.shift == 0.0 else z_BCHW - _like(self.shift, z_BCHW)
        return centred_BCHW * _like(self.scale, z_BCHW)

    def to_vae(self, x_BCHW: Tensor) -> Tensor:
        """The denoiser's latents as the VAE takes them."""
        z_BCHW = x_BCHW / _like(self.scale, x_BCHW)
        return z_BCHW if self.shift == 0.0 else z_BCHW + _like(self.shift, x_BCHW)


def _like(values: Values, latents_BCHW: Tensor) -> float | Tensor:
    return latents_BCHW.new_tensor(values)[None, :, None, None] if isinstance(values, tuple) else values
