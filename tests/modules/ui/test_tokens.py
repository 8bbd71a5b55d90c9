from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.application import Application
from modules.prompts.styles import PromptStyle
from modules.ui.tokens import TokenCounter
from tests.support.applications import installed_application


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with installed_application(Path(tmp_path_factory.mktemp("data"))) as app:
        yield app


@pytest.fixture(scope="module")
def counter(app: Application) -> TokenCounter:
    return TokenCounter(app)


def test_tokens_of_a_sentence_are_those_of_clip(counter: TokenCounter) -> None:
    assert counter.lengths("a photo of a cat", 20) == (5, 75)


def test_prompt_over_one_chunk_counts_in_steps_of_75(counter: TokenCounter) -> None:
    count, limit = counter.lengths("cat " * 80, 20)
    assert (count, limit) == (80, 150)


def test_longest_part_between_ands_and_longest_schedule_count(counter: TokenCounter) -> None:
    assert counter.lengths("cat AND a photo of a dog", 20)[0] == 5
    assert counter.lengths("[cat:a photo of a dog:10]", 20)[0] == 5


def test_comments_are_not_counted_while_they_are_enabled(app: Application, counter: TokenCounter) -> None:
    assert counter.lengths("cat\n# a long remark that is not encoded", 20)[0] == 1


def test_counter_text(app: Application, counter: TokenCounter) -> None:
    assert counter.count_html("", 20) == "<span>0/75</span>"
    assert counter.count_html(None, 20) == "<span>0/75</span>"
    assert counter.count_html("a photo of a cat", 20.0) == "<span>5/75</span>"


def test_counters_can_be_switched_off_and_do_not_count_books(app: Application, counter: TokenCounter) -> None:
    assert counter.count_html("x" * 60_000, 20) == ""
    app.options.set("disable_token_counters", True)
    assert counter.count_html("a cat", 20) == ""
    app.options.set("disable_token_counters", False)


def test_networks_that_a_prompt_names_are_no_text(counter: TokenCounter) -> None:
    assert counter.lengths("cat <lora:a long name of a file:0.8>", 20)[0] == 1


def test_chosen_styles_count_while_the_setting_says_so(app: Application, counter: TokenCounter) -> None:
    app.styles.save_style(PromptStyle("photo", "a photo of {prompt}", "blurry"))
    assert counter.count_html("cat", 20, ["photo"]) == "<span>4/75</span>"
    assert counter.count_html("cat", 20, ["photo"], negative=True) == "<span>3/75</span>"
    app.options.set("include_styles_into_token_counters", False)
    assert counter.count_html("cat", 20, ["photo"]) == "<span>1/75</span>"
    app.options.set("include_styles_into_token_counters", True)
