"""Names around the model that extensions import, with a model in use: they act."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backend.args import dynamic_args
from modules import sd_samplers_compvis, sd_vae
from modules.application import Application
from modules.errors import RequestError
from modules.samplers.kdiffusion import KDiffusionSampler
from modules.textual_inversion.dataset import PersonalizedBase, PersonalizedDataLoader
from modules_forge import shared as forge_shared
from modules_forge.supported_preprocessor import PreprocessorClipVision
from tests.support.checkpoints import build_models
from tests.support.ip_adapters import SIDE_PX as TOWER_SIDE_PX
from tests.support.ip_adapters import build_tower, write_tower
from tests.support.narrow_application import gradient, narrow_application, run, txt2img


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("facades")) as (app, _):
        app.options.samples_save = False
        yield app


def test_facts_of_the_last_batch_can_be_read(app: Application) -> None:
    run(txt2img(steps=1, override_settings={"emphasis": "No norm"}))
    assert dynamic_args["emphasis_name"] == "No norm" and dynamic_args["online_lora"] is False
    assert dynamic_args["forge_unet_storage_dtype"] is app.models.engine.forge_objects.unet.model.storage_dtype  # type: ignore[union-attr]
    assert dynamic_args["embedding_dir"] == str(app.config.embeddings_dirs[0])


def test_a_sampler_of_the_reference_code_is_one_of_ours(app: Application) -> None:
    engine = app.models.ensure_loaded()
    made = sd_samplers_compvis.VanillaStableDiffusionSampler(type("DDIMSampler", (), {}), engine)
    assert isinstance(made, KDiffusionSampler) and made.config.name == "DDIM"
    assert not isinstance(made, sd_samplers_compvis.VanillaStableDiffusionSampler)
    with pytest.raises(RequestError, match="Fastest"):
        sd_samplers_compvis.VanillaStableDiffusionSampler("Fastest", engine)


def test_a_vae_is_used_from_then_on(app: Application) -> None:
    from safetensors.torch import save_file

    before = run(txt2img(steps=1))
    vae = build_models(Path("none"), "sd15", seed=9).vae
    folder = app.additional_modules.vae_roots[0]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae.state_dict(), folder / "other.safetensors")
    engine = sd_vae.reload_vae_weights(vae_file=str(folder / "other.safetensors"))
    try:
        assert app.options.sd_vae == "other.safetensors" and engine is app.models.engine
        assert run(txt2img(steps=1)).images[0].tobytes() != before.images[0].tobytes()
        with pytest.raises(RequestError, match=r"'gone\.safetensors' does not exist"):
            sd_vae.reload_vae_weights(vae_file="gone.safetensors")
    finally:
        sd_vae.reload_vae_weights(vae_file=None)
    assert run(txt2img(steps=1)).images[0].tobytes() == before.images[0].tobytes()


def test_a_folder_of_pictures_becomes_batches_with_captions(app: Application, tmp_path: Path) -> None:
    for name in ("001 a cat", "2-dog"):
        gradient(64, 48).save(tmp_path / f"{name}.png")
    (tmp_path / "2-dog.txt").write_text("dog, brown, dog", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes(b"x")
    template = tmp_path / "template.txt"
    template.write_text("a photo of [name], [filewords]\n", encoding="utf-8")
    engine = app.models.ensure_loaded()
    data = PersonalizedBase(str(tmp_path), 32, 32, 3, flip_p=0.0, placeholder_token="thing", model=engine, template_file=template, batch_size=9)
    assert (len(data), data.batch_size) == (6, 6)
    (first,), (second,) = data[0], data[1]
    assert (first.cond_text, second.cond_text) == ("a photo of thing, a cat", "a photo of thing, dog, brown, dog")
    assert first.pixel_values is not None and first.pixel_values.shape == (3, 32, 32) and first.pixel_values.abs().max() <= 1
    assert first.latent_sample.shape == (4, 4, 4)
    batch = next(iter(PersonalizedDataLoader(data, batch_size=2)))
    assert batch.latent_sample.shape == (2, 4, 4, 4) and len(batch.cond_text) == 2
    with pytest.raises(ValueError, match="has no pictures"):
        PersonalizedBase(str(tmp_path / "nothing"), 32, 32, 1)


def test_a_preprocessor_encodes_pictures_with_its_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge_shared, "_folders", {**forge_shared._folders, "preprocessor_dir": tmp_path})
    monkeypatch.setattr(PreprocessorClipVision, "global_cache", {})
    own = PreprocessorClipVision("Own tower", "https://example.invalid/tower.safetensors", "tower.safetensors")
    picture = np.asarray(Image.effect_noise((TOWER_SIDE_PX, TOWER_SIDE_PX), 90).convert("RGB"))
    with pytest.raises(FileNotFoundError, match=r"Download it from https://example.invalid/tower.safetensors"):
        own(picture, 512)
    tower = build_tower()
    write_tower(tmp_path / "tower.safetensors", tower)
    found = own(picture, 512)
    assert own.clipvision is not None
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    pixels = (torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()) / 255 - mean) / std
    with torch.no_grad():
        expected = tower(pixels.to(next(tower.parameters()).dtype), output_hidden_states=True)
    pairs = {"image_embeds": expected.image_embeds, "last_hidden_state": expected.last_hidden_state}
    pairs["penultimate_hidden_states"] = expected.hidden_states[-2]
    for name, tensor in pairs.items():
        assert torch.allclose(getattr(found, name).float(), tensor.float(), atol=2e-2) and found[name] is getattr(found, name)
    with pytest.raises(AttributeError, match="no colors"):
        _ = found.colors
    assert PreprocessorClipVision("Again", "", "tower.safetensors").load_clipvision() is own.clipvision
