"""The conditions of a denoising step, ready for batching: text, vectors and concatenated latents that can be joined and fitted to a batch.

Must not know prompts, networks or samplers.

Shapes: B batch, L tokens, D width of a token, V width of SDXL's vector, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backend.nn.padded_text import TEXT_LENGTHS, pad_text
from backend.nn.second_text import SECOND_TEXT

Area = tuple[int, int, int, int]
"""(rows, columns, first row, first column) of latents."""
CompiledCondition = dict[str, Any]
"""`model_conds`: Conditions by the name of the argument they become. The other keys say how the condition applies: `strength`, `area`, `mask`,
`mask_strength`, `timestep_start`, `timestep_end`, `control`."""

PASSED_ON = ("guidance", TEXT_LENGTHS, *SECOND_TEXT)
"""Conditions with one row per image that reach the network under their own names."""
MAX_TOKEN_REPEATS = 4
"""Conditions whose joint length would exceed the shorter one by more than this factor run in separate calls."""


def fit_batch(tensor: Tensor, batch_size: int) -> Tensor:
    """Repeat or cut along the batch to `batch_size`."""
    if tensor.shape[0] < batch_size:
        tensor = tensor.repeat([math.ceil(batch_size / tensor.shape[0])] + [1] * (tensor.ndim - 1))
    return tensor[:batch_size] if tensor.shape[0] > batch_size else tensor


class Condition:
    """A tensor with one row per image."""

    def __init__(self, cond: Any) -> None:
        self.cond = cond

    def _copy_with(self, cond: Any) -> Condition:
        return type(self)(cond)

    def process_cond(self, batch_size: int, device: torch.device, **kwargs: Any) -> Condition:
        """The condition for a batch of this size on this device. `area`: the part of the latents that runs."""
        return self._copy_with(fit_batch(self.cond, batch_size).to(device))

    def can_concat(self, other: Condition) -> bool:
        """Whether both can go into one batch."""
        return type(self) is type(other) and self.cond.shape == other.cond.shape

    def concat(self, others: Sequence[Condition]) -> Any:
        """One argument for the whole batch."""
        return torch.cat([self.cond, *(other.cond for other in others)]) if others else self.cond


class ConditionNoiseShape(Condition):
    """A tensor with the latents' rows and columns."""

    def process_cond(self, batch_size: int, device: torch.device, **kwargs: Any) -> Condition:
        cond, area = self.cond, kwargs.get("area")
        if area is not None:
            cond = cond[:, :, area[2] : area[2] + area[0], area[3] : area[3] + area[1]]
        return self._copy_with(fit_batch(cond, batch_size).to(device))


class ConditionCrossAttn(Condition):
    """Text (B, L, D). Different lengths are joined by repeating tokens: attention over k copies of every token equals attention over one."""

    def can_concat(self, other: Condition) -> bool:
        if type(self) is not type(other):
            return False
        (batch, tokens, width), (other_batch, other_tokens, other_width) = self.cond.shape, other.cond.shape
        if (batch, width) != (other_batch, other_width):
            return False
        return math.lcm(int(tokens), int(other_tokens)) <= MAX_TOKEN_REPEATS * int(min(tokens, other_tokens))

    def concat(self, others: Sequence[Condition]) -> Tensor:
        conds = [self.cond, *(other.cond for other in others)]
        num_tokens = math.lcm(*(cond.shape[1] for cond in conds))
        joined = [cond if cond.shape[1] == num_tokens else cond.repeat(1, num_tokens // cond.shape[1], 1) for cond in conds]
        return torch.cat(joined) if others else joined[0]


class ConditionPaddedText(Condition):
    """Text (B, L, D) whose lengths the network is told. Different lengths are joined by padding, which nothing reads."""

    def can_concat(self, other: Condition) -> bool:
        return type(self) is type(other) and (self.cond.shape[0], self.cond.shape[2]) == (other.cond.shape[0], other.cond.shape[2])

    def concat(self, others: Sequence[Condition]) -> Tensor:
        conds = [self.cond, *(other.cond for other in others)]
        longest = max(cond.shape[1] for cond in conds)
        return torch.cat([pad_text(cond, longest) for cond in conds]) if others else self.cond


class ConditionConstant(Condition):
    """A value shared by the whole batch."""

    def process_cond(self, batch_size: int, device: torch.device, **kwargs: Any) -> Condition:
        return self._copy_with(self.cond)

    def can_concat(self, other: Condition) -> bool:
        return type(self) is type(other) and bool(self.cond == other.cond)

    def concat(self, others: Sequence[Condition]) -> Any:
        return self.cond


def compile_conditions(cond: Tensor | Mapping[str, Tensor] | None, *, text_repeats: bool = True) -> list[CompiledCondition] | None:
    """Conditions of one branch from text alone (B, L, D), or from "crossattn" with "vector" (B, V) and further per-image tensors.

    `text_repeats`: the network looks at the text by itself, so that repeating it changes nothing and texts of different lengths can join.
    """
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return [{"cross_attn": cond, "model_conds": {"c_crossattn": _text_condition({}, text_repeats)(cond)}}]
    text = _text_condition(cond, text_repeats)
    compiled: CompiledCondition = {"cross_attn": cond["crossattn"], "model_conds": {"c_crossattn": text(cond["crossattn"])}}
    if cond.get("vector") is not None:
        compiled["pooled_output"] = cond["vector"]
        compiled["model_conds"]["y"] = Condition(cond["vector"])
    for name in PASSED_ON:
        if name in cond:
            compiled["model_conds"][name] = Condition(cond[name])
    return [compiled]


def _text_condition(cond: Mapping[str, Tensor], text_repeats: bool) -> type[Condition]:
    if TEXT_LENGTHS in cond:
        return ConditionPaddedText
    return ConditionCrossAttn if text_repeats else Condition


def compile_weighted_conditions(
    cond: Tensor | Mapping[str, Tensor], weights: Sequence[Sequence[tuple[int, float]]], *, text_repeats: bool = True
) -> list[CompiledCondition]:
    """Conditions of composed prompts ("a AND b :0.5"). `weights`: per image its parts as (row of `cond`, weight).

    An image with fewer parts than others has weight 0 in the rest. `strength` is a number, or (B, 1, 1, 1) if images differ.
    """
    results: list[CompiledCondition] = []
    for part in range(max((len(parts) for parts in weights), default=0)):
        rows = [parts[part] if part < len(parts) else (parts[0][0], 0.0) for parts in weights]
        compiled = compile_conditions(_take_rows(cond, [index for index, _ in rows]), text_repeats=text_repeats)
        assert compiled is not None
        compiled[0]["strength"] = _join_strengths([float(weight) for _, weight in rows])
        results += compiled
    return results


def _take_rows(cond: Tensor | Mapping[str, Tensor], rows: list[int]) -> Tensor | Mapping[str, Tensor]:
    if isinstance(cond, Tensor):
        return cond if rows == list(range(cond.shape[0])) else _stack_rows(cond, rows)
    return {key: value if rows == list(range(value.shape[0])) else _stack_rows(value, rows) for key, value in cond.items()}


def _stack_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """`tensor[rows]` without sending the list to the device."""
    return torch.stack([tensor[row] for row in rows])


def _join_strengths(strengths: list[float]) -> float | Tensor:
    return strengths[0] if len(set(strengths)) == 1 else torch.tensor(strengths).view(-1, 1, 1, 1)
