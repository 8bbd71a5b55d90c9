"""ControlNet Union for SDXL as a callable: one network for several kinds of hints, chosen by a number. Wraps diffusers' module.

Must not know samplers, conditions, devices or files. Shapes as in controlnet.py; T tokens of hint and latents, K kinds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backend.nn.controlnet import ControlNetwork, repeat_rows

UNION_TYPES = ("OpenPose", "Depth", "Soft Edge", "Hard Edge", "Normal Map", "Segmentation", "Tile", "Inpaint")
"""What the numbers mean in the published files. Files with six kinds end before Tile."""


class UnionNetwork(ControlNetwork):
    """A ControlNet Union around diffusers' ControlNetUnionModel, for one hint at a time.

    In the published code a hint's tokens attend across the rows of the batch, so with equal rows a hint attends to itself. Here every row attends
    only to itself: the same for one picture, and a picture does not depend on others in its batch.
    """

    @property
    def num_types(self) -> int:
        """How many kinds of hints the network supports."""
        return int(self.config.num_control_type)

    def why_no_tiles(self) -> str | None:
        return "a ControlNet Union reads means over the whole picture"

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        hint_embedding: Tensor | None = None,
        control_type: int = 0,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Like the base class. `control_type` is the number of the hint's kind."""
        hint_BCHW = repeat_rows(self.embed_hint(hint) if hint_embedding is None else hint_embedding, x.shape[0])
        emb_BE = self._embed_time(x, timesteps, y) + self._embed_type(control_type, x)
        hidden_BCHW = self.model.conv_in(x)
        return self._run_blocks(hidden_BCHW + self._fuse(hidden_BCHW, hint_BCHW, control_type), emb_BE, context)

    def _embed_type(self, control_type: int, x_BCHW: Tensor) -> Tensor:
        chosen_K = torch.zeros(self.num_types, device=x_BCHW.device)
        chosen_K[control_type] = 1.0
        emb_1E: Tensor = self.model.control_add_embedding(self.model.control_type_proj(chosen_K).reshape(1, -1).to(x_BCHW.dtype))
        return emb_1E

    def _fuse(self, hidden_BCHW: Tensor, hint_BCHW: Tensor, control_type: int) -> Tensor:
        """The hint plus a bias per channel, computed from the kind, the hint's mean and the latents' mean."""
        hint_BCHW = hint_BCHW.expand(hidden_BCHW.shape[0], -1, -1, -1)
        own_BC = hint_BCHW.mean(dim=(2, 3)) + self.model.task_embedding[control_type]
        tokens_BTC = torch.stack([own_BC, hidden_BCHW.mean(dim=(2, 3))], dim=1)
        mixed = tokens_BTC.reshape(1, -1, tokens_BTC.shape[-1])  # the library's order is (tokens, rows, channels), so each row stays separate
        for layer in self.model.transformer_layes:
            mixed = layer(mixed)
        bias_BC = self.model.spatial_ch_projs(mixed.view(tokens_BTC.shape)[:, 0])
        fused_BCHW: Tensor = hint_BCHW + bias_BC[:, :, None, None]
        return fused_BCHW
