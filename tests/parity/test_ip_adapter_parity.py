"""Pictures with IP-Adapters against diffusers' pipelines with load_ip_adapter: same files, image encoder, picture, prompts and noise; fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.clip_vision import ClipVision, load_clip_vision
from backend.devices.probing import probe_devices
from backend.ip_adapter import IPAdapter, apply_ip_adapter, read_ip_adapter
from backend.parallel.running.session import find_bound_hook
from backend.patcher.controlnet import ControlNetError, apply_controlnet_advanced
from backend.patcher.unet import UnetPatcher
from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from tests.parity.test_controlnet_parity import CONFIG, NUM_STEPS, ONE_PIXEL_STEP, SIDE_PX, Loaded, _assert_same, _cpu_engine, _noise
from tests.parity.test_pipeline_parity import NEGATIVE, PROMPT
from tests.support.checkpoints import build_models
from tests.support.controlnets import hint
from tests.support.ip_adapters import KINDS, adapter_tables, build_tower, reference_picture, write_adapter_file, write_tower
from tests.support.ip_adapters import SIDE_PX as TOWER_SIDE_PX

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning")
__all__ = ["_cpu_engine"]


class _Site:
    """A checkpoint and an image encoder, the library's and ours."""

    def __init__(self, family: str, folder: Path) -> None:
        memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))
        self.loaded, self.tower = Loaded(family, folder), build_tower()
        self.ours: ClipVision = load_clip_vision(write_tower(folder / "tower.safetensors", self.tower))

    def library_picture(self, noise: Tensor, adapters: list[Any], scale: Any, picture: Any, **arguments: Any) -> Tensor:
        models = self.loaded.models
        parts: dict[str, Any] = {
            "unet": models.unet, "vae": models.vae, "scheduler": self.loaded.scheduler(), "text_encoder": models.text_encoders[0],
            "tokenizer": build_clip_tokenizer(), "image_encoder": self.tower,
            "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": TOWER_SIDE_PX}, crop_size=TOWER_SIDE_PX),
        }  # fmt: skip
        if models.family == "sdxl":
            parts |= {"tokenizer_2": build_clip_tokenizer(pad_token_id=0), "text_encoder_2": models.text_encoders[1], "add_watermarker": False}
            pipeline: Any = StableDiffusionXLPipeline(**parts)
        else:
            pipeline = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_ip_adapter(
            [{table: dict(named) for table, named in one.items()} for one in adapters], [""] * len(adapters), [""] * len(adapters)
        )
        pipeline.set_ip_adapter_scale(scale)
        try:
            images: Tensor = pipeline(
                prompt=PROMPT, negative_prompt=NEGATIVE, height=SIDE_PX, width=SIDE_PX, guidance_scale=5.0, num_inference_steps=NUM_STEPS,
                latents=noise, output_type="pt", ip_adapter_image=picture, **arguments,
            ).images  # fmt: skip
        finally:
            pipeline.unload_ip_adapter()
        return images

    def seen(self, unet: UnetPatcher, adapter: IPAdapter, picture: Any, **asked: Any) -> UnetPatcher:
        features = self.ours.encode_images([np.asarray(picture)], hidden_states=adapter.reads_hidden_states)
        return apply_ip_adapter(unet, adapter, features, **asked)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Site]:
    yield _Site(request.param, tmp_path_factory.mktemp(request.param))


def _read(path: Path) -> IPAdapter:
    with open_tensor_file(path) as file:
        return read_ip_adapter(file)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(site: _Site, tmp_path: Path, kind: str) -> None:
    if kind == "full" and site.loaded.models.family == "sdxl":
        pytest.skip("there are no such adapters")
    tables, noise, loaded = adapter_tables(site.loaded.models, kind), _noise(), site.loaded
    adapter = _read(write_adapter_file(tmp_path / f"ip.{'bin' if kind == 'plain' else 'safetensors'}", tables))
    library = site.library_picture(noise, [tables], 0.7, reference_picture())
    without = loaded.plain_picture()
    unet = site.seen(loaded.unet, adapter, reference_picture(), weight=0.7)
    _assert_same(loaded.our_picture(unet, noise), library, without)
    assert torch.equal(loaded.our_picture(loaded.unet, noise), without), "off again"
    assert find_bound_hook(unet.model_options["transformer_options"]) is None, "every plan can live with it"


def test_two_adapters_with_a_mask_beside_a_controlnet(site: _Site, tmp_path: Path) -> None:
    loaded, noise = site.loaded, _noise()
    tables = [adapter_tables(loaded.models, kind, seed=seed) for kind, seed in (("plain", 1), ("plus", 2))]
    pictures = [reference_picture(seed=1), reference_picture(seed=2)]
    left = torch.zeros(1, 1, SIDE_PX, SIDE_PX)
    left[..., : SIDE_PX // 2] = 1.0
    whole = torch.ones_like(left)
    library = site.library_picture(noise, tables, [0.6, 0.5], pictures, cross_attention_kwargs={"ip_adapter_masks": [left, whole]})
    unet = loaded.unet
    for index, (one, picture) in enumerate(zip(tables, pictures)):
        adapter = _read(write_adapter_file(tmp_path / f"{index}.safetensors", one))
        unet = site.seen(unet, adapter, picture, weight=(0.6, 0.5)[index], mask_B1HW=left if index == 0 else None)
    ours = loaded.our_picture(unet, noise)
    _assert_same(ours, library, loaded.plain_picture())
    both = apply_controlnet_advanced(unet, loaded.links[0], hint(), 1.0, 0.0, 1.0)
    assert (loaded.our_picture(both, noise) - ours).abs().mean() > 0.5 * ONE_PIXEL_STEP


def test_a_range_of_steps(site: _Site, tmp_path: Path) -> None:
    loaded, noise = site.loaded, _noise()
    adapter = _read(write_adapter_file(tmp_path / "ip.safetensors", adapter_tables(loaded.models, "plain")))
    ranges = [(0.0, 1.0), (0.0, 0.3), (1.0, 1.0)]
    all_of_it, half, none = (
        loaded.our_picture(site.seen(loaded.unet, adapter, reference_picture(), percent_range=one), noise) for one in ranges
    )  # fmt: skip
    plain = loaded.plain_picture()
    assert (none - plain).abs().max() < 1e-3
    assert (half - plain).abs().max() > 1e-2 and not torch.equal(half, all_of_it)


def test_an_adapter_of_another_family_is_refused(site: _Site, tmp_path: Path) -> None:
    other = build_models(Path("none"), "sdxl" if site.loaded.models.family == "sd15" else "sd15")
    adapter = _read(write_adapter_file(tmp_path / "wrong.safetensors", adapter_tables(other, "plain")))
    with pytest.raises(ControlNetError, match=r"wrong\.safetensors does not fit the checkpoint"):
        site.seen(site.loaded.unet, adapter, reference_picture())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"image_proj.proj_in.weight": (8, 512), "ip_adapter.1.to_k_ip.weight": (2, 2)}, "for faces"),
        ({"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (2, 2)}, "without 1 of its tensors"),
        ({"image_proj.x": (2,), "ip_adapter.1.to_k_ip.weight": (2, 2), "ip_adapter.1.to_v_ip.weight": (2, 2)}, "unsupported kind"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, keys: dict[str, tuple[int, ...]], words: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, path)
    with pytest.raises(CheckpointError, match=words):
        _read(path)
