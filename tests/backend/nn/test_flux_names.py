"""Forge's names of Flux's network mean the modules that run. Reference: diffusers' own forward."""

from __future__ import annotations

import pytest
import torch

from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.flux import FAMILY
from backend.nn import flux as names
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
    assert network.img_in is network.x_embedder and network.txt_in is network.context_embedder and network.pe_embedder is network.pos_embed
    assert network.time_in.linear_1.in_features == network.guidance_in.linear_1.in_features == 256
    assert network.vector_in.linear_1.in_features == CONFIG["pooled_projection_dim"]
    assert isinstance(make_network(guidance_embeds=False).guidance_in, torch.nn.Identity)
    assert set(network.state_dict()) == set(make_flux().state_dict()), "names add no weights"
    with pytest.raises(AttributeError, match="program"):
        _ = names.EmbedND


def test_inner_forward_is_the_network() -> None:
    network, reference = make_network(), make_flux()
    image, text, pooled, times = torch.randn(2, 6, 64), torch.randn(2, 3, 32), torch.randn(2, 64), torch.tensor([0.5, 0.25])
    image_ids, text_ids, guidance = torch.randint(0, 9, (6, 3)), torch.zeros(3, 3), torch.tensor([3.5, 2.0])
    (wanted,) = reference(image, text, pooled, times, image_ids, text_ids, guidance, return_dict=False)
    made = network.inner_forward(image, image_ids[None].expand(2, -1, -1), text, text_ids, times, pooled, guidance)
    assert torch.equal(made, wanted)


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
