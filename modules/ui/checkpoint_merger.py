"""The Checkpoint Merger tab: mixes two or three checkpoints of one family. The work is the engine's (backend/checkpoint_merger.py)."""

from __future__ import annotations

import html
import json
import logging
from typing import TYPE_CHECKING, Any

import gradio as gr

from modules.checkpoints.import_lock import network_imports
from modules.errors import RequestError
from modules.ui.checkpoint_tools import TYPES, FileMaker
from modules.ui.common import create_refresh_button

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

METHODS = ("No interpolation", "Weighted sum", "Add difference")
DESCRIPTIONS = {
    "No interpolation": "The result is <b>A</b>, for another type or another VAE.",
    "Weighted sum": "The result is <b>A × (1 − M) + B × M</b>.",
    "Add difference": "The result is <b>A + (B − C) × M</b>: what B has learned beyond C is added to A.",
}
NO_VAE = "None"
MAX_PATTERNS = 20


class MergerHandlers(FileMaker):
    """Handlers of the tab."""

    def names(self) -> list[str]:
        self.app.checkpoints.refresh()
        return [info.name for info in self.app.checkpoints]

    def vae_names(self) -> list[str]:
        self.app.additional_modules.refresh()
        return [NO_VAE, *self.app.additional_modules.files]

    def refresh(self) -> list[Any]:
        """Updates for the three models and the VAE."""
        return [*[gr.update(choices=self.names())] * 3, gr.update(choices=self.vae_names())]

    def merge(
        self,
        models: tuple[str | None, str | None, str | None],
        method: str,
        multiplier: float,
        to: str,
        name: str,
        *,
        vae: str = NO_VAE,
        leave_out: str = "",
        recipe: bool = True,
        progress: Any = None,
    ) -> str:
        """Merge, and say in HTML what was written, or why nothing was."""
        return self.make(lambda: self._merge(models, method, multiplier, to, name, vae, leave_out, recipe, progress), "merged")

    def _merge(
        self, models: tuple[Any, Any, Any], method: str, multiplier: float, to: str, name: str, vae: str, leave_out: str, recipe: bool, progress: Any
    ) -> str:
        with network_imports:
            from backend.checkpoint_converter import ConversionError  # imports torch
            from backend.checkpoint_file import CheckpointError
            from backend.checkpoint_merger import Merge, merge_checkpoints

        def report(done: int, total: int) -> None:
            progress(done / max(total, 1), desc=f"{done / 1e9:.1f} of {total / 1e9:.1f} GB")

        if not models[0]:
            raise RequestError("Choose the first model, A.")
        patterns = tuple(word.strip() for word in leave_out.split(",") if word.strip())[:MAX_PATTERNS]
        try:
            job = Merge(
                primary=self._file(models[0]),
                secondary=self._file(models[1]) if models[1] and method != METHODS[0] else None,
                tertiary=self._file(models[2]) if models[2] and method == METHODS[2] else None,
                target=self._target(name or self._name_of(models, method, multiplier), to),
                method=method,
                multiplier=float(multiplier),
                to=to,
                vae=None if vae in (NO_VAE, "", None) else self._file(vae),
                leave_out=patterns,
                recipe=recipe,
            )
            num_bytes, num_alone = merge_checkpoints(job, report)
        except (ConversionError, CheckpointError, OSError) as error:
            log.info("Checkpoint Merger: %s", error)
            raise RequestError(str(error)) from error
        log.info("Checkpoint Merger: wrote %s (%.2f GB).", job.target, num_bytes / 1e9)
        alone = f" {num_alone} tensors that another model does not have are A's." if num_alone else ""
        return f"{job.target.name}: {num_bytes / 1e9:.2f} GB, in {job.target.parent}.{alone}"

    @staticmethod
    def _name_of(models: tuple[Any, Any, Any], method: str, multiplier: float) -> str:
        """A name that says what was mixed."""
        a, b, c = (str(name or "").rpartition("/")[2].rpartition(".")[0] or str(name or "") for name in models)
        if method == METHODS[0]:
            return a
        return f"{1 - multiplier:g}({a}) + {multiplier:g}({b})" if method == METHODS[1] else f"{a} + {multiplier:g}({b} - {c})"

    def metadata_html(self, models: tuple[str | None, ...]) -> str:
        """What the headers of the chosen files say."""
        self.names()
        parts = []
        for name in models:
            info = self.app.checkpoints.find(name) if name else None
            if info is not None:
                text = json.dumps(info.metadata, indent=2, ensure_ascii=False)[:4000] if info.metadata else "no metadata"
                parts.append(f"<h4>{html.escape(info.name)}</h4><pre class='extra-network-metadata'>{html.escape(text)}</pre>")
        return "".join(parts) or "<p>No model is chosen.</p>"


