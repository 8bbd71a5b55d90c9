"""The trial of extensions tells one that acts from one that does nothing, one that fails and one whose script fails in the browser."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.browser.conftest import CHROMIUM_NAMES
from tests.support import extensions
from tests.support.extensions import write_extension
from tools import extension_trial

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "pytest.PytestUnraisableExceptionWarning")
    ),
]
LATENT_SHIFTER = {
    "scripts/shifter.py": """
        import gradio as gr
        from modules import script_callbacks, scripts

        class Shifter(scripts.Script):
            def title(self):
                return "Latent shifter"

            def show(self, is_img2img):
                return scripts.AlwaysVisible

            def ui(self, is_img2img):
                with gr.Accordion(self.title(), open=False):
                    enabled = gr.Checkbox(False, label="Enabled", elem_id=self.elem_id("enabled"))
                    by = gr.Slider(minimum=0, maximum=1, value=0.2, label="By", elem_id=self.elem_id("by"))
                return [enabled, by]

            def process_before_every_sampling(self, p, enabled, by, **kwargs):
                if not enabled:
                    return
                unet = p.sd_model.forge_objects.unet.clone()
                unet.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * (1 - by))
                p.sd_model.forge_objects.unet = unet
                p.extra_generation_params["Latent shift"] = by
    """
}
KINDS = {  # name -> (files, what it does in a job, whether all is well)
    "words": (extensions.PROMPT_CHANGER, "picture", True),
    "shifter": (LATENT_SHIFTER, "picture", True),
    "twice": (extensions.SELECTABLE, "picture", True),
    "quiet": ({"javascript/quiet.js": "onUiLoaded(() => { window.quiet = opts.samples_save; });\n"}, "nothing", True),
    "loud": ({"javascript/loud.js": "onUiLoaded(() => { undefinedName.x = 1; });\n"}, "nothing", False),
    "broken": ({"scripts/broken.py": "raise ImportError('not here')\n"}, "nothing", False),
    "failing": (extensions.failing_in("process"), "nothing", False),
}


def try_kinds(folder: Path, *names: str, num_slots: int = 1) -> dict[str, extension_trial.Trial]:
    """Trials of these KINDS. Each takes a server and a page of its own."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if not any(shutil.which(name) for name in CHROMIUM_NAMES):
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    folders = [write_extension(folder, name, KINDS[name][0]) for name in names]
    with ThreadPoolExecutor(1) as thread:  # playwright keeps an event loop in the thread where browser tests ran before
        trials = thread.submit(extension_trial.try_all, folders, slots=(num_slots,)).result()
    assert {trial.name: (trial.acts, trial.is_well) for trial in trials} == {name: KINDS[name][1:] for name in names}
    return {trial.name: trial for trial in trials}


def test_an_extension_that_acts_on_two_slots_and_one_that_fails_in_the_browser(tmp_path: Path) -> None:
    shifter = try_kinds(tmp_path, "shifter", num_slots=2)["shifter"]
    assert (shifter.num_controls, shifter.num_shown) == (4, 0)  # the page draws a closed accordion when it is opened
    assert shifter.row().startswith("| shifter | 2 | 1 |")
    assert any("undefinedName" in line for line in try_kinds(tmp_path, "loud")["loud"].console)


@pytest.mark.nightly
def test_the_trial_tells_what_extensions_do(tmp_path: Path) -> None:
    trials = try_kinds(tmp_path, *KINDS)
    assert "broken/scripts/broken.py could not be loaded" in trials["broken"].errors[0]
    assert trials["words"].row().startswith("| words | 1 | 1 |")
