"""A chain of ControlNets as tasks: each pass can run on any slot and for any of a step's rows. Knows no slots and no plan.

Shapes: B rows (a row is one picture for one branch), C channels, H W latent rows and columns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.nn.controlnet import ControlNetwork
from backend.nn.deferred_control import ControlTask, DeferredControl, Residuals, Send
from backend.nn.tiles import Swaps, Tile
from backend.patcher.controlnet import ControlBase, ControlNet, find_row_weights, weigh_residual

PASS_HOOKS = ("controlnet_conditioning_modifiers", "controlnet_model_function_wrapper")
"""Transformer options whose hooks see a ControlNet's pass over all rows."""


@dataclass(frozen=True, slots=True, eq=False)
class ControlNetTask:
    """A ControlNet's pass for some rows of a step.

    `settings` is the link with its row-dependent weights cut to the task's rows. `pictures`: each row's picture index in the batch.
    `row_weights`: a number, or (B, 1, 1, 1).
    """

    link: ControlNet
    settings: ControlNet
    arguments: Mapping[str, Tensor | None]
    hint: Tensor
    pictures: tuple[int, ...]
    row_weights: Tensor | float

    @property
    def kinds(self) -> frozenset[str]:
        return self.link.kinds

    @property
    def network(self) -> nn.Module:
        return self.link.control_model

    @property
    def home(self) -> torch.device:
        return self.link.load_device

    def rows(self, first: int, end: int) -> ControlNetTask:
        """The task for rows [`first`, `end`) only."""
        part, mask_B1HW, mark_B = slice(first, end), self.settings.advanced_mask_weighting, self.settings.transformer_options.get("cond_mark")
        if mask_B1HW is not None and mask_B1HW.shape[0] > 1:
            mask_B1HW = mask_B1HW[[row % mask_B1HW.shape[0] for row in range(first, end)]]
        return replace(
            self,
            settings=_with_rows(self.settings, None if mark_B is None else mark_B[part], mask_B1HW),
            arguments={name: None if tensor is None else tensor[part] for name, tensor in self.arguments.items()},
            pictures=self.pictures[part],
            row_weights=self.row_weights[part] if isinstance(self.row_weights, Tensor) else self.row_weights,
        )

    def on(self, device: torch.device, send: Send) -> ControlNetTask:
        """The task with its inputs sent to `device`; the hint only if it has not been embedded there."""
        mask_B1HW, mark_B = self.settings.advanced_mask_weighting, self.settings.transformer_options.get("cond_mark")
        return replace(
            self,
            settings=_with_rows(
                self.settings, None if mark_B is None else send(mark_B, device), None if mask_B1HW is None else send(mask_B1HW, device)
            ),
            arguments={name: None if tensor is None else send(tensor, device) for name, tensor in self.arguments.items()},
            hint=self.hint if self.link.has_embedding(device) else send(self.hint, device),
            row_weights=send(self.row_weights, device) if isinstance(self.row_weights, Tensor) else self.row_weights,
        )

    def run(self, network: nn.Module) -> Residuals:
        """Residuals times strength and weights, computed with `network`, a copy on the inputs' device."""
        embedding = self._embed(network)
        found = self.link.place(network(**self.arguments, **self.link.pass_options(), hint=self.hint, hint_embedding=embedding))
        for kind, residuals in found.items():
            for index, residual in enumerate(residuals):
                assert residual is not None
                residuals[index] = weigh_residual(self.link.scale(residual), self.settings, kind, index, self.row_weights)
        return self.link.spread(found)

    def _embed(self, network: nn.Module) -> Tensor:
        """The hint of each row, or one for all, embedded on the inputs' device."""
        x_BCHW = self.arguments["x"]
        assert x_BCHW is not None
        known = self.link.has_embedding(x_BCHW.device)
        embedding = self.link.embedding_on(x_BCHW.device) if known else self.link.embed_hint(self.hint, network)
        return embedding if embedding.shape[0] == 1 else embedding[list(self.pictures)]

    @property
    def has_tiles(self) -> bool:
        """A residual that is averaged over the picture needs it whole."""
        network = self.network
        is_plain = isinstance(network, ControlNetwork) and network.why_no_tiles() is None
        return is_plain and not self.link.global_average_pooling and type(self.link).place is ControlNet.place

    def run_on_tile(self, network: nn.Module, tile: Tile) -> Swaps[Residuals]:
        """A tile's rows of what `run` gives."""
        assert isinstance(network, ControlNetwork)
        arguments: dict[str, Any] = dict(self.arguments)
        residuals = yield from network.run_tile(tile, **arguments, hint_embedding=self._embed(network))
        *down, middle = [(one, self._settings_at(tile, level)) for one, level in zip(residuals, network.residual_levels, strict=True)]
        return {
            kind: [
                weigh_residual(self.link.scale(residual), settings, kind, index, self.row_weights) for index, (residual, settings) in enumerate(found)
            ]
            for kind, found in (("middle", [middle]), ("output", down))
        }

    def _settings_at(self, tile: Tile, level: int) -> ControlNet:
        """The settings with the mask's rows of a tile at a level."""
        mask_B1HW, x_BCHW = self.settings.advanced_mask_weighting, self.arguments["x"]
        if mask_B1HW is None or x_BCHW is None:
            return self.settings
        size = (tile.cut.begins(level)[-1], -(-x_BCHW.shape[3] // (1 << level)))
        start, end = tile.cut.span(tile.rank, level)
        whole_B1HW = functional.interpolate(mask_B1HW.to(x_BCHW.device, torch.float32), size=size, mode="bilinear")
        return _with_rows(self.settings, self.settings.transformer_options.get("cond_mark"), whole_B1HW[:, :, start:end])


def _with_rows(settings: ControlNet, mark_B: Tensor | None, mask_B1HW: Tensor | None) -> ControlNet:
    changed = copy.copy(settings)
    changed.transformer_options = {} if mark_B is None else {"cond_mark": mark_B}
    changed.advanced_mask_weighting = mask_B1HW
    return changed


def list_deferrable(chain: ControlBase | None, options: Mapping[str, Any]) -> list[ControlNet]:
    """A chain's ControlNets, oldest first, whose passes may be tasks; none if a hook must see a whole pass or its result.

    `options`: the denoiser's model options.
    """
    links = list_links(chain)
    hooks = options.get("transformer_options") or {}
    watched = options.get("model_function_wrapper") is not None or any(hooks.get(name) for name in PASS_HOOKS)
    foreign = any(
        type(link).get_control is not ControlBase.get_control or type(link).control_merge is not ControlBase.control_merge for link in links
    )
    return [] if watched or foreign else [link for link in links if isinstance(link, ControlNet) and link.has_common_pass]


def list_links(chain: ControlBase | None) -> list[ControlBase]:
    """The links of a chain, oldest first."""
    links: list[ControlBase] = []
    while chain is not None:
        links.insert(0, chain)
        chain = chain.previous_controlnet
    return links


def defer_control(chain: ControlBase, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int) -> DeferredControl | None:
    """A chain's residuals: tasks for deferrable ControlNets, others computed here; None if no link is active. Arguments as in `get_control`."""
    parts: list[Residuals | ControlTask] = []
    for link in list_links(chain):
        if not link.acts_at(float(t[0])):
            continue
        if isinstance(link, ControlNet) and link.has_common_pass:
            parts.append(_make_task(link, x_noisy, t, cond, batched_number))
        else:
            parts.append(link.get_own_control(x_noisy, t, cond, batched_number))
    return DeferredControl(tuple(parts)) if parts else None


def _make_task(link: ControlNet, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> ControlNetTask:
    arguments, hint = link.prepare_pass(x_BCHW, sigma_B, cond, batched_number)
    num_pictures = x_BCHW.shape[0] // batched_number
    return ControlNetTask(link, link, arguments, hint, tuple(row % num_pictures for row in range(x_BCHW.shape[0])), find_row_weights(link))
