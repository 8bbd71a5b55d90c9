"""Jobs whose rows are computed in tiles against the same jobs on one slot. Sums are taken in another order, so pictures may differ by 1 of 255."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend.checkpoint_file import open_tensor_file
from backend.controlnet_loader import load_controlnet
from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.ip_adapter import apply_ip_adapter, read_ip_adapter
from backend.parallel.running import status
from backend.parallel.vae import decoding
from backend.patcher.base import set_model_options_patch_replace
from backend.patcher.controlnet import apply_controlnet_advanced
from backend.sampling import sampling_function
from backend.sampling.sampling_function import calc_cond_uncond_batch
from modules.application import Application
from tests.parity.test_split_parity import _each_row_alone
from tests.support.checkpoints import ReferenceModels
from tests.support.controlnets import build_controlnet, hint, with_deferred_controlnets, write_controlnet
from tests.support.extensions import loaded_builtin
from tests.support.fleets import configured_slots, cpu_fleet, virtual_fleet
from tests.support.ip_adapters import adapter_tables, write_adapter_file
from tests.support.loras import write_lora
from tests.support.narrow_application import gradient, img2img, narrow_application, pixels, run, txt2img

WIDTH_PX, HEIGHT_PX = 64, 128


@dataclass
class Site:
    """An application with its networks and a folder for what a job needs."""

    app: Application
    models: ReferenceModels
    folder: Path

    def pictures(self, request: Any, patch: Callable[[Any], Any] | None = None) -> list[np.ndarray]:
        """The request's pictures; `patch` changes the denoiser's patcher first."""
        engine = self.app.models.ensure_loaded()
        original = engine.forge_objects_original
        if patch is not None:
            engine.forge_objects_original = original.shallow_copy()
            engine.forge_objects_original.unet = patch(original.unet)
        try:
            done = run(request)
        finally:
            engine.forge_objects_original = original
        return [pixels(image) for image in done.images[done.index_of_first_image :]]


def ask(make: Callable[..., Any] = txt2img, **fields: Any) -> Any:
    return make(**{"width": WIDTH_PX, "height": HEIGHT_PX, "steps": 2, "do_not_save_grid": True, **fields})


def mask() -> Image.Image:
    values = np.zeros((HEIGHT_PX, WIDTH_PX), dtype=np.uint8)
    values[32:96, 16:48] = 255
    return Image.fromarray(values)


def with_controlnets(site: Site) -> Callable[[Any], Any]:
    path = site.folder / "controlnet.safetensors"
    if not path.exists():
        write_controlnet(path, build_controlnet(site.models, seed=1))
    return lambda unet: apply_controlnet_advanced(unet, load_controlnet(path), hint(HEIGHT_PX)[..., :WIDTH_PX], 1.0, 0.0, 1.0)


def with_ip_adapter(site: Site) -> Callable[[Any], Any]:
    """Limited to the left and lower part of the picture, so that each tile needs its own part of the mask."""
    path = write_adapter_file(site.folder / "ip.safetensors", adapter_tables(site.models, "plain"))
    with open_tensor_file(path) as file:
        adapter = read_ip_adapter(file)
    region = torch.zeros(1, 1, HEIGHT_PX, WIDTH_PX)
    region[..., HEIGHT_PX // 3 :, : WIDTH_PX // 2] = 1.0
    features = torch.randn(2, adapter.layers.image_proj.image_embeds.in_features, generator=torch.Generator().manual_seed(2))
    return lambda unet: apply_ip_adapter(unet, adapter, features, weight=0.9, mask_B1HW=region)


def with_calls_of_other_kinds(unet: Any) -> Any:
    """Halves of the picture one by one, and one more pass with another attention, as extensions run the network."""

    def in_halves(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        return torch.cat([apply_model(half, args["timestep"], **args["c"]) for half in args["input"].chunk(2, dim=2)], dim=2)

    def away_from_another(args: dict[str, Any]) -> torch.Tensor:
        options = {**args["model_options"]}
        options.pop("model_function_wrapper")
        options = set_model_options_patch_replace(options, lambda q, k, v, extra: v, "attn1", "input", 1)
        other, _ = calc_cond_uncond_batch(args["model"], args["cond"], None, args["input"], args["sigma"], options)
        guided: torch.Tensor = args["denoised"] + args["cond_denoised"] - other
        return guided

    patched = unet.clone()
    patched.set_model_unet_function_wrapper(in_halves)
    patched.set_model_sampler_post_cfg_function(away_from_another)
    return patched


JOBS: dict[str, Callable[[Site], list[np.ndarray]]] = {
    "calls of other kinds": lambda site: site.pictures(ask(), with_calls_of_other_kinds),
    "one row": lambda site: site.pictures(ask(cfg_scale=1.0)),
    "batch": lambda site: site.pictures(ask(batch_size=2, sampler_name="DPM++ SDE")),
    "inpaint": lambda site: site.pictures(
        ask(img2img, init_images=[gradient(WIDTH_PX, HEIGHT_PX)], denoising_strength=0.8, mask=mask(), inpainting_fill=1, steps=3)
    ),
    "hires of an odd size": lambda site: site.pictures(
        ask(enable_hr=True, hr_scale=1.625, hr_upscaler="Latent", denoising_strength=0.7, sampler_name="Euler a")
    ),
    "ControlNet": lambda site: site.pictures(ask(), with_controlnets(site)),
    "IP-Adapter": lambda site: site.pictures(ask(), with_ip_adapter(site)),
    "LoRA": lambda site: site.pictures(ask(prompt="a red cat <lora:style:0.8>", cfg_scale=1.0)),
}
SDXL_JOBS = ("one row", "ControlNet", "IP-Adapter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


@contextmanager
def open_one(folder: Path, family: str, strategy: str = "auto", **checkpoint: Any) -> Iterator[Site]:
    """The site of a family; all sites of one kind share their files. SDXL's network is shallow, as `test_unet_tiles` has the deep one."""
    own = folder / f"{family}{'-inpaint' if checkpoint else ''}"
    with narrow_application(own, family, is_shallow=family == "sdxl", **checkpoint) as (app, models), loaded_builtin(app, "sd_forge_lora"):
        lora = own / "models" / "Lora" / "style.safetensors"
        if not lora.exists():
            lora.parent.mkdir(parents=True, exist_ok=True)
            write_lora(lora, models[family], te=False, scale=0.4)
        app.options.set("multi_gpu_strategy", strategy)
        yield Site(app, models[family], own)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, list[np.ndarray]]]:
    """Pictures from one slot that runs every row alone."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    with pytest.MonkeyPatch.context() as patch, configured_slots("cpu"):
        patch.setattr(decoding, "worth_splitting", lambda *args, **kwargs: False)
        patch.setattr(sampling_function, "_call_model", _each_row_alone(with_deferred_controlnets(sampling_function._call_model)))
        for family, jobs in (("sd15", tuple(JOBS)), ("sdxl", SDXL_JOBS)):
            with open_one(folder, family) as site:
                found[family] = {job: JOBS[job](site) for job in jobs}
        with open_one(folder, "sd15", inpaint=True) as site:
            found["inpainting model"] = {"inpaint": JOBS["inpaint"](site)}
    return found


FLEETS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "2 virtual GPUs": lambda: virtual_fleet(2),
    "3 virtual GPUs": lambda: virtual_fleet(3),
    "4 virtual GPUs": lambda: virtual_fleet(4),
    "2 CPU slots": lambda: cpu_fleet(2),
}
CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, bool]]] = {
    "sd15 on CPU slots": ("2 CPU slots", "sd15", tuple(JOBS), {}),
    "sd15 on 2": ("2 virtual GPUs", "sd15", ("one row", "IP-Adapter"), {}),
    "sdxl on 3": ("3 virtual GPUs", "sdxl", ("one row",), {}),
    "inpainting model on CPU slots": ("2 CPU slots", "sd15", ("inpaint",), {"inpaint": True}),
    "every job of sd15 on 2": ("2 virtual GPUs", "sd15", tuple(JOBS), {}),
    "every job of sdxl on 3": ("3 virtual GPUs", "sdxl", SDXL_JOBS, {}),
    "every job of sdxl on 4": ("4 virtual GPUs", "sdxl", SDXL_JOBS, {}),
}


def assert_near(pictures: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(pictures) == len(expected)
    for picture, other in zip(pictures, expected):
        assert np.abs(picture - other).max() <= 1


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.nightly] if case.startswith("every") else []) for case in CASES])
def test_tiles_make_the_whole_rows_pictures(folder: Path, alone: dict[str, dict[str, list[np.ndarray]]], case: str) -> None:
    fleet, family, jobs, checkpoint = CASES[case]
    with FLEETS[fleet](), open_one(folder, family, "tiles", **checkpoint) as site:
        for job in jobs:
            pictures = JOBS[job](site)
            plan = status.current_plan()
            assert plan is not None
            assert plan.strategy == "tiles", f"{job}: {plan.reason}"
            assert_near(pictures, alone["inpainting model" if checkpoint else family][job])


def test_displaced_tiles_are_near_and_named_and_jobs_of_few_steps_stay_exact(folder: Path, alone: dict[str, dict[str, list[np.ndarray]]]) -> None:
    with cpu_fleet(2), open_one(folder, "sd15", "tiles") as site:

        def make(**fields: Any) -> tuple[np.ndarray, str, list[str]]:
            done = run(ask(cfg_scale=1.0, **fields))
            return pixels(done.images[0]), done.infotexts[0], list(done.comments.split("\n"))

        exact, exact_text, _ = make(steps=12)
        site.app.options.set("multi_gpu_tiles", "displaced")
        displaced, text, _ = make(steps=12)
        plan = status.current_plan()
        few, few_text, comments = make()
        site.app.options.set("multi_gpu_tiles", "exact")
    assert "Tiles: displaced after 4 steps" in text
    assert text.replace(", Tiles: displaced after 4 steps", "") == exact_text
    assert plan is not None and "displaced in 67% of the steps" in plan.reason
    assert 0 < np.abs(displaced - exact).mean() < 6
    assert_near([few], alone["sd15"]["one row"])
    assert "Tiles:" not in few_text and any("of 2 steps 4 are exact" in comment for comment in comments)


def test_a_hook_that_needs_whole_tensors_keeps_rows_whole_and_the_reason_says_so(folder: Path) -> None:
    def notice(hidden: torch.Tensor, options: Any) -> torch.Tensor:
        heights.add(hidden.shape[2])
        return hidden

    heights: set[int] = set()

    def patch(unet: Any) -> Any:
        patched = unet.clone()
        patched.set_model_input_block_patch(notice)
        return patched

    with virtual_fleet(2), open_one(folder, "sd15", "tiles") as site:
        site.pictures(ask(cfg_scale=1.0, steps=1), patch)
        plan = status.current_plan()
    assert plan is not None
    assert plan.strategy == "single"
    assert "notice needs whole tensors" in plan.reason
    assert max(heights) == HEIGHT_PX // 8


def test_a_replaced_forward_keeps_rows_whole(folder: Path) -> None:
    with virtual_fleet(2), open_one(folder, "sd15", "tiles") as site:
        view = site.app.models.ensure_loaded().forge_objects.unet.model.diffusion_model.input_blocks[1][0]
        original = view.forward
        view.forward = lambda *args, **kwargs: 1.0 * original(*args, **kwargs)
        site.pictures(ask(cfg_scale=1.0, steps=1))
        plan = status.current_plan()
        del view.forward
    assert plan is not None
    assert plan.strategy == "single"
    assert "replaced the forward of down_blocks.0.resnets.0" in plan.reason


def test_a_full_slot_amid_exchanges_leaves_the_same_picture(folder: Path, alone: dict[str, dict[str, list[np.ndarray]]]) -> None:
    """The first shortage evicts idle models, the second takes the slot's share; each time the step is done again."""
    with virtual_fleet(3), open_one(folder, "sdxl", "tiles") as site:
        site.pictures(ask(cfg_scale=1.0, steps=1))
        device = virtual_gpu.get_device(1)
        device.set_faults(Faults(out_of_memory_at=frozenset({300, 700})))
        try:
            pictures = JOBS["one row"](site)
            assert device.num_refused == 2
        finally:
            device.set_faults(None)
    assert_near(pictures, alone["sdxl"]["one row"])


def test_a_slot_lost_amid_exchanges_leaves_the_same_picture(folder: Path, alone: dict[str, dict[str, list[np.ndarray]]]) -> None:
    """Slot 2 has a copy of the network and nothing else that the job needs."""
    with virtual_fleet(3) as fleet, open_one(folder, "sdxl", "tiles") as site:
        site.pictures(ask(cfg_scale=1.0, steps=1))
        virtual_gpu.get_device(2).set_faults(Faults(lost_at_operation=500))
        try:
            pictures = JOBS["one row"](site)
        finally:
            virtual_gpu.get_device(2).set_faults(None)
        plan = status.current_plan()
        assert [slot.index for slot in fleet.working_slots] == [0, 1]
    assert plan is not None
    assert [list(team) for team in plan.tiles] == [[0, 1]]
    assert_near(pictures, alone["sdxl"]["one row"])
