from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from backend.text_processing.classic_engine import ClassicTextProcessingEngine
from modules.prompts import schedules as prompt_parser
from modules.prompts.schedules import (
    ComposableScheduledPromptConditioning,
    DictWithShape,
    MulticondLearnedConditioning,
    ScheduledPromptConditioning,
    SdConditioning,
)
from tests.support.text_encoders import WIDTH, encoder, tokenizer


class LetterModel:
    """Encodes a text as 77 rows of its length and first letter; records calls."""

    def __init__(self, *, as_dict: bool = False) -> None:
        self.as_dict = as_dict
        self.asked: list[SdConditioning] = []

    def get_learned_conditioning(self, prompt: SdConditioning) -> Any:
        self.asked.append(prompt)
        crossattn = torch.stack([torch.tensor([len(text), ord(text[:1] or "\0")]).float().expand(77, 2) for text in prompt])
        return {"crossattn": crossattn, "vector": crossattn[:, 0] * 10} if self.as_dict else crossattn


def letters(batch: torch.Tensor) -> list[str]:
    return [chr(int(row[0, 1])) for row in batch]


# lists of prompts


def test_sd_conditioning_copies_what_it_is_not_told() -> None:
    first = SdConditioning(["a", "b"], is_negative_prompt=True, width=64, height=128, distilled_cfg_scale=3.5)
    for copy in (SdConditioning(first), SdConditioning(["c"], copy_from=first)):
        assert (copy.is_negative_prompt, copy.width, copy.height, copy.distilled_cfg_scale) == (True, 64, 128, 3.5)
    assert SdConditioning(first, width=32).width == 32 and SdConditioning(first, distilled_cfg_scale=0.0).distilled_cfg_scale == 0.0
    plain = SdConditioning(["a"])
    assert (list(plain), plain.is_negative_prompt, plain.width, plain.height) == (["a"], False, None, None)


def test_attention_face_gives_lists() -> None:
    assert prompt_parser.parse_prompt_attention("an (important:1.5) BREAK word") == [
        ["an ", 1.0],
        ["important", 1.5],
        ["", 1.0],
        ["BREAK", -1],
        ["word", 1.0],
    ]


def test_schedules_face_gives_lists() -> None:
    schedules = prompt_parser.get_learned_conditioning_prompt_schedules(["a [b:3]", "c", "a [b:3]"], 10)
    assert schedules == [[[3, "a "], [10, "a b"]], [[10, "c"]], [[3, "a "], [10, "a b"]]]
    assert schedules[0] is not schedules[2]
    assert prompt_parser.get_learned_conditioning_prompt_schedules(["a [b:1.5]"], 10, 8) == [[[4, "a "], [8, "a b"]]]
    assert prompt_parser.get_learned_conditioning_prompt_schedules(["a [b:0.5]"], 10, 8, True) == [[[5, "a "], [10, "a b"]]]


def test_multicond_prompt_list_names_each_text_once() -> None:
    prompts = SdConditioning(["a AND b:0.5", "b AND b"], width=64)
    parts, flat, indexes = prompt_parser.get_multicond_prompt_list(prompts)
    assert (list(flat), flat.width) == (["a", " b"] + ["b"], 64)
    assert parts == [[(0, 1.0), (1, 0.5)], [(2, 1.0), (1, 1.0)]]
    assert indexes == {"a": 0, " b": 1, "b": 2}


# conditions


def test_each_prompt_gets_its_schedule() -> None:
    model = LetterModel()
    prompts = SdConditioning(["[a:b:3]", "c", "[a:b:3]"], width=64)
    schedules = prompt_parser.get_learned_conditioning(model, prompts, 10)
    assert [[entry.end_at_step for entry in schedule] for schedule in schedules] == [[3, 10], [10], [3, 10]]
    assert [list(asked) for asked in model.asked] == [["a", "b"], ["c"]]  # each prompt separately, and once
    assert all(asked.width == 64 for asked in model.asked)


def test_a_text_that_comes_back_is_encoded_once() -> None:
    model = LetterModel()
    (schedule,) = prompt_parser.get_learned_conditioning(model, ["[a|b]"], 8)
    assert [list(asked) for asked in model.asked] == [["a", "b"]]
    assert [int(entry.cond[0, 1]) for entry in schedule] == [ord("a"), ord("b")] * 4


def test_step_picks_the_condition() -> None:
    c = prompt_parser.get_learned_conditioning(LetterModel(), ["[a:b:3]", "c"], 10)
    at_step = {step: "".join(letters(prompt_parser.reconstruct_cond_batch(c, step))) for step in (0, 3, 4, 10, 11, 50)}
    assert at_step == {0: "ac", 3: "ac", 4: "bc", 10: "bc", 11: "bc", 50: "bc"}


def test_dict_conditions_are_batched_by_kind() -> None:
    c = prompt_parser.get_learned_conditioning(LetterModel(as_dict=True), ["[a:bb:3]", "ccc"], 10)
    batch = prompt_parser.reconstruct_cond_batch(c, 5)
    assert isinstance(batch, DictWithShape)
    assert batch.shape == batch["crossattn"].shape == (2, 77, 2)
    assert batch["vector"][:, 0].tolist() == [20.0, 30.0]
    assert batch.advanced_indexing([1])["vector"].shape == (1, 2)
    assert batch.to(torch.float16) is batch and batch["vector"].dtype == torch.float16


