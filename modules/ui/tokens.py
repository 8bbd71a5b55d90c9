"""The token counters next to the prompts: the token count of a prompt's longest part, and how many fit.

Counts like the text encoder, without loading a model. Must not know how prompts are encoded.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.checkpoints.families import facts_of, families_are_imported
from modules.checkpoints.import_lock import network_imports
from modules.prompts import extra_networks
from modules.scripts import callbacks
from modules.scripts.hook_arguments import BeforeTokenCounterParams
from modules.ui.quicksettings import selected_checkpoint
from modules.ui.toprow import Toprow

if TYPE_CHECKING:
    from modules.application import Application

CHUNK_TOKENS = 75
MAX_COUNTED_CHARACTERS = 50_000


def _clip_counter() -> Any:
    from torch import nn  # heavy: only when text is first counted

    with network_imports:
        from backend.text_processing.classic_engine import ClassicTextProcessingEngine  # imports torch
        from backend.text_processing.clip_tokenizer import build_clip_tokenizer  # imports transformers

    return ClassicTextProcessingEngine(nn.Identity(), build_clip_tokenizer())


class TokenCounter:
    """Counts with the vocabulary of the selected checkpoint's family, CLIP's where that is not known. A vocabulary is read with the first count."""

    _lock = threading.Lock()

    def __init__(self, app: Application) -> None:
        self.app = app
        self._engines: dict[str, Any] = {}

    def _text_engine(self) -> Any:
        with network_imports:
            facts = facts_of(selected_checkpoint(self.app))
            own = None if facts is None or facts.build_token_counter is None else facts
            name = "" if own is None else own.name
            if name not in self._engines:
                self._engines[name] = _clip_counter() if own is None or own.build_token_counter is None else own.build_token_counter()
        return self._engines[name]

    def lengths(self, prompt: str, num_steps: int) -> tuple[int, int]:
        """(tokens, tokens that fit) of the longest text used at any step: one part between ANDs, with its schedule at that step."""
        from backend.text_processing.composition import split_composition, strip_comments
        from backend.text_processing.schedule import PassSteps, schedule_prompt

        if self.app.options.enable_prompt_comments:
            prompt = strip_comments(prompt)
        prompt, _ = extra_networks.parse_prompt(prompt)
        steps = PassSteps(num_base_steps=max(1, num_steps))
        with self._lock:
            texts = {text for part in split_composition(prompt) for _, text in schedule_prompt(part.text, steps)}
            engine = self._text_engine()
            counts = [engine.get_prompt_lengths(text) for text in texts]
        return max(counts, default=(0, CHUNK_TOKENS))

    def count_html(self, prompt: str | None, num_steps: float, styles: Sequence[str] | None = None, *, negative: bool = False) -> str:
        """The counter's text. Includes the chosen styles if the settings say so."""
        asked = BeforeTokenCounterParams(prompt or "", int(num_steps or 1), list(styles or []), is_positive=not negative)
        callbacks.before_token_counter_callback(asked)
        text, num_steps, styles = asked.prompt, asked.steps, asked.styles
        if styles and self.app.options.include_styles_into_token_counters:
            apply = self.app.styles.apply_negative_styles_to_prompt if negative else self.app.styles.apply_styles_to_prompt
            text = apply(text, styles)
        if self.app.options.disable_token_counters or len(text) > MAX_COUNTED_CHARACTERS:
            return ""
        if not text.strip():
            return f"<span>0/{self._text_engine().get_prompt_lengths('')[1] if families_are_imported() else CHUNK_TOKENS}</span>"
        count, limit = self.lengths(text, int(num_steps or 1))
        return f"<span>{count}/{limit}</span>"


def connect_token_counters(counter: TokenCounter, toprow: Toprow, steps: gr.Slider) -> None:
    """Recount when a prompt changes, and when a script presses the hidden button."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private", "trigger_mode": "always_last"}
    for number, (prompt, label, button) in enumerate(toprow.token_counters):
        count = partial(counter.count_html, negative=number == 1)
        for event in (prompt.change, toprow.styles.change, button.click):
            event(count, inputs=[prompt, steps, toprow.styles], outputs=[label], **quiet)
