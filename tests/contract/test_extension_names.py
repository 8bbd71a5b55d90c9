"""Names used by two or more public extensions (data/extension_names.txt) exist, or are listed with the reason why not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.extensions import loaded_builtin
from tests.support.narrow_application import narrow_application

LIST = Path(__file__).parent / "data" / "extension_names.txt"

_NO_SUCH_NAME = "an attribute of a loaded LoRA (a loop variable called lora), no name of the module; networks.Network has it"
LEFT_OUT = {
    "modules.api.models.*": "a star import, which is no name",
    "modules.img2img.__controlnet_original_process_batch": "set by the extension that looks for it",
    "modules.processing.__controlnet_original_process_images_inner": "set by the extension that looks for it",
    "modules.shared.sd_model.conditioner": "a part of A1111's SDXL class; extensions ask for it after is_sdxl, Forge's text engines are in its place",
    "modules.shared.sd_model.model": "A1111's wrapper around the UNet; here it is sd_model.forge_objects.unet.model",
    "lora.modules": _NO_SUCH_NAME,
    "lora.modules.keys": _NO_SUCH_NAME,
    "lora.name": _NO_SUCH_NAME,
    "lora.te_multiplier": _NO_SUCH_NAME,
    "lora.unet_multiplier": _NO_SUCH_NAME,
    "networks.network_Linear_forward": "A1111's replaced forward of linear layers, put back by those who replace it; weights are merged here",
    "webui.wrap_gradio_gpu_call": "the old place of modules.call_queue.wrap_gradio_gpu_call, tried last by those who use it",
}
LEFT_OUT_PACKAGES = {
    "ldm": "the reference code of Stable Diffusion is not part of this program",
    "sgm": "the reference code of SDXL is not part of this program",
}


OF_SINGLE_EXTENSIONS = (
    *("backend.args.dynamic_args", "backend.misc.image_resize.adaptive_resize", "backend.misc.tomesd.TomePatcher"),
    *("backend.operations.ForgeOperations", "backend.operations.using_forge_operations", "backend.operations.weights_manual_cast"),
    *("modules.img2img.img2img", "modules.sd_vae.reload_vae_weights", "modules.textual_inversion.dataset.PersonalizedBase"),
    *("modules_forge.forge_canvas.canvas.ForgeCanvas", "modules_forge.supported_preprocessor.PreprocessorClipVision"),
    *("modules.ui_settings.create_setting_component", "modules.ui_settings.get_value_for_setting"),
)
"""Names that one extension was seen to use; what they do is tested with their modules."""


def names() -> list[str]:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in lines if not line.startswith("#")]


@pytest.fixture(scope="module", autouse=True)
def a_model_in_use(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with narrow_application(Path(tmp_path_factory.mktemp("data")), is_shallow=True) as (app, _):
        app.models.ensure_loaded()
        with loaded_builtin(app, "sd_forge_controlnet", "sd_forge_lora"):
            yield


def find(name: str) -> Any:
    parts = name.split(".")
    found: Any = None
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def is_left_out(name: str) -> bool:
    return name in LEFT_OUT or name.split(".")[0] in LEFT_OUT_PACKAGES


def test_every_name_can_be_imported_or_is_listed_as_left_out() -> None:
    missing = []
    for name in (*names(), *OF_SINGLE_EXTENSIONS):
        try:
            find(name)
        except (ModuleNotFoundError, AttributeError) as error:
            if not is_left_out(name):
                missing.append(f"{name}: {error}")
    assert missing == []


def test_what_is_listed_as_left_out_is_used_by_someone_and_is_not_there() -> None:
    known = set(names())
    assert set(LEFT_OUT) <= known
    assert set(LEFT_OUT_PACKAGES) <= {name.split(".")[0] for name in known}
    for name in LEFT_OUT:
        with pytest.raises((ModuleNotFoundError, AttributeError)):
            find(name)