def test_and_makes_weighted_parts_with_their_own_schedules() -> None:
    model = LetterModel()
    prompts = SdConditioning(["[a:b:3] AND c :0.5", "d"])
    c = prompt_parser.get_multicond_learned_conditioning(model, prompts, 10)
    assert c.shape == (2,)
    assert [[part.weight for part in parts] for parts in c.batch] == [[1.0, 0.5], [1.0]]
    rows, batch = prompt_parser.reconstruct_multicond_batch(c, 0)
    assert rows == [[(0, 1.0), (1, 0.5)], [(2, 1.0)]]
    assert letters(batch) == ["a", " ", "d"]
    assert letters(prompt_parser.reconstruct_multicond_batch(c, 4)[1]) == ["b", " ", "d"]


def test_and_in_a_negative_prompt_is_text() -> None:
    model = LetterModel()
    prompt_parser.get_learned_conditioning(model, ["a AND b"], 10)
    assert [list(asked) for asked in model.asked] == [["a AND b"]]


def test_hires_pass_has_its_own_schedule() -> None:
    c = prompt_parser.get_multicond_learned_conditioning(LetterModel(), ["[a:b:1.5]"], 10, 8)
    assert [entry.end_at_step for entry in c.batch[0][0].schedules] == [4, 8]


def test_dicts_of_and_parts() -> None:
    c = prompt_parser.get_multicond_learned_conditioning(LetterModel(as_dict=True), ["a AND bb"], 10)
    rows, batch = prompt_parser.reconstruct_multicond_batch(c, 0)
    assert rows == [[(0, 1.0), (1, 1.0)]]
    assert batch.shape == (2, 77, 2)


def test_values_can_be_built_by_hand_as_extensions_do() -> None:
    entry = ScheduledPromptConditioning(10, torch.ones(77, 4))
    made = MulticondLearnedConditioning((1,), [[ComposableScheduledPromptConditioning([entry])]])
    rows, batch = prompt_parser.reconstruct_multicond_batch(made, 3)
    assert (rows, batch.shape) == ([[(0, 1.0)]], (1, 77, 4))
    assert ScheduledPromptConditioning(end_at_step=10, cond=entry.cond) == (10, entry.cond)


# conditions of different lengths


def attention(query_BQC: torch.Tensor, cond_BLC: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query_BQC, cond_BLC, cond_BLC)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_lengths_are_evened_without_a_trace(num_chunks: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    conds = [torch.randn(7 * n, 8, generator=generator, dtype=torch.float64) for n in num_chunks]
    query = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    batch = prompt_parser.stack_conds(conds)
    for row, cond in zip(batch, conds):
        torch.testing.assert_close(attention(query, row[None]), attention(query, cond[None]))


def test_equal_lengths_are_left_alone() -> None:
    conds = [torch.randn(77, 4), torch.randn(77, 4)]
    assert torch.equal(prompt_parser.stack_conds(conds), torch.stack(conds))
    assert prompt_parser.stack_conds([torch.tensor(3.5), torch.tensor(3.5)]).tolist() == [3.5, 3.5]


def test_lengths_out_of_proportion_repeat_the_last_token() -> None:
    short, long = torch.randn(77 * 13, 2), torch.randn(77 * 17, 2)
    batch = prompt_parser.stack_conds([short, long])
    assert torch.equal(batch[0, : len(short)], short) and torch.equal(batch[1], long)
    assert torch.equal(batch[0, len(short) :], short[-1:].expand(77 * 4, 2))


def test_a_batch_of_a_short_and_a_long_prompt() -> None:
    c = prompt_parser.get_learned_conditioning(EngineModel(), ["a cat", "word " * 100], 10)
    assert prompt_parser.reconstruct_cond_batch(c, 0).shape == (2, 154, WIDTH)


# with the engine


class EngineModel:
    def __init__(self) -> None:
        self.engine = ClassicTextProcessingEngine(encoder(), tokenizer())

    def get_learned_conditioning(self, prompt: SdConditioning) -> Any:
        return self.engine(prompt)


@cache
def shared_engine() -> EngineModel:
    return EngineModel()


def test_a_prompt_s_condition_does_not_depend_on_its_neighbours() -> None:
    prompts = ["a (red:1.4) cat", "[a:b:3] dog", "word " * 90]
    together = prompt_parser.get_learned_conditioning(EngineModel(), prompts, 10)
    for prompt, schedule in zip(prompts, together):
        (alone,) = prompt_parser.get_learned_conditioning(EngineModel(), [prompt], 10)
        assert all(torch.equal(one.cond, other.cond) for one, other in zip(schedule, alone))


def test_texts_of_one_schedule_have_one_length() -> None:
    (schedule,) = prompt_parser.get_learned_conditioning(EngineModel(), [f"[a cat:{'word ' * 100}:3]"], 10)
    assert [entry.cond.shape for entry in schedule] == [(154, WIDTH)] * 2


def test_where_text_and_picture_share_an_attention_all_prompts_get_one_length() -> None:
    model = LetterModel()
    model.family_facts = SimpleNamespace(attends_jointly=True)  # type: ignore[attr-defined]
    c = prompt_parser.get_multicond_learned_conditioning(model, SdConditioning(["a AND [b:c:3]", "d", "a"]), 10)
    assert [list(asked) for asked in model.asked] == [["a", " b", " c", "d"]]
    rows, batch = prompt_parser.reconstruct_multicond_batch(c, 5)
    assert rows == [[(0, 1.0), (1, 1.0)], [(2, 1.0)], [(3, 1.0)]]
    assert [chr(int(row[0, 1])) for row in batch] == ["a", " ", "d", "a"]


@given(st.text(st.sampled_from("()[]:|\\ AND BREAK0.5ab<>#\n") | st.characters(), max_size=30))
def test_any_prompt_becomes_a_condition(prompt: str) -> None:
    c = prompt_parser.get_multicond_learned_conditioning(shared_engine(), SdConditioning([prompt]), 3)
    rows, batch = prompt_parser.reconstruct_multicond_batch(c, 1)
    assert torch.isfinite(batch).all()
    assert len(rows[0]) == len(batch)
