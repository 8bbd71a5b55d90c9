"""The VAE of Qwen-Image and Wan 2.1 for single pictures: diffusers' AutoencoderKLQwenImage, whose convolutions also span time, on one frame.

Nothing comes before a first frame, so of a kernel over three frames only the last part counts, and every convolution is a plain one over rows and
columns: a third of the work. The convolutions over time alone do not run; they are kept so that a saved model is complete.

Shapes: B pictures, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKLQwenImage
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn import functional


class FrameConv(QwenImageCausalConv3d):  # type: ignore[misc]  # the library's class is untyped
    """A causal convolution of one frame (B, C, 1, H, W)."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        columns, _, rows, *_ = self._padding
        kernel = self.weight[:, :, -1]
        return functional.conv2d(x.squeeze(2), kernel, self.bias, stride=self.stride[1:], padding=(rows, columns)).unsqueeze(2)


class PictureVae(AutoencoderKLQwenImage):  # type: ignore[misc]
    """Pictures (B, 3, 8 H, 8 W) to latents (B, C, H, W) and back. Its weights have the library's names, its configuration AutoencoderKL's, by which
    costs and memory are estimated. `has_time`: whether each level but the last also has a convolution over time."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_out_channels: Sequence[int] = (96, 192, 384, 384),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        out_channels: int = 3,
        norm_num_groups: int = 1,
        mid_block_add_attention: bool = True,
        has_time: Sequence[bool] = (False, True, True),
    ) -> None:
        narrowest = block_out_channels[0]
        super().__init__(
            base_dim=narrowest, z_dim=latent_channels, dim_mult=[width // narrowest for width in block_out_channels],
            num_res_blocks=layers_per_block, temperal_downsample=list(has_time), input_channels=out_channels,
        )  # fmt: skip
        for module in self.modules():
            if type(module) is QwenImageCausalConv3d:
                module.__class__ = FrameConv

    def encode(self, x_BCHW: Tensor, return_dict: bool = True) -> Any:
        """The posterior of the latents, (B, C, H, W)."""
        moments = self.quant_conv(self.encoder(x_BCHW.unsqueeze(2))).squeeze(2)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z_BCHW: Tensor, return_dict: bool = True) -> Any:
        """The pictures, -1..1."""
        picture_BCHW = self.decoder(self.post_quant_conv(z_BCHW.unsqueeze(2))).squeeze(2).clamp(-1.0, 1.0)
        return DecoderOutput(sample=picture_BCHW) if return_dict else (picture_BCHW,)
