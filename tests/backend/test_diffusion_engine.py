"""The families' engines. References: transformers' encoders, and the prompt encoding of diffusers' pipelines."""

from __future__ import annotations

from collections import UserList

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.models.embeddings import Timesteps

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.loader import load_checkpoint
from backend.text_processing.clip_tokenizer import build_clip_tokenizer
from tests.support.checkpoints import write_checkpoint

CONFIG = BackendConfig()


def _configure_cpu():
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))


@pytest.fixture(autouse=True)
def _cpu_engine():
    _configure_cpu()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(engine, reference) of each family, loaded once; tests must leave them unchanged."""
    _configure_cpu()
    folder, cache = tmp_path_factory.mktemp("models"), {}

    def get(family):
        if family not in cache:
            reference = write_checkpoint(folder / f"{family}.safetensors", family)
            cache[family] = load_checkpoint(reference.path, config=CONFIG), reference
        return cache[family]

    return get


class _Prompts(UserList):
    """A list of prompts with the size of its picture."""

    width = height = 0
    is_negative_prompt = False


def _prompts(texts, *, width=0, height=0, is_negative_prompt=False):
    prompts = _Prompts(texts)
    prompts.width, prompts.height, prompts.is_negative_prompt = width, height, is_negative_prompt
    return prompts


def _tokens(texts, pad_token_id):
    tokenizer = build_clip_tokenizer(pad_token_id=pad_token_id)
    return tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids


@torch.no_grad()
@pytest.mark.parametrize(("family", "pad_token_id"), [("sd15", 49407), ("sd20", 0)])
def test_conditions_equal_the_text_encoders_output(loaded, family, pad_token_id):
    engine, reference = loaded(family)
    texts = ["a red cat", ""]
    cond = engine.get_learned_conditioning(texts)
    expected = reference.text_encoders[0](_tokens(texts, pad_token_id)).last_hidden_state
    torch.testing.assert_close(cond, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_clip_skip_reads_an_earlier_layer(loaded):
    engine, reference = loaded("sd15")
    encoder = reference.text_encoders[0]
    hidden = encoder(_tokens(["a red cat"], 49407), output_hidden_states=True).hidden_states
    engine.set_clip_skip(2)
    cond = engine.get_learned_conditioning(["a red cat"])
    engine.set_clip_skip(1)
    torch.testing.assert_close(cond, encoder.final_layer_norm(hidden[-2]), rtol=0, atol=1e-5)
    assert not torch.allclose(cond, engine.get_learned_conditioning(["a red cat"]))


@torch.no_grad()
def test_sdxl_conditions_equal_the_pipelines(loaded):
    engine, reference = loaded("sdxl")
    pipeline = StableDiffusionXLPipeline(
        vae=reference.vae,
        unet=reference.unet,
        text_encoder=reference.text_encoders[0],
        text_encoder_2=reference.text_encoders[1],
        tokenizer=build_clip_tokenizer(),
        tokenizer_2=build_clip_tokenizer(pad_token_id=0),
        scheduler=EulerDiscreteScheduler(**reference.scheduler_config()),
        add_watermarker=False,
    )
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt("a red cat", do_classifier_free_guidance=False, device="cpu")
    time_ids = pipeline._get_add_time_ids((768, 512), (0, 0), (768, 512), torch.float32, text_encoder_projection_dim=pooled.shape[-1])
    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(time_ids.flatten()).reshape(1, -1)
    cond = engine.get_learned_conditioning(_prompts(["a red cat"], width=512, height=768))
    torch.testing.assert_close(cond["crossattn"], prompt_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(cond["vector"], torch.cat([pooled, features], dim=1), rtol=0, atol=1e-5)


def test_sdxl_measures_are_the_callers_to_set(loaded):
    engine, _ = loaded("sdxl")
    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    engine.sdxl_crop_top, engine.sdxl_crop_left = 8, 16
    try:
        vector = engine.get_learned_conditioning(["a"])["vector"]
    finally:
        engine.sdxl_crop_top = engine.sdxl_crop_left = 0
    expected = features(torch.tensor([1024.0, 1024.0, 8.0, 16.0, 1024.0, 1024.0])).flatten()
    torch.testing.assert_close(vector[0, -1536:], expected, rtol=0, atol=1e-6)


def test_sdxl_empty_negative_is_zeros_and_keeps_the_measures(loaded):
    engine, _ = loaded("sdxl")
    empty = engine.get_learned_conditioning(_prompts(["", ""], width=512, height=512, is_negative_prompt=True))
    plain = engine.get_learned_conditioning(_prompts(["", ""], width=512, height=512))
    assert not empty["crossattn"].any() and not empty["vector"][:, :-1536].any()
    assert torch.equal(empty["vector"][:, -1536:], plain["vector"][:, -1536:])
    assert plain["crossattn"].any() and plain["vector"][:, :-1536].any()
    mixed = engine.get_learned_conditioning(_prompts(["", "blurry"], is_negative_prompt=True))
    assert mixed["crossattn"].any()


def test_long_prompts_make_more_chunks(loaded):
    engine, _ = loaded("sd15")
    long = ", ".join(["cat"] * 60)
    assert engine.get_prompt_lengths_on_ui("a red cat") == (3, 75)
    assert engine.get_prompt_lengths_on_ui(long) == (119, 150)
    assert engine.get_learned_conditioning([long, "a"]).shape == (2, 154, 64)


def test_emphasis_reaches_every_encoder(loaded):
    engine, _ = loaded("sdxl")
    plain = engine.get_learned_conditioning(["a (cat:1.4)"])["crossattn"]
    engine.set_emphasis("None")
    try:
        literal = engine.get_learned_conditioning(["a (cat:1.4)"])["crossattn"]
    finally:
        engine.set_emphasis("Original")
    assert not torch.allclose(plain[..., :64], literal[..., :64]) and not torch.allclose(plain[..., 64:], literal[..., 64:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_first_stage_scales_as_the_family_does(loaded, family):
    engine, reference = loaded(family)
    pixels, latents = torch.rand(2, 3, 32, 40) * 2 - 1, torch.randn(2, 4, 4, 5)
    encoded = engine.encode_first_stage(pixels)
    expected = reference.vae.encode(pixels).latent_dist.mean * reference.vae.config.scaling_factor
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-5)
    assert engine.get_first_stage_encoding(encoded) is encoded
    decoded = engine.decode_first_stage(latents)
    torch.testing.assert_close(decoded, reference.vae.decode(latents / reference.vae.config.scaling_factor).sample.clamp(-1, 1), rtol=0, atol=1e-5)
    assert decoded.dtype == torch.float32 and decoded.shape == (2, 3, 32, 40)


def test_denoised_latents_equal_those_of_the_reference_network(loaded):
    """From a prompt to x0 at one noise level, against the formula x0 = x - sigma * eps with the library's UNet."""
    for family in ("sd15", "sdxl"):
        engine, reference = loaded(family)
        cond = engine.get_learned_conditioning(_prompts(["a red cat"], width=64, height=64))
        x, sigma = torch.randn(1, 4, 8, 8) * 7, torch.tensor([7.0])
        model = engine.forge_objects.unet.model
        context, vector = (cond["crossattn"], cond["vector"]) if family == "sdxl" else (cond, None)
        x0 = model.apply_model(x, sigma, c_crossattn=context, y=vector)
        extra = {}
        if vector is not None:
            extra["added_cond_kwargs"] = {"text_embeds": vector[:, :64], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        with torch.no_grad():
            eps = reference.unet(x / (sigma**2 + 1) ** 0.5, model.predictor.timestep(sigma), context, **extra).sample
        torch.testing.assert_close(x0, x - sigma * eps, rtol=0, atol=1e-4)


def test_objects_are_kept_three_times_and_copied_shallowly(loaded):
    engine, _ = loaded("sd15")
    copy = engine.forge_objects.shallow_copy()
    copy.unet = copy.unet.clone()
    assert copy.unet is not engine.forge_objects.unet and copy.unet.model is engine.forge_objects.unet.model
    assert copy.vae is engine.forge_objects_original.vae is engine.forge_objects_after_applying_lora.vae
    clone = engine.forge_objects.clip.clone()
    assert clone.cond_stage_model is engine.cond_stage_model and clone.patcher is not engine.forge_objects.clip.patcher
    assert engine.first_stage_model is engine.forge_objects.vae.first_stage_model
    assert engine.is_webui_legacy_model() and not engine.use_distilled_cfg_scale


def test_tokenizers_are_reachable_by_slot_name(loaded):
    clip = loaded("sdxl")[0].forge_objects.clip
    assert list(clip.tokenizer) == ["clip_l", "clip_g"]
    assert (clip.tokenizer.clip_l.pad_token_id, clip.tokenizer["clip_g"].pad_token_id) == (49407, 0)
    with pytest.raises(AttributeError, match="no 't5xxl' here, only clip_l, clip_g"):
        _ = clip.tokenizer.t5xxl


def test_embeddings_are_found_in_the_folders_given(tmp_path):
    from safetensors.torch import save_file

    reference = write_checkpoint(tmp_path / "m.safetensors", "sd15")
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "mystyle.safetensors")
    engine = load_checkpoint(reference.path, config=CONFIG, embedding_dirs=[tmp_path])
    assert "mystyle" in engine.embeddings.word_embeddings
    assert engine.get_prompt_lengths_on_ui("mystyle") == (2, 75)


def test_saving_the_unet_alone_gives_a_file_that_loads_with_parts(tmp_path, loaded):
    engine, reference = loaded("sd15")
    engine.save_unet(tmp_path / "unet.safetensors")
    again = load_checkpoint(tmp_path / "unet.safetensors", config=CONFIG, additional_modules=[reference.path])
    cond = again.get_learned_conditioning(["cat"])
    torch.testing.assert_close(cond, engine.get_learned_conditioning(["cat"]))
    for key, tensor in reference.unet.state_dict().items():
        assert torch.equal(again.forge_objects.unet.model.diffusion_model.state_dict()[key], tensor)
