"""Turns prompts into scheduled conditions, under the names that extensions import.

A condition is a tensor (L, C) of L tokens and C channels, or for SDXL a dict with "crossattn" (L, C) and "vector" (V,). `step` counts the sampler's
calls from 0. The engine parses prompts (`backend.text_processing`); this file combines that with an encoder. Must not know jobs or options.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from backend.text_processing import parsing
from backend.text_processing.composition import split_composition
from backend.text_processing.schedule import PassSteps, schedule_prompt

MAX_REPEATED_TOKENS = 77 * 120
"""Up to this length, conditions of different lengths are equalized by repeating them whole, which does not change attention."""


class TextEncodingModel(Protocol):
    """The loaded model, as an encoder of prompts."""

    def get_learned_conditioning(self, prompt: SdConditioning) -> Any: ...


class SdConditioning(list[str]):
    """A list of prompts with the size of their picture, and the pictures that the text encoder is to see, (H, W, 3) uint8 arrays. Missing values
    come from `copy_from`, or from `prompts` if that has them."""

    def __init__(
        self,
        prompts: Iterable[str],
        is_negative_prompt: bool = False,
        width: int | None = None,
        height: int | None = None,
        copy_from: Any = None,
        distilled_cfg_scale: float | None = None,
        pictures: Sequence[Any] = (),
    ) -> None:
        super().__init__(prompts)
        source = prompts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(source, "is_negative_prompt", False)
        self.width = width or getattr(source, "width", None)
        self.height = height or getattr(source, "height", None)
        self.pictures = tuple(pictures) or getattr(source, "pictures", ())
        self.distilled_cfg_scale = getattr(source, "distilled_cfg_scale", None) if distilled_cfg_scale is None else distilled_cfg_scale


class ScheduledPromptConditioning(NamedTuple):
    """`cond` applies up to and including step `end_at_step`."""

    end_at_step: int
    cond: Any


class ComposableScheduledPromptConditioning:
    """One part of an AND prompt: its schedule and its weight."""

    def __init__(self, schedules: list[ScheduledPromptConditioning], weight: float = 1.0) -> None:
        self.schedules = schedules
        self.weight = weight


class MulticondLearnedConditioning:
    """`batch` contains the prompt parts of each picture; `shape` is (pictures,)."""

    def __init__(self, shape: tuple[int, ...], batch: list[list[ComposableScheduledPromptConditioning]]) -> None:
        self.shape = shape
        self.batch = batch


class DictWithShape(dict[str, torch.Tensor]):
    """A batch of conditions of several kinds. Its `shape` and `to` behave like those of its "crossattn" tensor."""

    def __init__(self, x: Mapping[str, torch.Tensor], shape: Any = None) -> None:
        super().__init__(x)

    @property
    def shape(self) -> torch.Size:
        return self["crossattn"].shape

    def to(self, *args: Any, **kwargs: Any) -> DictWithShape:
        """Move or cast its tensors in place, like A1111's, and return itself."""
        self.update({key: value.to(*args, **kwargs) for key, value in self.items()})
        return self

    def advanced_indexing(self, item: Any) -> DictWithShape:
        """The rows `item` of every tensor."""
        return DictWithShape({key: value[item] for key, value in self.items()})


# prompts


def parse_prompt_attention(text: str) -> list[list[Any]]:
    """[[text, weight], ...]; ["BREAK", -1] marks the start of a chunk."""
    return [[span.text, -1 if span.is_break else span.weight] for span in parsing.parse_prompt_attention(text)]


