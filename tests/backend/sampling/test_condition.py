"""Conditions: batching, lengths, composed prompts."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from backend.sampling.condition import (
    Condition,
    ConditionConstant,
    ConditionCrossAttn,
    ConditionNoiseShape,
    compile_conditions,
    compile_weighted_conditions,
    fit_batch,
)

CPU = torch.device("cpu")


def test_a_condition_fits_itself_to_the_batch() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(fit_batch(rows, 7), torch.cat([rows, rows, rows[:1]]))
    assert torch.equal(fit_batch(rows, 2), rows[:2])
    assert fit_batch(rows, 3) is rows
    assert Condition(rows[:1]).process_cond(4, CPU).cond.shape == (4, 2)


def test_latent_shaped_conditions_are_cut_to_the_area() -> None:
    mask = torch.arange(24.0).view(1, 1, 4, 6)
    part = ConditionNoiseShape(mask).process_cond(2, CPU, area=(2, 3, 1, 2)).cond
    assert torch.equal(part, mask[:, :, 1:3, 2:5].expand(2, 1, 2, 3))


def test_repeated_tokens_leave_attention_as_it_is() -> None:
    short, long = torch.randn(1, 77, 8), torch.randn(1, 154, 8)
    joined = ConditionCrossAttn(short).concat([ConditionCrossAttn(long)])
    assert joined.shape == (2, 154, 8)
    query = torch.randn(1, 5, 8)
    torch.testing.assert_close(scaled_dot_product_attention(query, joined[:1], joined[:1]), scaled_dot_product_attention(query, short, short))


def test_what_may_share_a_batch() -> None:
    def text(tokens: int, width: int = 8, batch: int = 1) -> ConditionCrossAttn:
        return ConditionCrossAttn(torch.zeros(batch, tokens, width))

    assert text(77).can_concat(text(77))
    assert text(77).can_concat(text(308))
    assert not text(77).can_concat(text(385))  # five times
    assert not text(154).can_concat(text(231 * 2 + 77))
    assert not text(77).can_concat(text(77, width=9))
    assert not text(77).can_concat(text(77, batch=2))
    assert not text(77).can_concat(Condition(torch.zeros(1, 77, 8)))
    assert ConditionConstant(3).can_concat(ConditionConstant(3))
    assert not ConditionConstant(3).can_concat(ConditionConstant(4))
    assert ConditionConstant(3).process_cond(5, CPU).concat([ConditionConstant(3)]) == 3


def test_text_in_a_joint_attention_is_never_repeated() -> None:
    """256 and 512 tokens would join by repetition; where the picture's tokens are in the same softmax, that would double the text's weight."""
    short, long = torch.zeros(1, 256, 8), torch.zeros(1, 512, 8)
    for cond in (lambda text: text, lambda text: {"crossattn": text, "vector": torch.zeros(1, 5)}):
        for repeats in (True, False):
            one, other = (compile_conditions(cond(text), text_repeats=repeats)[0]["model_conds"]["c_crossattn"] for text in (short, long))
            assert one.can_concat(other) is repeats
        weighted = compile_weighted_conditions(cond(short), [[(0, 1.0)]], text_repeats=False)[0]["model_conds"]["c_crossattn"]
        assert not weighted.can_concat(other) and weighted.can_concat(one)


def test_text_alone_and_text_with_a_vector() -> None:
    text, vector = torch.zeros(2, 77, 8), torch.zeros(2, 5)
    assert set(compile_conditions(text)[0]["model_conds"]) == {"c_crossattn"}
    compiled = compile_conditions({"crossattn": text, "vector": vector, "guidance": torch.ones(2)})[0]
    assert set(compiled["model_conds"]) == {"c_crossattn", "y", "guidance"}
    assert compiled["pooled_output"] is vector
    assert compile_conditions(None) is None


def test_composed_prompts_become_one_condition_per_part() -> None:
    text = torch.arange(3.0).view(3, 1, 1).expand(3, 77, 8)
    parts = compile_weighted_conditions(text, [[(0, 1.0), (2, 0.5)], [(1, 1.0), (2, 0.5)]])
    assert [part["strength"] for part in parts] == [1.0, 0.5]
    assert [part["cross_attn"][:, 0, 0].tolist() for part in parts] == [[0.0, 1.0], [2.0, 2.0]]


def test_images_of_one_batch_may_be_composed_differently() -> None:
    text = {"crossattn": torch.arange(3.0).view(3, 1, 1).expand(3, 77, 8), "vector": torch.arange(3.0).view(3, 1)}
    first, second = compile_weighted_conditions(text, [[(0, 0.7)], [(1, 1.0), (2, -0.5)]])
    assert first["strength"].flatten().tolist() == torch.tensor([0.7, 1.0]).tolist()
    assert second["strength"].flatten().tolist() == [0.0, -0.5]
    assert second["pooled_output"].flatten().tolist() == [0.0, 2.0]
