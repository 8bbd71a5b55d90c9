"""Forge's name of Chroma's network over diffusers' ChromaTransformer2DModel. It is run by its program (backend/families/chroma/program.py).

Shapes: B rows, M modulation vectors (three per single block, twelve per double block, two for the last layer), C input channels of the approximator.
"""

from __future__ import annotations

import warnings

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_chroma import ChromaApproximator, ChromaSingleTransformerBlock, ChromaTransformerBlock
from torch import Tensor, nn

from backend.nn.flux import OriginalBlockNames

Approximator = ChromaApproximator
DoubleStreamBlock = ChromaTransformerBlock
SingleStreamBlock = ChromaSingleTransformerBlock


class ModulationInputs(nn.Module):
    """What the approximator reads for every modulation vector: the time, distilled guidance (always 0), and the vector's number.

    The library's layer keeps the numbers' sinusoids in a buffer, which a network that is built without memory would lose.
    """

    def __init__(self, num_channels: int, num_vectors: int) -> None:
        super().__init__()
        self.num_channels, self.num_vectors = num_channels, num_vectors

    def forward(self, times_B: Tensor) -> Tensor:
        """(B, M, 4 * num_channels) of times 0..1000, in their dtype."""
        time_BC = _sinusoids(times_B, self.num_channels)
        shared_BC = torch.cat([time_BC, _sinusoids(torch.zeros_like(times_B), self.num_channels)], dim=1)
        number_MC = _sinusoids(torch.arange(self.num_vectors, device=times_B.device) * 1000, 2 * self.num_channels)
        num_rows = times_B.shape[0]
        features = [shared_BC.unsqueeze(1).expand(-1, self.num_vectors, -1), number_MC.expand(num_rows, -1, -1)]
        return torch.cat(features, dim=-1).to(times_B.dtype)


def _sinusoids(numbers: Tensor, num_channels: int) -> Tensor:
    features: Tensor = get_timestep_embedding(numbers, num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    return features


class IntegratedChromaTransformer2DModel(OriginalBlockNames, ChromaTransformer2DModel):  # type: ignore[misc]  # the library's class is untyped
    """diffusers' network with the original names of its parts, and without tables in buffers."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the library imports its own layer from where it used to be
            super().__init__(
                patch_size=patch_size, in_channels=in_channels, out_channels=out_channels, num_layers=num_layers, num_single_layers=num_single_layers,
                attention_head_dim=attention_head_dim, num_attention_heads=num_attention_heads, joint_attention_dim=joint_attention_dim,
                axes_dims_rope=axes_dims_rope, approximator_num_channels=approximator_num_channels, approximator_hidden_dim=approximator_hidden_dim,
                approximator_layers=approximator_layers,
            )  # fmt: skip
        self.time_text_embed = ModulationInputs(approximator_num_channels // 4, 3 * num_single_layers + 12 * num_layers + 2)
