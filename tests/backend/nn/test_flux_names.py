"""Forge's names of Flux's network mean the modules that run. Reference: diffusers' own forward."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.flux import FAMILY
from backend.families.flux.key_map import flux_key_map
from backend.families.flux.program import build_flux_program
from backend.modules.k_model import KModel
from backend.modules.k_prediction import FlowPrediction
from backend.nn import flux as names
from backend.parallel.running.session import SamplingRequest, begin_session, end_session
from backend.patcher.unet import UnetPatcher
from tests.support.fleets import virtual_fleet
from tests.support.flux_networks import CONFIG, make_flux


def make_network(**changes: object) -> names.IntegratedFluxTransformer2DModel:
    config = {**CONFIG, **changes}
    network = FAMILY.build_denoiser(FoundDenoiser(part=Part("", Layout.DIFFUSERS), config=config))
    assert isinstance(network, names.IntegratedFluxTransformer2DModel)
    network.load_state_dict(make_flux(**changes).state_dict(), assign=True)
    return network


def test_parts_have_their_original_names() -> None:
    network = make_network()
    assert network.double_blocks is network.transformer_blocks and isinstance(network.double_blocks[0], names.DoubleStreamBlock)
    assert network.single_blocks is network.single_transformer_blocks and isinstance(network.single_blocks[0], names.SingleStreamBlock)
    assert network.img_in is network.x_embedder and network.txt_in is network.context_embedder and isinstance(network.pe_embedder, names.EmbedND)
    assert network.time_in.linear_1.in_features == network.guidance_in.linear_1.in_features == 256
    assert network.vector_in.linear_1.in_features == CONFIG["pooled_projection_dim"]
    assert isinstance(make_network(guidance_embeds=False).guidance_in, torch.nn.Identity)
    assert set(network.state_dict()) == set(make_flux().state_dict()), "names add no weights"
    with pytest.raises(AttributeError, match="program"):
        _ = names.MLPEmbedder


def test_inner_forward_is_the_network() -> None:
    network, reference = make_network(), make_flux()
    image, text, pooled, times = torch.randn(2, 6, 64), torch.randn(2, 3, 32), torch.randn(2, 64), torch.tensor([0.5, 0.25])
    image_ids, text_ids, guidance = torch.randint(0, 9, (6, 3)), torch.zeros(3, 3), torch.tensor([3.5, 2.0])
    (wanted,) = reference(image, text, pooled, times, image_ids, text_ids, guidance, return_dict=False)
    made = network.inner_forward(image, image_ids[None].expand(2, -1, -1), text, text_ids, times, pooled, guidance)
    assert torch.equal(made, wanted)


def cached_forward(
    self: Any, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor, guidance: Any = None
) -> Tensor:
    """What a caching extension puts in the place of `inner_forward`: Forge's order of calls, by Forge's names."""
    img, vec = self.img_in(img), self.time_in(names.timestep_embedding(timesteps, 256).to(img.dtype))
    if guidance is not None:
        vec = vec + self.guidance_in(names.timestep_embedding(guidance, 256).to(img.dtype))
    vec = vec + self.vector_in(y)
    txt = self.txt_in(txt)
    pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
    for block in self.double_blocks:
        img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
    img = torch.cat((txt, img), 1)
    for block in self.single_blocks:
        img = block(img, vec=vec, pe=pe)
    return self.final_layer(img[:, txt.shape[1] :, ...], vec)  # type: ignore[no-any-return]


def make_model() -> KModel:
    network = make_network()
    return KModel(network, FlowPrediction(multiplier=1.0), build_program=build_flux_program, key_map=flux_key_map(network))


def make_inputs(device: torch.device | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "x": torch.randn(2, 16, 6, 8, generator=generator), "t": torch.tensor([0.75, 0.5]), "y": torch.randn(2, 64, generator=generator),
        "c_crossattn": torch.randn(2, 9, 32, generator=generator), "guidance": torch.tensor([3.5, 2.0]),
    }  # fmt: skip
    return {name: tensor.to(device) if device is not None else tensor for name, tensor in inputs.items()}


def test_a_replaced_inner_forward_runs_the_network_with_forge_s_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the class, as caches do, and on one network. It gets what Forge gives it, and without it the segments run again."""
    model, inputs = make_model(), make_inputs()
    wanted, calls = model.apply_model(**inputs), []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append([tuple(tensor.shape) for tensor in args[1:] if isinstance(tensor, Tensor)])
        return cached_forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(names.IntegratedFluxTransformer2DModel, "inner_forward", counted)
        torch.testing.assert_close(model.apply_model(**inputs), wanted)
    assert calls == [[(2, 12, 64), (2, 12, 3), (2, 9, 32), (2, 9, 3), (2,), (2, 64), (2,)]]
    assert torch.equal(model.apply_model(**inputs), wanted) and len(calls) == 1
    model.diffusion_model.inner_forward = partial(counted, model.diffusion_model)
    torch.testing.assert_close(model.apply_model(**inputs), wanted)
    assert len(calls) == 2


