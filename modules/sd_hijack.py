"""`model_hijack`, which older extensions query about the model. Nothing is hijacked here; most methods exist only so that they can be called."""

from __future__ import annotations

from typing import Any

from modules.jobs.context import installed_context


class StableDiffusionModelHijack:
    """Queries are answered where possible; everything else has no effect."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.extra_generation_params: dict[str, Any] = {}
        self.circular_enabled = False
        self.clip = None

    @property
    def embedding_db(self) -> Any:
        """Textual inversion embeddings of the current model; None before one is loaded."""
        app = installed_context()
        return None if app is None else getattr(app.models.engine, "embeddings", None)

    def get_prompt_lengths(self, text: str, cond_stage_model: Any = None) -> tuple[int, int]:
        """(tokens, tokens that fit). Before a model is loaded, counts words."""
        app = installed_context()
        engine = None if app is None else app.models.engine
        if engine is None:
            num_words = len(text.split())
            return num_words, max(75, -(-num_words // 75) * 75)
        return engine.get_prompt_lengths_on_ui(text)

    def apply_optimizations(self, option: Any = None) -> None: ...

    def convert_sdxl_to_ssd(self, m: Any) -> None: ...

    def hijack(self, m: Any) -> None: ...

    def undo_hijack(self, m: Any) -> None: ...

    def apply_circular(self, enable: bool) -> None: ...

    def clear_comments(self) -> None:
        self.comments.clear()
        self.extra_generation_params.clear()

    def redo_hijack(self, m: Any) -> None: ...


model_hijack = StableDiffusionModelHijack()
