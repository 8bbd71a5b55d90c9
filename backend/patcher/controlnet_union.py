"""The link for a ControlNet Union: a ControlNet with a number for the kind of its hint. Must not know prompts, files, preprocessors or pages."""

from __future__ import annotations

from typing import Any

from backend.nn.controlnet_union import UNION_TYPES, UnionNetwork
from backend.patcher.controlnet import ControlBase, ControlNet, ControlNetError


class UnionControlNet(ControlNet):
    """`control_type` is the number of the hint's kind. See UNION_TYPES."""

    control_model: UnionNetwork
    control_type = 0

    @property
    def num_types(self) -> int:
        return self.control_model.num_types

    def copy_to(self, other: ControlBase) -> None:
        """Copy this link's settings to another link of the same network."""
        super().copy_to(other)
        if isinstance(other, UnionControlNet):
            other.control_type = self.control_type

    def of_type(self, control_type: int) -> UnionControlNet:
        """A copy for hints of this kind. Raises: ControlNetError if the network does not support it."""
        if not 0 <= control_type < self.num_types:
            kind = UNION_TYPES[control_type] if 0 <= control_type < len(UNION_TYPES) else str(control_type)
            raise ControlNetError(f"{self.name} does not support {kind} hints. Use one of {', '.join(UNION_TYPES[: self.num_types])}.")
        link = self.copy()
        assert isinstance(link, UnionControlNet)
        link.control_type = control_type
        return link

    def pass_options(self) -> dict[str, Any]:
        """The number of the hint's kind."""
        return {"control_type": self.control_type}
