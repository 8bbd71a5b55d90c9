"""Words from lists in the place of __name__, one for each picture: prompts, settings, infotext, a route, a name for the file."""

import os
import random
import re

import gradio as gr
from fastapi import FastAPI

from modules import script_callbacks, scripts, shared
from modules.processing import StableDiffusionProcessing
from modules.shared import opts
from modules.ui_components import FormRow, ToolButton

base_dir = scripts.basedir()
WORDS_DIR = getattr(shared.cmd_opts, "dealt_words_dir", None) or os.path.join(base_dir, "words")
saved = []


def lists():
    return sorted(os.path.splitext(name)[0] for name in os.listdir(WORDS_DIR) if name.endswith(".txt"))


def words_of(name):
    with open(os.path.join(WORDS_DIR, name + ".txt"), encoding="utf8") as f:
        return [line.strip() for line in f if line.strip()]


def deal(text, seed):
    rng = random.Random(int(seed))
    return re.sub(r"__(\w+)__", lambda match: rng.choice(words_of(match.group(1))) if match.group(1) in lists() else match.group(0), text)


class DealtWords(scripts.Script):
    def __init__(self):
        super().__init__()
        self.prompt_box = None

    def title(self):
        return "Dealt Words"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def after_component(self, component, **kwargs):
        if kwargs.get("elem_id") in ("txt2img_prompt", "img2img_prompt"):
            self.prompt_box = component

    def ui(self, is_img2img):
        with gr.Group(), gr.Accordion(self.title(), open=False, elem_id=self.elem_id("accordion")):
            with FormRow(variant="compact"):
                is_enabled = gr.Checkbox(label="Deal words", value=True, elem_id=self.elem_id("enabled"))
                same_seed = gr.Checkbox(label="Same words for all", value=False)
                refresh = ToolButton(value="\U0001f504", elem_id=self.elem_id("refresh"))
            with gr.Box():
                with gr.Row().style(equal_height=True):
                    known = gr.Dropdown(label="List", choices=lists(), value=None, type="value", interactive=True)
                    insert = gr.Button(value="Insert", variant="primary").style(full_width=False)
            hidden = gr.Textbox(visible=False, elem_id=self.elem_id("hidden"))

        refresh.click(fn=lambda: gr.update(choices=lists()), inputs=[], outputs=[known], show_progress=False)
        insert.click(fn=None, _js="(name) => '__' + name + '__'", inputs=[known], outputs=[hidden])
        known.change(fn=lambda name: gr.Textbox.update(value=name or ""), inputs=[known], outputs=[hidden])
        self.infotext_fields = [(is_enabled, lambda d: "Dealt words" in d), (same_seed, "Dealt same")]
        self.paste_field_names = [name for _, name in self.infotext_fields if isinstance(name, str)]
        return [is_enabled, same_seed]

    def process(self, p: StableDiffusionProcessing, is_enabled, same_seed):
        if not is_enabled or "__" not in p.prompt:
            return
        seeds = [p.all_seeds[0]] * len(p.all_prompts) if same_seed else p.all_seeds
        p.all_prompts = [deal(prompt, seed) for prompt, seed in zip(p.all_prompts, seeds)]
        p.all_negative_prompts = [deal(prompt, seed) for prompt, seed in zip(p.all_negative_prompts, seeds)]
        if getattr(p, "all_hr_prompts", None):
            p.all_hr_prompts = list(p.all_prompts)
        if opts.data.get("dealt_words_keep_template", True):
            p.extra_generation_params["Dealt words"] = p.prompt
        p.extra_generation_params["Dealt same"] = same_seed


def on_ui_settings():
    section = ("dealt_words", "Dealt Words")
    opts.add_option(
        "dealt_words_keep_template", shared.OptionInfo(default=True, label="Write the template into the infotext", section=section)
    )
    opts.add_option(
        "dealt_words_count",
        shared.OptionInfo(3, "Words to show", gr.Slider, {"minimum": 1, "maximum": 20, "step": 1}, section=section).info("in the tab"),
    )


def on_ui_tabs():
    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row():
            with gr.Column(scale=1):
                choice = gr.Dropdown(lists(), label="Words of", elem_id="dealt_words_choice")
            with gr.Column(scale=2):
                table = gr.Dataframe(headers=["word"], datatype=["str"], row_count=(1, "dynamic"), col_count=(1, "fixed"), interactive=False)
        choice.change(lambda name: [[word] for word in words_of(name)[: opts.dealt_words_count]], inputs=choice, outputs=table)
    return ((tab, "Dealt Words", "dealt_words_tab"),)


def on_app_started(demo, app: FastAPI):
    @app.get("/dealt-words/lists")
    async def get_lists():
        return {"lists": lists()}


def on_before_image_saved(params: script_callbacks.ImageSaveParams):
    if "Dealt words" in params.pnginfo.get("parameters", ""):
        params.pnginfo["dealt"] = (params.p.all_prompts or [params.p.prompt])[0]


def on_image_saved(params):
    saved.append(params.filename)


script_callbacks.on_ui_settings(on_ui_settings)
script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_app_started(on_app_started)
script_callbacks.on_before_image_saved(on_before_image_saved)
script_callbacks.on_image_saved(on_image_saved)
