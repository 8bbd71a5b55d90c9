"""Flux.1 through the whole product: jobs of every kind on one slot, and the same pictures over several. Reference: one slot; rows in batches differ
by rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backend import checkpoint_file, memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError
from backend.devices import virtual_gpu
from backend.diffusion_engine.base import ForgeDiffusionEngine
from backend.loader import load_checkpoint
from backend.nn.program import Program
from backend.parallel.planning.preview import preview_plan
from backend.parallel.running import status
from modules.application import Application
from tests.support.applications import installed_application
from tests.support.extensions import loaded_builtin
from tests.support.fleets import virtual_fleet
from tests.support.flux_checkpoints import write_flux
from tests.support.flux_networks import make_vae, original_tensors
from tests.support.narrow_application import img2img, pixels, run, txt2img

SIDE_PX = 64


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All-in-one files of dev and Fill, the parts of a dev model, and a LoRA on the file's fused matrices."""
    folder = tmp_path_factory.mktemp("data")
    files = write_flux(folder, "all-in-one", name="dev")
    write_flux(folder, "all-in-one", name="fill", in_channels=384, out_channels=64)
    write_flux(folder, "original", name="parts")
    generator = torch.Generator().manual_seed(8)
    lora = {}
    for key, tensor in original_tensors(files.flux).items():
        if key.endswith(".weight") and tensor.ndim == 2 and "_blocks" in key:
            name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            lora[f"{name}.lora_up.weight"] = torch.randn(tensor.shape[0], 2, generator=generator) * 0.2
            lora[f"{name}.lora_down.weight"] = torch.randn(2, tensor.shape[1], generator=generator) * 0.2
    (folder / "models" / "Lora").mkdir()
    save_file(lora, folder / "models" / "Lora" / "bold.safetensors")
    return folder


def _mask() -> Image.Image:
    values = np.zeros((SIDE_PX, SIDE_PX), dtype=np.uint8)
    values[16:48, 16:48] = 255
    return Image.fromarray(values)


BASE: dict[str, Any] = {"cfg_scale": 1.0, "sampler_name": "Euler", "scheduler": "Simple", "do_not_save_grid": True}
JOBS: dict[str, Any] = {
    "txt2img": lambda: txt2img(**BASE, batch_size=2),
    "CFG": lambda: txt2img(**{**BASE, "cfg_scale": 3.0}, negative_prompt="dark"),
    "DPM++ 2M": lambda: txt2img(**{**BASE, "sampler_name": "DPM++ 2M"}),
    "img2img": lambda: img2img(**BASE, denoising_strength=0.6),
    "inpaint": lambda: img2img(**BASE, denoising_strength=0.8, mask=_mask(), mask_blur=0, inpainting_fill=1),
    "hires": lambda: txt2img(**BASE, enable_hr=True, hr_scale=1.5, hr_upscaler="Latent", denoising_strength=0.7),
    "LoRA": lambda: txt2img(**BASE, prompt="a red cat<lora:bold:1>"),
    "Fill": lambda: img2img(**BASE, denoising_strength=1.0, mask=_mask(), mask_blur=0, inpainting_fill=1),
}


def _pictures(app: Application, job: str) -> np.ndarray:
    request = JOBS[job]()
    request.override_settings = {"sd_model_checkpoint": "fill" if job == "Fill" else "dev"}
    done = run(request)
    return np.stack([pixels(image) for image in done.images[done.index_of_first_image :]])


@pytest.fixture(scope="module")
def alone(data_dir: Path) -> dict[str, np.ndarray]:
    with virtual_fleet(1), installed_application(data_dir) as app, loaded_builtin(app, "sd_forge_lora"):
        app.options.live_previews_enable = False
        found = {job: _pictures(app, job) for job in JOBS}
        engine = app.models.engine
        assert engine is not None and engine.family == "flux" and engine.is_flux
        return found


def test_jobs_make_pictures(alone: dict[str, np.ndarray]) -> None:
    shapes = {job: pictures.shape for job, pictures in alone.items()}
    assert shapes["txt2img"] == (2, SIDE_PX, SIDE_PX, 3) and shapes["hires"] == (1, 96, 96, 3)
    assert all(pictures.std() > 1 for pictures in alone.values())
    assert not np.array_equal(alone["LoRA"][0], alone["txt2img"][0]) and not np.array_equal(alone["CFG"][0], alone["txt2img"][0])