def test_a_replaced_inner_forward_stays_on_one_slot(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with virtual_fleet(2) as fleet:
        unet = UnetPatcher(make_model(), fleet.primary.torch_device, torch.device("cpu"))
        monkeypatch.setattr(names.IntegratedFluxTransformer2DModel, "inner_forward", cached_forward)
        session = begin_session(unet, (2, 16, 6, 8), SamplingRequest(images=2, branches=1, strategy="layers"))
        assert session is not None and session.plan.used_slots == (0,)
        result = unet.model.apply_model(**make_inputs(unet.load_device)).cpu()
        end_session(unet)
    monkeypatch.undo()
    torch.testing.assert_close(result, make_model().apply_model(**make_inputs()))
    assert "an extension's forward takes the whole network, so the UNet stays on vgpu:0" in caplog.text


def test_a_wrapped_block_is_called_as_forge_calls_it() -> None:
    model, inputs = make_model(), make_inputs()
    wanted, seen = model.apply_model(**inputs), []
    for block in (model.diffusion_model.double_blocks[1], model.diffusion_model.single_blocks[0]):

        def wrapped(*args: Any, own: Any = block.forward, **kwargs: Any) -> Any:
            seen.append((len(args), sorted(kwargs)))
            return own(*args, **kwargs)

        block.forward = wrapped
    assert torch.equal(model.apply_model(**inputs), wanted)
    assert seen == [(0, ["img", "pe", "txt", "vec"]), (1, ["pe", "vec"])]


def test_a_block_that_is_replaced_sees_comfyui_s_arguments() -> None:
    model, inputs = make_model(), make_inputs()
    wanted, seen = model.apply_model(**inputs), []

    def hook(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Tensor]:
        seen.append((sorted(args), args["transformer_options"]["block"]))
        return extra["original_block"](args)  # type: ignore[no-any-return]

    options = {"patches_replace": {"dit": {("double_block", 1): hook, ("single_block", 2): hook}}}
    assert torch.equal(model.apply_model(**inputs, transformer_options=options), wanted)
    common = ["attn_mask", "img", "pe", "transformer_options", "vec"]
    assert seen == [(sorted([*common, "txt"]), ("double_block", 1)), (common, ("single_block", 2))]


def test_copies_and_saved_configurations_keep_names() -> None:
    network = make_network()
    again = names.IntegratedFluxTransformer2DModel.from_config(network.config)
    assert dict(again.config).items() >= {key: network.config[key] for key in CONFIG}.items()
    assert isinstance(again.double_blocks[0], names.DoubleStreamBlock) and isinstance(again.single_blocks[0], names.SingleStreamBlock)


def test_functions_are_the_library_s_formulas() -> None:
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    positions = torch.arange(5.0)
    cosines, sines = get_1d_rotary_pos_embed(8, positions, theta=1e4, repeat_interleave_real=True, use_real=True, freqs_dtype=torch.float64)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    wanted = [apply_rotary_emb(one, (cosines, sines)) for one in (query, key)]
    rotations = names.rope(positions, 8, 1e4)
    for made, expected in zip(names.apply_rope(query, key, rotations), wanted):
        torch.testing.assert_close(made, expected)
    mixed = torch.nn.functional.scaled_dot_product_attention(*wanted, value)
    torch.testing.assert_close(names.attention(query, key, value, rotations), mixed.transpose(1, 2).flatten(2))
    times = torch.tensor([0.5, 0.25])
    made = names.timestep_embedding(times, 16)
    frequencies = torch.exp(-torch.arange(8) / 8 * torch.tensor(1e4).log())
    torch.testing.assert_close(made[0], torch.cat([(500 * frequencies).cos(), (500 * frequencies).sin()]), rtol=1e-4, atol=1e-4)