def create_checkpoint_merger_tab(app: Application, item: gr.Tab) -> None:
    """Build the tab inside the current gradio context. Its lists are read when it is opened."""
    handlers = MergerHandlers(app)
    with gr.Row(elem_classes=["generation-columns"]):
        with gr.Column(variant="compact"):
            described = gr.HTML(DESCRIPTIONS[METHODS[1]], elem_id="modelmerger_interp_description", padding=False)
            models = _create_models(handlers)
            name = gr.Textbox(label="File name", placeholder="Empty: says what was mixed", max_lines=1, elem_id="modelmerger_custom_name")
            multiplier = gr.Slider(label="Multiplier (M)", minimum=0.0, maximum=1.0, step=0.05, value=0.3, elem_id="modelmerger_interp_amount")
            method = gr.Radio(label="Interpolation method", choices=list(METHODS), value=METHODS[1], elem_id="modelmerger_interp_method")
            with gr.Row():
                to = gr.Dropdown(label="Type", choices=list(TYPES), value="fp16", elem_id="modelmerger_checkpoint_format")
                with gr.Row():
                    vae = gr.Dropdown(label="Bake in VAE", choices=[NO_VAE], value=NO_VAE, elem_id="modelmerger_bake_in_vae")
                    create_refresh_button(vae, lambda: None, lambda: {"choices": handlers.vae_names()}, "modelmerger_refresh_bake_in_vae")
            leave_out = gr.Textbox(
                label="Leave out weights with these names", placeholder="model_ema.*", info="* stands for anything; several with commas between them",
                max_lines=1, elem_id="modelmerger_discard_weights",
            )  # fmt: skip
            with gr.Row():
                recipe = gr.Checkbox(label="Write the recipe into the file", value=True, elem_id="modelmerger_add_recipe")
                read = gr.Button("Show metadata of the models", size="sm", elem_id="modelmerger_read_metadata")
            button = gr.Button("Merge", variant="primary", elem_id="modelmerger_merge")
        with gr.Column(elem_id="modelmerger_results_container"), gr.Column(elem_id="modelmerger_results_panel"):
            result = gr.HTML(elem_id="modelmerger_result", min_height=120, padding=True)

    def merge(a: Any, b: Any, c: Any, method: str, multiplier: float, to: str, name: str, vae: str, leave_out: str, recipe: bool,
              progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008  # how gradio finds it  # fmt: skip
        return handlers.merge((a, b, c), method, multiplier, to, name, vae=vae, leave_out=leave_out or "", recipe=bool(recipe), progress=progress)

    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    method.change(lambda chosen: DESCRIPTIONS.get(chosen, ""), inputs=[method], outputs=[described], **quiet)
    read.click(lambda *names: handlers.metadata_html(names), inputs=models, outputs=[result], **quiet)
    item.select(handlers.refresh, outputs=[*models, vae], **quiet)
    inputs = [*models, method, multiplier, to, name, vae, leave_out, recipe]
    merged = button.click(merge, inputs=inputs, outputs=[result], concurrency_limit=1, api_visibility="private")
    merged.then(handlers.refresh, outputs=[*models, vae], **quiet)


def _create_models(handlers: MergerHandlers) -> list[gr.Dropdown]:
    """The dropdowns A, B, C."""
    models = []
    with gr.Row(elem_id="modelmerger_models"):
        for letter, name in (("A", "primary"), ("B", "secondary"), ("C", "tertiary")):
            with gr.Row():
                model = gr.Dropdown(label=f"Model {letter}", choices=[], value=None, elem_id=f"modelmerger_{name}_model_name")
                create_refresh_button(model, lambda: None, lambda: {"choices": handlers.names()}, f"refresh_checkpoint_{letter}")
                models.append(model)
    return models