def test_inpainting_keeps_what_is_not_masked(alone: dict[str, np.ndarray]) -> None:
    """Of the picture, as the decoder gives it; in the mask all is new."""
    source = pixels(img2img().init_images[0])
    for job in ("inpaint", "Fill"):
        changed = np.abs(alone[job][0] - source).mean(axis=2)
        assert changed[:15].max() == 0 and changed[20:44, 20:44].mean() > 5, job


@pytest.mark.parametrize("strategy", ["layers", "replicas", "tiles"])
def test_two_slots_make_the_same_pictures(data_dir: Path, alone: dict[str, np.ndarray], strategy: str) -> None:
    with virtual_fleet(2), installed_application(data_dir) as app, loaded_builtin(app, "sd_forge_lora"):
        app.options.live_previews_enable = False
        app.options.set("multi_gpu_strategy", strategy)
        for job in ("txt2img", "img2img", "LoRA", "hires"):
            assert np.abs(_pictures(app, job) - alone[job]).max() <= 1, job
            plan = status.current_plan()
            assert plan is not None and plan.strategy == (strategy if job == "txt2img" or strategy != "replicas" else plan.strategy)


def test_the_negative_prompt_costs_nothing_at_cfg_1(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        _pictures(app, "DPM++ 2M")  # loads the model
        program_run = Program.run
        monkeypatch.setattr(Program, "run", lambda self, state: (rows.append(state.tensors["image"].shape[0]), program_run(self, state))[1])
        _pictures(app, "DPM++ 2M")
    assert rows == [1, 1, 1]


def test_what_is_missing_and_what_is_wrong_is_said(data_dir: Path, tmp_path: Path) -> None:
    checkpoint = data_dir / "models" / "Stable-diffusion" / "parts.safetensors"
    text = [data_dir / "models" / "text_encoder" / name for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")]
    with virtual_fleet(1):
        with pytest.raises(CheckpointError, match=r"parts\.safetensors needs .*T5-XXL.*VAE.*models/text_encoder.*models/VAE"):
            load_checkpoint(checkpoint, config=BackendConfig())
        four = make_vae(latent_channels=4)
        save_file(four.state_dict(), tmp_path / "sd.safetensors")
        with pytest.raises(CheckpointError, match=r"sd\.safetensors: is a VAE with 4 latent channels; Flux\.1 needs one with 16"):
            load_checkpoint(checkpoint, config=BackendConfig(), additional_modules=[*text, tmp_path / "sd.safetensors"])


def test_there_is_a_plan_before_it_is_loaded(data_dir: Path) -> None:
    with virtual_fleet(2):
        preview = preview_plan(data_dir / "models" / "Stable-diffusion" / "dev.safetensors")
    assert (preview.model, preview.side_px) == ("Flux.1", 1024)


def test_a_text_encoder_larger_than_its_slot_streams_and_is_not_read_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 4 and 12 MB on a slot of 6 MB, before and after the transformer has had the slot; the file is read once."""
    checkpoint = data_dir / "models" / "Stable-diffusion" / "dev.safetensors"

    def condition(engine: ForgeDiffusionEngine, prompt: str) -> dict[str, torch.Tensor]:
        found = engine.get_learned_conditioning([prompt])
        assert isinstance(found, dict)
        return {name: tensor.cpu() for name, tensor in found.items()}

    with virtual_fleet(1, 64 * 2**20):
        wanted = condition(load_checkpoint(checkpoint, config=BackendConfig()), "a red cat")
    with virtual_fleet(1, 6 * 2**20):
        engine = load_checkpoint(checkpoint, config=BackendConfig())
        monkeypatch.setattr(checkpoint_file, "open_tensor_file", lambda path: pytest.fail(f"{path} was read again"))
        for _ in range(2):
            made = condition(engine, "a red cat")
            assert all(torch.allclose(made[name], wanted[name], atol=1e-5) for name in wanted)
            assert {str(tensor.device) for tensor in engine.cond_stage_model["t5xxl"].parameters()} == {"cpu", "vgpu:0"}, "in part"
            memory_management.load_model_gpu(engine.forge_objects.unet)
            assert virtual_gpu.get_device(0).peak_bytes <= 6 * 2**20
