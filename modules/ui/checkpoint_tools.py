"""The Checkpoint tools tab: converts model files to other types, takes parts out, puts parts together, and merges LoRA in.

The work is the engine's converter; this tab names files of the model folders for it, and shows how far it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from backend.model_folders import find_files
from modules.checkpoints.import_lock import network_imports
from modules.errors import RequestError
from modules.nearest_names import say_nearest
from modules.ui.shown_text import plaintext_to_html

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

TYPES = (
    *("keep", "fp32", "fp16", "bf16", "fp8", "fp8_scaled", "int8", "int8_convrot", "nf4", "fp4"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp8", "nvfp4"),
)
PARTS = ("all", "denoiser", "vae", "text")
_LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_MAX_NAME = 200
_GGUF = ".gguf"


class FileMaker:
    """What the tabs that write model files share: the files that can be named, the target's name, one job at a time."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self._running = threading.Lock()

    def file_names(self) -> list[str]:
        """Checkpoints, then VAE and text encoder files."""
        self.app.checkpoints.refresh()
        self.app.additional_modules.refresh()
        return [*(info.name for info in self.app.checkpoints), *self.app.additional_modules.files]

    def lora_names(self) -> list[str]:
        return list(self._lora_files())

    def _lora_files(self) -> dict[str, Path]:
        return {path.relative_to(root).as_posix(): path for root in self.app.config.lora_dirs for path in find_files(root, _LORA_SUFFIXES)}

    def make(self, write: Callable[[], str], doing: str) -> str:
        """What `write` says in HTML, or why nothing was written. `doing`: "converted", "merged"."""
        if self.app.config.disable_extension_access:
            text = f"Files cannot be {doing} from other computers. Start with --enable-insecure-extension-access to allow it."
            return plaintext_to_html(text, "error")
        if not self._running.acquire(blocking=False):
            return plaintext_to_html("A file is being written already. Wait until it is done.", "error")
        try:
            return plaintext_to_html(write())
        except RequestError as error:
            return plaintext_to_html(str(error), "error")
        finally:
            self._running.release()

    def _target(self, name: str, to: str, *, is_kept_gguf: bool = False) -> Path:
        """A new file in the checkpoint folder. Raises: RequestError for a name with folders, or none."""
        name = (name or "").strip()
        if not name or len(name) > _MAX_NAME or name.startswith(".") or any(sign in name for sign in '/\\:*?"<>|\0'):
            raise RequestError(f'File name {name[:_MAX_NAME]!r}: give a name without folders or the signs / \\ : * ? " < > |.')
        suffix = _GGUF if to.startswith("q") or is_kept_gguf else ".safetensors"
        return self.app.config.ckpt_dirs[0] / (name if Path(name).suffix.lower() == suffix else f"{name}{suffix}")

    def _file(self, name: str) -> Path:
        known = self.file_names()
        info, module = self.app.checkpoints.find(name), self.app.additional_modules.files.get(name)
        if info is None and module is None:
            raise RequestError(f"File {name[:_MAX_NAME]!r} does not exist; {say_nearest(name, known)}.")
        return info.path if info is not None else Path(str(module))

    def _lora(self, name: str) -> Path:
        files = self._lora_files()
        if name not in files:
            raise RequestError(f"LoRA {name[:_MAX_NAME]!r} does not exist; {say_nearest(name, files)}.")
        return files[name]


class ToolsHandlers(FileMaker):
    """Handlers of the tab."""

    def refresh(self) -> list[Any]:
        return [gr.update(choices=self.file_names()), gr.update(choices=self.lora_names())]

    def convert(
        self,
        sources: Sequence[str] | None,
        to: str,
        part: str,
        loras: Sequence[str] | None,
        strength: float,
        name: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how gradio finds it
    ) -> str:
        """Convert, and say in HTML what was written, or why nothing was."""
        return self.make(lambda: self._convert(sources or [], to, part, loras or [], strength, name, progress), "converted")

    def _convert(self, sources: Sequence[str], to: str, part: str, loras: Sequence[str], strength: float, name: str, progress: Any) -> str:
        with network_imports:
            from backend.checkpoint_converter import Conversion, ConversionError, convert_checkpoint  # imports torch
            from backend.checkpoint_file import CheckpointError
            from backend.patcher.lora_files import LoraError

        files = tuple(self._file(source) for source in sources)
        target = self._target(name, to, is_kept_gguf=to == "keep" and bool(files) and all(_is_gguf(path) for path in files))

        def report(done: int, total: int) -> None:
            progress(done / max(total, 1), desc=f"{done / 1e9:.1f} of {total / 1e9:.1f} GB")

        try:
            job = Conversion(
                sources=files,
                target=target,
                to=to,
                part=part,
                loras=tuple((self._lora(lora), float(strength)) for lora in loras),
            )
            num_bytes = convert_checkpoint(job, report)
        except (ConversionError, CheckpointError, LoraError, OSError) as error:
            log.info("Checkpoint tools: %s", error)
            raise RequestError(str(error)) from error
        log.info("Checkpoint tools: wrote %s (%.2f GB).", target, num_bytes / 1e9)
        return f"{target.name}: {num_bytes / 1e9:.2f} GB, in {target.parent}."


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == _GGUF


def create_checkpoint_tools_tab(app: Application, item: gr.Tab) -> None:
    """Build the tab inside the current gradio context. Its lists are read when it is opened."""
    handlers = ToolsHandlers(app)
    with gr.Row(elem_classes=["generation-columns"]):
        with gr.Column():
            sources = gr.Dropdown(label="Files", info="Several are put together", multiselect=True, choices=[], elem_id="checkpoint_tools_files")
            with gr.Row():
                to = gr.Dropdown(label="Type", choices=list(TYPES), value="keep", elem_id="checkpoint_tools_type")
                part = gr.Dropdown(label="Part", choices=list(PARTS), value="all", elem_id="checkpoint_tools_part")
            loras = gr.Dropdown(label="Merge LoRA", multiselect=True, choices=[], elem_id="checkpoint_tools_loras")
            strength = gr.Slider(label="LoRA strength", minimum=-2, maximum=2, step=0.05, value=1, elem_id="checkpoint_tools_strength")
            name = gr.Textbox(label="File name", placeholder="In the checkpoint folder", max_lines=1, elem_id="checkpoint_tools_name")
            button = gr.Button("Convert", variant="primary", elem_id="checkpoint_tools_convert")
        with gr.Column():
            result = gr.HTML(elem_id="checkpoint_tools_result", min_height=120)
    item.select(handlers.refresh, outputs=[sources, loras], show_progress="hidden", queue=False, api_visibility="private")
    button.click(handlers.convert, inputs=[sources, to, part, loras, strength, name], outputs=[result], concurrency_limit=1, api_visibility="private")
