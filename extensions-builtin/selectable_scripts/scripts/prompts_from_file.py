"""A job for each line of a text. A line is a prompt, or options such as `--prompt "a cat" --steps 20 --width 640`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import gradio as gr
from script_jobs import MAX_PICTURES, MAX_PROMPT_CHARS, Part, copy_request, part_of, together

from modules import scripts
from modules.errors import RequestError
from modules.processing import Processed, StableDiffusionProcessing, fix_seed, process_images

MAX_LINES = 10_000
MAX_FILE_BYTES = 16 << 20


def _yes_or_no(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise ValueError("must be true or false")


OPTIONS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("prompt", "negative_prompt", "prompt_for_display", "sampler_name", "scheduler", "sd_model"), str),
        **dict.fromkeys(("seed", "subseed", "seed_resize_from_h", "seed_resize_from_w", "batch_size", "n_iter", "steps", "width", "height"), int),
        **dict.fromkeys(("subseed_strength", "cfg_scale", "distilled_cfg_scale", "denoising_strength"), float),
        **dict.fromkeys(("restore_faces", "tiling", "do_not_save_samples", "do_not_save_grid"), _yes_or_no),
        "styles": lambda text: [name.strip() for name in text.split(",") if name.strip()],
    }
)


def parse_line(line: str) -> dict[str, Any]:
    """The fields that a line sets. Raises RequestError if it cannot be parsed."""
    if len(line) > MAX_PROMPT_CHARS:
        raise RequestError(f"Prompts from file: a line has {len(line)} characters. Use at most {MAX_PROMPT_CHARS}. It begins with {line[:60]!r}.")
    if "--" not in line:
        return {"prompt": line}
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RequestError(f"Prompts from file: {line[:200]!r} cannot be parsed ({error}). Close all quotation marks.") from error
    fields: dict[str, Any] = {}
    place = 0
    while place < len(words):
        name = words[place].removeprefix("--")
        if not words[place].startswith("--") or name not in OPTIONS:
            raise RequestError(f"Prompts from file: {words[place][:100]!r} is not an option. Use {', '.join(f'--{known}' for known in OPTIONS)}.")
        if place + 1 == len(words):
            raise RequestError(f"Prompts from file: --{name} has no value in {line[:200]!r}.")
        if name in ("prompt", "negative_prompt"):  # up to the next option, so that quotation marks are optional
            end = next((later for later in range(place + 1, len(words)) if words[later].startswith("--")), len(words))
            fields[name], place = " ".join(words[place + 1 : end]), end
            continue
        try:
            fields[name] = OPTIONS[name](words[place + 1])
        except ValueError as error:
            raise RequestError(f"Prompts from file: --{name} {words[place + 1][:100]!r}: {error}.") from error
        place += 2
    return fields


def _joined(own: str, line: str, position: str) -> str:
    if not own:
        return line
    return f"{line} {own}" if position == "start" else f"{own} {line}"


class Script(scripts.Script):
    def title(self) -> str:
        return "Prompts from file or textbox"

    def ui(self, is_img2img: bool) -> list[Any]:
        iterate = gr.Checkbox(label="Iterate seed every line", value=False, elem_id=self.elem_id("checkbox_iterate"))
        same = gr.Checkbox(label="Use same random seed for all lines", value=False, elem_id=self.elem_id("checkbox_iterate_batch"))
        position = gr.Radio(["start", "end"], label="Insert prompts at the", value="start", elem_id=self.elem_id("prompt_position"))
        text = gr.Textbox(label="List of prompt inputs", lines=3, value="", elem_id=self.elem_id("prompt_txt"))
        file = gr.File(label="Upload prompt inputs", type="binary", file_types=[".txt"], elem_id=self.elem_id("file"))
        file.change(_read_file, inputs=[file], outputs=[text], show_progress="hidden", queue=False, api_visibility="private")
        return [iterate, same, position, text]

    def run(  # type: ignore[override]  # the host hands in the values of `ui`
        self, p: StableDiffusionProcessing, checkbox_iterate: bool, checkbox_iterate_batch: bool, prompt_position: str, prompt_txt: str
    ) -> Processed:
        """Raises RequestError for lines that cannot be parsed, before anything is made."""
        lines = [line.strip() for line in str(prompt_txt or "").splitlines() if line.strip()]
        if not lines or len(lines) > MAX_LINES:
            raise RequestError(f"Prompts from file: there are {len(lines)} lines. Give it 1 to {MAX_LINES}, with a prompt in each.")
        jobs = [parse_line(line) for line in lines]
        num_pictures = sum(max(job.get("n_iter", p.n_iter), 1) * max(job.get("batch_size", p.batch_size), 1) for job in jobs)
        if num_pictures > MAX_PICTURES:
            raise RequestError(f"Prompts from file: {num_pictures} pictures were requested. Use at most {MAX_PICTURES}: take fewer lines or counts.")
        p.do_not_save_grid = True
        if checkbox_iterate or checkbox_iterate_batch:
            fix_seed(p)
        state = p.context.state
        done: list[Part] = []
        state.job_count = sum(job.get("n_iter", p.n_iter) for job in jobs)
        seed = p.seed
        for job in jobs:
            if state.interrupted or state.stopping_generation:
                break
            one = _request_for(p, job, seed, prompt_position)
            done.append(part_of(process_images(one)))
            if checkbox_iterate:
                seed = int(seed) + one.batch_size * one.n_iter
        if not done:
            raise RequestError("Prompts from file: the job was interrupted before its first picture.")
        return together(p, done)


def _request_for(p: StableDiffusionProcessing, job: Mapping[str, Any], seed: Any, position: str) -> StableDiffusionProcessing:
    one = copy_request(p)
    one.seed = seed
    for name, value in job.items():
        if name == "sd_model":
            one.override_settings["sd_model_checkpoint"] = value
        elif name in ("prompt", "negative_prompt"):
            setattr(one, name, _joined(str(getattr(p, name) or ""), value, position))
        else:
            setattr(one, name, value)
    return one


def _read_file(content: bytes | None) -> Any:
    if content is None:
        return gr.skip()
    if len(content) > MAX_FILE_BYTES:
        raise RequestError(f"Prompts from file: the file has {len(content)} bytes. Use one of at most {MAX_FILE_BYTES}.")
    return gr.update(value=content.decode("utf-8-sig", errors="replace"), lines=7)
