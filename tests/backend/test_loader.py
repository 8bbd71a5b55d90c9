"""Loading checkpoints. Reference: the networks of diffusers and transformers that the file was written from, by weights and outputs."""

from __future__ import annotations

import copy
import hashlib
import logging
from functools import lru_cache
from itertools import count

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from backend import key_layout, loader, memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.families.registry import find_family
from backend.loader import CheckpointError, load_checkpoint
from tests.support.checkpoints import DISTILLED, FAMILIES, ReferenceModels, write_checkpoint
from tools.demo_model import networks as demo

CONFIG = BackendConfig()


@pytest.fixture(autouse=True)
def _cpu_engine():
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes each kind of checkpoint, common ones only once: `checkpoint("sd15", layout="ldm")`. Do not change the result."""
    folder, numbers = tmp_path_factory.mktemp("checkpoints"), count()

    @lru_cache(maxsize=4)  # networks stay in memory as long as they are in this dict
    def write(family, suffix=".safetensors", **kwargs):
        return write_checkpoint(folder / f"{next(numbers)}{suffix}", family, **kwargs)

    return write


def _networks(engine):
    unet = engine.forge_objects.unet.model.diffusion_model
    return unet, engine.forge_objects.vae.first_stage_model, list(engine.forge_objects.clip.cond_stage_model.values())


def _assert_same_weights(loaded: torch.nn.Module, reference: torch.nn.Module) -> None:
    mine, theirs = loaded.state_dict(), reference.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key].float(), tensor), key


def _another_unet(reference: ReferenceModels, **changes) -> UNet2DConditionModel:
    config = {key: value for key, value in reference.unet.config.items() if not key.startswith("_")}
    return UNet2DConditionModel(**(config | changes))


def _unet_inputs(reference: ReferenceModels) -> tuple[tuple, dict]:
    unet = reference.unet
    extra = {}
    if unet.config.addition_embed_type:
        extra["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 64), "time_ids": torch.full((2, 6), 512.0)}
    return (torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([17, 801]), torch.randn(2, 77, unet.config.cross_attention_dim)), extra


@torch.no_grad()
def _assert_same_outputs(engine, reference: ReferenceModels) -> None:
    unet, vae, texts = _networks(engine)
    args, extra = _unet_inputs(reference)
    torch.testing.assert_close(unet(*args, **extra).sample, reference.unet(*args, **extra).sample, rtol=0, atol=1e-5)  # another attention kernel
    latents, pixels = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 48) * 2 - 1
    assert torch.equal(vae.decode(latents).sample, reference.vae.decode(latents).sample)
    assert torch.equal(vae.encode(pixels).latent_dist.mean, reference.vae.encode(pixels).latent_dist.mean)
    tokens = torch.tensor([[49406, 320, 2368, 49407] + [49407] * 73])
    for mine, theirs in zip(texts, reference.text_encoders, strict=True):
        assert torch.equal(mine(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_networks_equal_those_the_file_was_written_from(checkpoint, family, layout):
    reference = checkpoint(family, layout=layout)
    engine = load_checkpoint(reference.path, config=CONFIG)
    unet, vae, texts = _networks(engine)
    for mine, theirs in zip((unet, vae, *texts), (reference.unet, reference.vae, *reference.text_encoders), strict=True):
        _assert_same_weights(mine, theirs)
    _assert_same_outputs(engine, reference)
    assert engine.family == {"sd21_v": "sd20"}.get(family, family)
    assert (engine.is_sd1, engine.is_sd2, engine.is_sdxl) == (family == "sd15", family.startswith("sd2"), family == "sdxl")
    assert engine.forge_objects.unet.model.predictor.prediction_type == reference.prediction
    assert engine.native_size_px == {"sd15": 512, "sd20": 512, "sd21_v": 768, "sdxl": 1024}[family]


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("family", DISTILLED)
def test_distilled_members_without_a_middle_load(checkpoint, family, layout):
    reference = checkpoint(family, layout=layout)
    engine = load_checkpoint(reference.path, config=CONFIG)
    assert engine.is_sd1 and engine.forge_objects.unet.model.diffusion_model.config.mid_block_type is None
    _assert_same_weights(_networks(engine)[0], reference.unet)
    _assert_same_outputs(engine, reference)


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
def test_inpainting_members_have_nine_input_channels(checkpoint, family):
    reference = checkpoint(family, inpaint=True)
    engine = load_checkpoint(reference.path, config=CONFIG)
    assert engine.is_inpaint
    assert engine.forge_objects.unet.model.predictor.prediction_type == "epsilon"
    _assert_same_outputs(engine, reference)


def test_fp16_file_computes_in_fp32_on_the_cpu_with_the_files_numbers(checkpoint):
    reference = checkpoint("sd15", dtype=torch.float16)
    engine = load_checkpoint(reference.path, config=CONFIG)
    for network, theirs in zip(_networks(engine)[:2], (reference.unet, reference.vae), strict=True):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        _assert_same_weights(network, theirs)


def test_pickled_checkpoint_loads(checkpoint):
    reference = checkpoint("sd15", ".ckpt")
    _assert_same_outputs(load_checkpoint(reference.path, config=CONFIG), reference)


def test_demo_shape_loads(tmp_path):
    """Two levels, one resnet per level, also in the VAE; its training size comes from the metadata."""
    networks = demo.build_unet(), demo.build_vae(), demo.build_text_encoder()
    path = tmp_path / "demo.safetensors"
    save_file(find_family("sd15").join_checkpoint(*networks[:2], networks[2:]), path, metadata={"modelspec.resolution": "64x64"})
    engine = load_checkpoint(path, config=CONFIG)
    unet, vae, texts = _networks(engine)
    for mine, theirs in zip((unet, vae, *texts), networks, strict=True):
        _assert_same_weights(mine, theirs)
    assert unet.config.attention_head_dim == 8
    assert engine.native_size_px == 64
    assert texts[0].config.num_attention_heads == 2


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_layer_by_layer_depths_are_derived(checkpoint, layout, tmp_path):
    """A distilled SDXL: the depth differs between layers of a level, and between down and up."""
    reference = checkpoint("sdxl", layout=layout)
    torch.manual_seed(3)
    unet = _another_unet(reference, transformer_layers_per_block=[1, [2, 1], [3, 2]], reverse_transformer_layers_per_block=[[3, 1, 1], [2, 1, 1], 1])
    prefix = key_layout.UNET_PREFIX if layout == "ldm" else "unet."
    state_dict = {key: tensor for key, tensor in load_file(reference.path).items() if not key.startswith(prefix)}
    parts = key_layout.unet_to_ldm(unet.state_dict(), unet.config) if layout == "ldm" else unet.state_dict()
    save_file(state_dict | {prefix + key: tensor for key, tensor in parts.items()}, tmp_path / "distilled.safetensors")
    engine = load_checkpoint(tmp_path / "distilled.safetensors", config=CONFIG)
    _assert_same_weights(_networks(engine)[0], unet)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_distilled_sdxl_with_a_lone_resnet_in_the_middle(checkpoint, layout, tmp_path):
    """SSD-1B's shape; its program returns the same as the library's forward."""
    reference = checkpoint("sdxl", layout=layout)
    unet = _another_unet(
        reference,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[1, [2, 2], [4, 4]],
        reverse_transformer_layers_per_block=[[4, 4, 5], [2, 1, 1], 1],
    )
    prefix = key_layout.UNET_PREFIX if layout == "ldm" else "unet."
    state_dict = {key: tensor for key, tensor in load_file(reference.path).items() if not key.startswith(prefix)}
    parts = key_layout.unet_to_ldm(unet.state_dict(), unet.config) if layout == "ldm" else unet.state_dict()
    save_file(state_dict | {prefix + key: tensor for key, tensor in parts.items()}, tmp_path / "ssd.safetensors")
    engine = load_checkpoint(tmp_path / "ssd.safetensors", config=CONFIG)
    _assert_same_weights(_networks(engine)[0], unet)
    cond, x, sigma = engine.get_learned_conditioning(["a cat"]), torch.randn(1, 4, 8, 8), torch.tensor([1.0])
    model = engine.forge_objects.unet.model
    extra = {"text_embeds": cond["vector"][:, :64], "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}
    with torch.no_grad():
        eps = unet.eval()(x / 2**0.5, model.predictor.timestep(sigma), cond["crossattn"], added_cond_kwargs=extra).sample
    torch.testing.assert_close(model.apply_model(x, sigma, c_crossattn=cond["crossattn"], y=cond["vector"]), x - eps, rtol=0, atol=1e-4)


def test_refiner_loads_with_bigg_alone(checkpoint, tmp_path):
    base = checkpoint("sdxl")
    bigg = base.text_encoders[1]
    unet = _another_unet(
        base,
        block_out_channels=[32, 64, 64, 64],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=4,
        attention_head_dim=[1, 1, 1, 1],
        cross_attention_dim=bigg.config.hidden_size,
        projection_class_embeddings_input_dim=5 * 256 + bigg.config.projection_dim,
    )
    save_file(find_family("sdxl_refiner").join_checkpoint(unet, base.vae, [bigg]), tmp_path / "refiner.safetensors")
    engine = load_checkpoint(tmp_path / "refiner.safetensors", config=CONFIG)
    assert engine.family == "sdxl_refiner"
    _assert_same_weights(_networks(engine)[0], unet)
    assert engine.get_learned_conditioning(["a"])["vector"].shape == (1, 5 * 256 + bigg.config.projection_dim)


# --- parts from other files ---------------------------------------------------------------------------------------------------------


def _without(path, target, *prefixes):
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.startswith(prefixes)}, target)
    return target


@pytest.mark.parametrize("layout", ["bare ldm", "bare diffusers", "prefixed", "pt"])
def test_vae_from_another_file_replaces_the_files_own(checkpoint, layout, tmp_path):
    reference = checkpoint("sd15")
    other = checkpoint("sd15", seed=5)
    ldm = key_layout.vae_to_ldm(other.vae.state_dict(), other.vae.config)
    path = tmp_path / ("vae.pt" if layout == "pt" else "vae.safetensors")
    if layout == "pt":
        torch.save({"state_dict": {**ldm, "loss.logvar": torch.zeros(())}}, path)
    else:
        tensors = {"bare ldm": ldm, "bare diffusers": other.vae.state_dict(), "prefixed": {f"first_stage_model.{k}": t for k, t in ldm.items()}}[
            layout
        ]
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    engine = load_checkpoint(reference.path, config=CONFIG, additional_modules=[path])
    _assert_same_weights(engine.forge_objects.vae.first_stage_model, other.vae)
    _assert_same_weights(_networks(engine)[0], reference.unet)


def test_old_attention_names_of_diffusers_vae_files_are_read(checkpoint, tmp_path):
    reference = checkpoint("sd15")
    old = {}
    for key, tensor in reference.vae.state_dict().items():
        for new, name in key_layout.OLD_VAE_ATTENTION_CHILDREN.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = tensor[:, :, None, None].contiguous() if "attentions.0." in key and tensor.ndim == 2 else tensor  # and 1x1 convolutions at that
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    save_file(old, tmp_path / "old_vae.safetensors")
    bare = _without(reference.path, tmp_path / "bare.safetensors", "first_stage_model.")
    engine = load_checkpoint(bare, config=CONFIG, additional_modules=[tmp_path / "old_vae.safetensors"])
    _assert_same_weights(engine.forge_objects.vae.first_stage_model, reference.vae)


@pytest.mark.parametrize("family", ["sd15", "sd20", "sdxl"])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_bare_unet_with_parts_from_other_files(checkpoint, family, layout, tmp_path):
    reference = checkpoint(family)
    unet = reference.unet.state_dict()
    save_file(unet if layout == "diffusers" else key_layout.unet_to_ldm(unet, reference.unet.config), tmp_path / "unet.safetensors")
    save_file(reference.vae.state_dict(), tmp_path / "vae.safetensors")
    extras = [tmp_path / "vae.safetensors"]
    for index, encoder in enumerate(reference.text_encoders):
        path = tmp_path / f"te{index}.safetensors"
        tensors = key_layout.clip_to_text_model(encoder.state_dict()) if layout == "ldm" else encoder.state_dict()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        extras.append(path)
    _assert_same_outputs(load_checkpoint(tmp_path / "unet.safetensors", config=CONFIG, additional_modules=extras), reference)


def test_text_encoder_without_its_text_model_level_is_read(checkpoint, tmp_path):
    """Some SD1 files from 2023 were saved with a newer transformers and lack that level."""
    reference = checkpoint("sd15")
    renamed = {key.replace(".transformer.text_model.", ".transformer."): tensor for key, tensor in load_file(reference.path).items()}
    save_file(renamed, tmp_path / "flat.safetensors")
    _assert_same_outputs(load_checkpoint(tmp_path / "flat.safetensors", config=CONFIG), reference)


def test_sd2_text_encoder_of_23_blocks_is_used_completely(checkpoint, tmp_path):
    """Files converted back from diffusers contain only the 23 used blocks; others contain 24, and the last is ignored."""
    reference = checkpoint("sd20")
    config = copy.deepcopy(reference.text_encoders[0].config)
    config.num_hidden_layers = 23
    encoder = CLIPTextModel(config)
    fused = key_layout.clip_to_open_clip(encoder.state_dict())
    state_dict = {key: tensor for key, tensor in load_file(reference.path).items() if not key.startswith(key_layout.OPEN_CLIP_PREFIX)}
    prefix = key_layout.OPEN_CLIP_PREFIX
    save_file(state_dict | {prefix + key: t.contiguous() for key, t in fused.items()}, tmp_path / "m23.safetensors")
    save_file(state_dict | {prefix + key: t.contiguous() for key, t in key_layout.append_unused_block(fused).items()}, tmp_path / "m24.safetensors")
    for name in ("m23", "m24"):
        _assert_same_weights(_networks(load_checkpoint(tmp_path / f"{name}.safetensors", config=CONFIG))[2][0], encoder)


def test_real_files_carry_extra_tensors_that_do_no_harm(checkpoint, tmp_path):
    reference = checkpoint("sd15")
    extra = {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        "model_ema.num_updates": torch.ones((), dtype=torch.int64),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.ones(()),
    }
    save_file(load_file(reference.path) | extra, tmp_path / "extra.safetensors")
    _assert_same_outputs(load_checkpoint(tmp_path / "extra.safetensors", config=CONFIG), reference)


# --- types and memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "wanted", "stored"),
    [
        ({"unet_dtype": "fp16"}, None, torch.float16),
        ({"unet_dtype": "fp8_e4m3fn"}, None, torch.float8_e4m3fn),
        ({}, torch.bfloat16, torch.bfloat16),
        ({"unet_dtype": "fp16"}, torch.float32, torch.float32),
    ],
)
def test_unet_storage_type_follows_argument_then_flag(checkpoint, flags, wanted, stored):
    reference = checkpoint("sd15")
    engine = load_checkpoint(reference.path, config=BackendConfig(**flags), unet_storage_dtype=wanted)
    model = engine.forge_objects.unet.model
    assert model.storage_dtype == stored and model.computation_dtype == torch.float32
    unet = model.diffusion_model
    assert unet.conv_in.weight.dtype == stored
    assert unet.down_blocks[0].resnets[0].norm1.weight.dtype == torch.float32
    output = model.apply_model(torch.randn(1, 4, 8, 8), torch.tensor([2.0]), c_crossattn=torch.randn(1, 77, 64))
    assert output.isfinite().all() and unet.conv_in.weight.dtype == stored


@pytest.mark.parametrize(("flag", "stored"), [("fp16", torch.float16), ("fp8_e4m3fn", torch.float8_e4m3fn)])
def test_text_encoder_stored_small_computes_in_fp32_on_the_cpu(checkpoint, flag, stored):
    reference = checkpoint("sd15")
    full = load_checkpoint(reference.path, config=CONFIG).get_learned_conditioning(["a red cat"])
    engine = load_checkpoint(reference.path, config=BackendConfig(clip_dtype=flag))
    encoder = engine.forge_objects.clip.cond_stage_model["clip_l"]
    assert encoder.encoder.layers[0].mlp.fc1.weight.dtype == stored
    small = engine.get_learned_conditioning(["a red cat"])
    assert small.dtype == torch.float32
    assert 0 < (small - full).abs().mean() < (0.01 if flag == "fp16" else 0.5)


def test_nothing_stays_without_memory_and_position_numbers_are_real(checkpoint):
    engine = load_checkpoint(checkpoint("sdxl").path, config=CONFIG)
    unet, vae, texts = _networks(engine)
    for network in (unet, vae, *texts):
        assert not network.training
        for tensor in [*network.parameters(), *network.buffers()]:
            assert not tensor.is_meta and not tensor.requires_grad
    for text in texts:
        module = getattr(text, "text_model", text)
        assert module.embeddings.position_ids.tolist() == [list(range(77))]


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    """The file may be replaced or deleted while its model is in use, and loading does not change it."""
    reference = write_checkpoint(tmp_path / "m.safetensors", "sd15")
    before = hashlib.sha256(reference.path.read_bytes()).digest()
    engine = load_checkpoint(reference.path, config=CONFIG)
    assert hashlib.sha256(reference.path.read_bytes()).digest() == before
    reference.path.write_bytes(b"\0" * reference.path.stat().st_size)
    _assert_same_weights(_networks(engine)[0], reference.unet)


def test_saved_checkpoint_loads_as_the_same_model(tmp_path):
    for family in ("sd15", "sd20", "sdxl"):
        reference = write_checkpoint(tmp_path / f"{family}.safetensors", family, metadata={"modelspec.resolution": "640x640"})
        saved = load_checkpoint(reference.path, config=CONFIG).save_checkpoint(tmp_path / "out" / f"{family}.safetensors")
        engine = load_checkpoint(tmp_path / "out" / f"{family}.safetensors", config=CONFIG)
        assert saved == str(tmp_path / "out" / f"{family}.safetensors") and engine.native_size_px == 640
        _assert_same_outputs(engine, reference)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["sd15.safetensors", "sd20.safetensors", "sdxl.safetensors"]


def test_loading_logs_one_line(tmp_path, caplog):
    reference = write_checkpoint(tmp_path / "m.safetensors", "sdxl", prediction="v_prediction")
    with caplog.at_level(logging.INFO, logger=loader.__name__):
        load_checkpoint(reference.path, config=CONFIG)
    assert [record.message for record in caplog.records] == [
        "Loaded m.safetensors: SDXL, predicts v (the key v_pred), UNet stored in float32 and computed in float32, VAE in float32."
    ]


@pytest.mark.parametrize(("vram_mode", "read_to"), [("auto", "vgpu"), ("low", "cpu")])
def test_model_on_a_virtual_gpu_equals_the_one_on_the_cpu(checkpoint, vram_mode, read_to):
    """With enough memory the UNet is read directly to the device; with little, to the host, and moved when used."""
    reference = checkpoint("sd15")
    prompts = ["a red cat"]
    x, sigma = torch.randn(1, 4, 8, 8) * 5, torch.tensor([5.0])
    engine = load_checkpoint(reference.path, config=CONFIG)
    cond = engine.get_learned_conditioning(prompts)
    expected = engine.forge_objects.unet.model.apply_model(x, sigma, c_crossattn=cond)
    config = BackendConfig(virtual_gpus_bytes=(2**30,), vram_mode=vram_mode)
    memory_management.configure(config, probe_devices(config))
    engine = load_checkpoint(reference.path, config=config)
    unet = engine.forge_objects.unet
    device = memory_management.get_torch_device()
    assert device.type == "vgpu"
    assert unet.current_device.type == unet.model.diffusion_model.conv_in.weight.device.type == read_to
    on_device = engine.get_learned_conditioning(prompts)
    assert torch.equal(on_device.cpu(), cond)
    memory_management.load_models_gpu([unet])
    assert unet.model.diffusion_model.conv_in.weight.device == device
    result = unet.model.apply_model(x.to(device), sigma.to(device), c_crossattn=on_device.to(device))
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize(("second_mib", "expected"), [(1024, "vgpu:1"), (4, "vgpu:0")])
def test_parts_go_to_a_second_slot_only_where_they_fit(checkpoint, second_mib, expected):
    config = BackendConfig(virtual_gpus_bytes=(2**30, second_mib * 2**20), multi_gpu=True)
    memory_management.configure(config, probe_devices(config))
    objects = load_checkpoint(checkpoint("sd15").path, config=config).forge_objects
    assert str(objects.vae.device) == str(objects.vae.patcher.load_device) == expected
    assert str(objects.clip.patcher.load_device) == expected


def test_a_failed_load_leaves_the_model_in_use_alone(checkpoint, tmp_path):
    reference = checkpoint("sd15")
    engine = load_checkpoint(reference.path, config=CONFIG)
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "bad.safetensors", config=CONFIG)
    _assert_same_outputs(engine, reference)


def test_vae_of_another_kind_is_refused_before_weights_are_read(checkpoint, tmp_path):
    reference = checkpoint("sd15")
    flux_like = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=16
    )
    save_file(flux_like.state_dict(), tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=r"ae\.safetensors: is a VAE with 16 latent channels; SD 1\.x needs one with 4"):
        load_checkpoint(reference.path, config=CONFIG, additional_modules=[tmp_path / "ae.safetensors"])