def get_learned_conditioning_prompt_schedules(
    prompts: Iterable[str], base_steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> list[list[list[Any]]]:
    """[[last step, text], ...] for each prompt. `hires_steps` selects the schedule of the second pass."""
    steps = PassSteps(num_base_steps=base_steps, num_hires_steps=hires_steps, use_old_scheduling=use_old_scheduling)
    schedules = {prompt: schedule_prompt(prompt, steps) for prompt in prompts}
    return [[[last_step, text] for last_step, text in schedules[prompt]] for prompt in prompts]


def get_multicond_prompt_list(prompts: Iterable[str]) -> tuple[list[list[tuple[int, float]]], SdConditioning, dict[str, int]]:
    """(AND parts of each prompt as (index, weight), the distinct parts, part -> index)."""
    indexes: dict[str, int] = {}
    parts_of_prompt = [[(indexes.setdefault(part.text, len(indexes)), part.weight) for part in split_composition(prompt)] for prompt in prompts]
    return parts_of_prompt, SdConditioning(list(indexes), copy_from=prompts), indexes


# encoding


def get_learned_conditioning(
    model: TextEncodingModel, prompts: SdConditioning | Sequence[str], steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> list[list[ScheduledPromptConditioning]]:
    """Each prompt's conditions in order of steps. AND is plain text here; a text that appears twice is encoded once.

    The texts of one prompt are encoded together, so that they get the same length. Different prompts are encoded separately, so that a prompt's
    condition does not depend on its neighbors. Where text and picture share one attention, all are encoded together,
    as lengths cannot be evened out afterwards.
    """
    schedules = get_learned_conditioning_prompt_schedules(prompts, steps, hires_steps, use_old_scheduling)
    of_prompt = dict(zip(prompts, schedules))
    groups = [list(of_prompt)] if _attends_jointly(model) else [[prompt] for prompt in of_prompt]
    encoded: dict[str, list[ScheduledPromptConditioning]] = {}
    for group in groups:
        encoded.update(zip(group, _encode_schedules(model, [of_prompt[prompt] for prompt in group], prompts)))
    return [list(encoded[prompt]) for prompt in prompts]


def _attends_jointly(model: Any) -> bool:
    return bool(getattr(getattr(model, "family_facts", None), "attends_jointly", False))


def _encode_schedules(
    model: TextEncodingModel, schedules: Sequence[Sequence[Sequence[Any]]], prompts: Sequence[str]
) -> list[list[ScheduledPromptConditioning]]:
    texts = dict.fromkeys(text for schedule in schedules for _, text in schedule)
    row_of_text = {text: row for row, text in enumerate(texts)}
    conds = model.get_learned_conditioning(SdConditioning(list(row_of_text), copy_from=prompts))
    return [[ScheduledPromptConditioning(last_step, _row(conds, row_of_text[text])) for last_step, text in schedule] for schedule in schedules]


def _row(conds: Any, row: int) -> Any:
    return {key: value[row] for key, value in conds.items()} if isinstance(conds, Mapping) else conds[row]


def get_multicond_learned_conditioning(
    model: TextEncodingModel, prompts: SdConditioning | Sequence[str], steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> MulticondLearnedConditioning:
    """Like get_learned_conditioning, for prompts with AND: each part has its own schedule and weight."""
    parts_of_prompt, flat_prompts, _ = get_multicond_prompt_list(prompts)
    schedules = get_learned_conditioning(model, flat_prompts, steps, hires_steps, use_old_scheduling)
    batch = [[ComposableScheduledPromptConditioning(schedules[index], weight) for index, weight in parts] for parts in parts_of_prompt]
    return MulticondLearnedConditioning(shape=(len(prompts),), batch=batch)


def with_guidance(conditions: Any, scale: float) -> Any:
    """The same conditions (of prompts, or of prompts with AND) with another number of distilled guidance; tensors of text are shared."""
    if isinstance(conditions, MulticondLearnedConditioning):
        batch = [[ComposableScheduledPromptConditioning(_guided(part.schedules, scale), part.weight) for part in parts] for parts in conditions.batch]
        return MulticondLearnedConditioning(conditions.shape, batch)
    return [_guided(schedules, scale) for schedules in conditions]


def _guided(schedules: Sequence[ScheduledPromptConditioning], scale: float) -> list[ScheduledPromptConditioning]:
    return [
        entry._replace(cond={**entry.cond, "guidance": torch.full_like(entry.cond["guidance"], scale)})
        if isinstance(entry.cond, Mapping) and "guidance" in entry.cond
        else entry
        for entry in schedules
    ]


# a step's batch


def reconstruct_cond_batch(c: Sequence[Sequence[ScheduledPromptConditioning]], current_step: int) -> Any:
    """The batch of conditions at a step: (B, L, C), or a DictWithShape. After a schedule's last step, its last condition stays."""
    return _stack_any([cond_at_step(schedule, current_step) for schedule in c])


def reconstruct_multicond_batch(c: MulticondLearnedConditioning, current_step: int) -> tuple[list[list[tuple[int, float]]], Any]:
    """(for each picture its parts as (row, weight), the rows at this step)."""
    conds: list[Any] = []
    rows_of_picture: list[list[tuple[int, float]]] = []
    for parts in c.batch:
        rows_of_picture.append([(len(conds) + offset, part.weight) for offset, part in enumerate(parts)])
        conds += [cond_at_step(part.schedules, current_step) for part in parts]
    return rows_of_picture, _stack_any(conds)


def conditions_in_force(c: MulticondLearnedConditioning, uc: Sequence[Sequence[ScheduledPromptConditioning]] | None, current_step: int) -> list[Any]:
    """The conditions that apply at a step, those of the prompts before those of the negative prompts. The same objects give the same batch."""
    found = []
    schedules = [part.schedules for parts in c.batch for part in parts]
    for schedule in (*schedules, *(uc or ())):
        for entry in schedule:
            if current_step <= entry.end_at_step:
                break
        found.append(entry.cond)
    return found


def cond_at_step(schedule: Sequence[ScheduledPromptConditioning], current_step: int) -> Any:
    return next((entry.cond for entry in schedule if current_step <= entry.end_at_step), schedule[-1].cond)


def _stack_any(conds: Sequence[Any]) -> Any:
    if not isinstance(conds[0], Mapping):
        return stack_conds(conds)
    return DictWithShape({key: stack_conds([cond[key] for cond in conds]) for key in conds[0]})


def stack_conds(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, ...) from tensors that may differ in their first dimension, the number of tokens; (B,) from numbers.

    Shorter ones are repeated to a common multiple: attending to the same tokens n times equals attending to them once. If that would get too
    long, their last token is repeated instead, as in A1111.
    """
    lengths = {len(tensor) if tensor.ndim else 1 for tensor in tensors}
    if len(lengths) == 1:
        return torch.stack(list(tensors))
    num_tokens = math.lcm(*lengths)
    if num_tokens <= MAX_REPEATED_TOKENS:
        return torch.stack([tensor.repeat(num_tokens // len(tensor), *[1] * (tensor.ndim - 1)) for tensor in tensors])
    longest = max(lengths)
    return torch.stack([torch.cat([tensor, tensor[-1:].expand(longest - len(tensor), *tensor.shape[1:])]) for tensor in tensors])
