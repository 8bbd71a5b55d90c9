"""The whole prompt language: compositions of weighted parts, each with nested schedules, alternations and emphasis.

A prompt is built as a tree, printed, and parsed by the product; a second, simple evaluator of the tree (below) computes what each step must see.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.text_processing.parsing import parse_prompt_attention
from backend.text_processing.schedule import parse_prompt, write_prompt
from modules.prompts.schedules import SdConditioning, get_learned_conditioning_prompt_schedules, get_multicond_prompt_list

NUM_STEPS = 12


@dataclass(frozen=True)
class Word:
    text: str

    def printed(self) -> str:
        return self.text

    def at(self, step: int) -> str:
        return self.text


@dataclass(frozen=True)
class Weighted:
    content: Prompt
    weight: float

    def printed(self) -> str:
        return f"({self.content.printed()}:{self.weight})"

    def at(self, step: int) -> str:
        return f"({self.content.at(step)}:{self.weight})"


@dataclass(frozen=True)
class Switch:
    before: Prompt
    after: Prompt
    last_step_before: int
    as_fraction: bool

    def printed(self) -> str:
        when = f"{self.last_step_before / NUM_STEPS + 0.001:.4f}" if self.as_fraction else str(self.last_step_before)
        return f"[{self.before.printed()}:{self.after.printed()}:{when}]"

    def at(self, step: int) -> str:
        return (self.before if step <= self.last_step_before else self.after).at(step)


@dataclass(frozen=True)
class Alternation:
    options: tuple[Prompt, ...]

    def printed(self) -> str:
        return "[" + "|".join(option.printed() for option in self.options) + "]"

    def at(self, step: int) -> str:
        return self.options[(step - 1) % len(self.options)].at(step)


@dataclass(frozen=True)
class Prompt:
    parts: tuple[Word | Weighted | Switch | Alternation, ...]

    def printed(self) -> str:
        return "".join(part.printed() for part in self.parts)

    def at(self, step: int) -> str:
        return "".join(part.at(step) for part in self.parts)


WORDS = st.builds(
    Word, st.sampled_from(["a cat ", "dog, ", "x", "é 漢 ", "with AND_ inside ", "SAND ", r"\(paren\) ", r"a\:b ", r"\[k\] ", r"\|", " BREAK "])
)


def _prompts(parts: st.SearchStrategy[Word | Weighted | Switch | Alternation], least: int = 0) -> st.SearchStrategy[Prompt]:
    return st.lists(parts, min_size=least, max_size=3).map(lambda found: Prompt(tuple(found)))


def _deeper(content: st.SearchStrategy[Prompt]) -> st.SearchStrategy[Prompt]:
    return _prompts(st.one_of(
        WORDS,
        st.builds(Weighted, content, st.integers(-30, 30).map(lambda tenths: tenths / 10)),
        st.builds(Switch, content, content, st.integers(1, NUM_STEPS - 1), st.booleans()),
        st.builds(Alternation, st.lists(content, min_size=2, max_size=4).map(tuple)),
    ), least=1)  # fmt: skip


PROMPTS = st.recursive(_prompts(WORDS, least=1), _deeper, max_leaves=14)
PARTS = st.lists(st.tuples(PROMPTS, st.none() | st.integers(-300, 300).map(lambda hundredths: hundredths / 100)), min_size=1, max_size=4)


@given(PROMPTS)
@settings(max_examples=300, deadline=None)
def test_every_step_sees_what_the_tree_says(prompt: Prompt) -> None:
    (schedule,) = get_learned_conditioning_prompt_schedules([prompt.printed()], NUM_STEPS)
    for step in range(1, NUM_STEPS + 1):
        text = next(text for last_step, text in schedule if step <= last_step)
        assert text == prompt.at(step)


@given(PROMPTS)
@settings(max_examples=200, deadline=None)
def test_printed_and_read_again_twice_it_stays_itself(prompt: Prompt) -> None:
    tree = parse_prompt(prompt.printed())
    assert write_prompt(tree) == prompt.printed()
    assert parse_prompt(write_prompt(tree)) == tree


@given(PARTS)
@settings(max_examples=200, deadline=None)
def test_and_parts_keep_their_weights_and_their_own_schedules(parts: list[tuple[Prompt, float | None]]) -> None:
    printed = " AND ".join(prompt.printed() + ("" if weight is None else f" :{weight}") for prompt, weight in parts)
    (indexes,), texts, _ = get_multicond_prompt_list(SdConditioning([printed]))
    assert [weight for _, weight in indexes] == [1.0 if weight is None else weight for _, weight in parts]
    schedules = get_learned_conditioning_prompt_schedules(list(texts), NUM_STEPS)
    for (index, _), (prompt, _) in zip(indexes, parts, strict=True):
        for step in (1, NUM_STEPS // 2, NUM_STEPS):
            text = next(text for last_step, text in schedules[index] if step <= last_step)
            assert text.strip() == prompt.at(step).strip()


@given(PROMPTS, st.integers(1, NUM_STEPS))
@settings(max_examples=200, deadline=None)
def test_weights_reach_the_words_they_were_written_around(prompt: Prompt, step: int) -> None:
    """Every word of the step, with the product of the weights around it."""

    def words(inner: Prompt, weight: float) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        for part in inner.parts:
            if isinstance(part, Word):
                found.append((part.text, weight))
            elif isinstance(part, Weighted):
                found += words(part.content, weight * part.weight)
            elif isinstance(part, Switch):
                found += words(part.before if step <= part.last_step_before else part.after, weight)
            else:
                found += words(part.options[(step - 1) % len(part.options)], weight)
        return found

    def letters(text: str) -> str:
        return "".join(char for char in text.replace("BREAK", "") if char.isalpha())

    expected = [(letter, round(weight, 6)) for text, weight in words(prompt, 1.0) for letter in letters(text)]
    spans = [span for span in parse_prompt_attention(prompt.at(step)) if not span.is_break]
    assert [(letter, round(span.weight, 6)) for span in spans for letter in letters(span.text)] == expected
