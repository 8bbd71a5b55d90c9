from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from backend.nn.piece import Piece
from backend.nn.unet_program import build_program
from backend.parallel.planning.costs import ModelProfile, contains, merge_pieces, with_measured_ms
from backend.parallel.planning.profiling import empty_unet, profile_control_network, profile_unet, profile_vae_decoder
from backend.parallel.planning.simulation import component_costs, model_config, profile_model
from tests.support.parallel_costs import make_profile

NARROW = {
    "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 24, "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "transformer_layers_per_block": [3, 1], "use_linear_projection": True,
}  # fmt: skip
MB = 1e6


@pytest.fixture(scope="module")
def sdxl() -> ModelProfile:
    return profile_model("sdxl", 1024, 1024)


# figures of the published model, from a study that is independent of this code


def test_sdxl_has_the_known_weights_and_work(sdxl: ModelProfile) -> None:
    assert sdxl.weight_bytes / 2 == 2_567_463_684
    assert sdxl.flops_per_row / 2 == pytest.approx(3.38e12, rel=0.005)


@pytest.mark.parametrize(("side_px", "multiply_adds"), [(512, 0.79e12), (1536, 8.63e12), (2048, 17.95e12)])
def test_sdxl_work_grows_with_the_picture_as_known(side_px: int, multiply_adds: float) -> None:
    assert profile_model("sdxl", side_px, side_px).flops_per_row / 2 == pytest.approx(multiply_adds, rel=0.01)


def test_sdxl_skips_are_the_known_ones(sdxl: ModelProfile) -> None:
    skips = [cost.skip_bytes_per_row / MB for cost in sdxl.pieces if cost.skip_bytes_per_row]
    assert skips == pytest.approx([10.49, 10.49, 10.49, 2.62, 5.24, 5.24, 1.31, 2.62, 2.62], abs=0.01)
    assert sdxl.skip_bytes_per_row / MB == pytest.approx(51.1, abs=0.1)


def test_sdxl_shares_of_work_and_weights_are_the_known_ones(sdxl: ModelProfile) -> None:
    def share(segments: range, field: str) -> float:
        return sum(getattr(cost, field) for cost in sdxl.pieces if cost.piece.segment in segments) / sum(getattr(cost, field) for cost in sdxl.pieces)

    known = {
        range(7, 8): (10.7, 14.7),
        range(8, 9): (10.9, 14.9),
        range(9, 10): (11.8, 16.1),
        range(10, 11): (11.4, 15.6),
        range(13, 16): (15.9, 4.2),
    }
    for segments, (work, weights) in known.items():
        assert 100 * share(segments, "work_per_row") == pytest.approx(work, abs=0.1)
        assert 100 * share(segments, "weight_bytes") == pytest.approx(weights, abs=0.7)  # the study counts modules, not segments


def test_u_cut_of_sdxl_crosses_as_little_as_known(sdxl: ModelProfile) -> None:
    """Cuts after d1.down or d2.0 on the way in, and after the second or third block of the first level on the way out."""
    behind = {str(cost.piece): cost for cost in sdxl.pieces}
    assert (behind["6"].hidden_bytes_per_row + behind["11[9:]"].hidden_bytes_per_row) / MB == pytest.approx(3.9, abs=0.05)
    assert (behind["7[9:]"].hidden_bytes_per_row + behind["11[9:]"].hidden_bytes_per_row) / MB == pytest.approx(5.2, abs=0.05)


def test_vae_decoder_and_controlnet_have_the_known_sizes() -> None:
    text, vae, controlnet = component_costs("sdxl", 1024, 1024, has_controlnet=True)
    assert vae.flops_per_row / 2 == pytest.approx(5.24e12, rel=0.005)
    assert vae.weight_bytes == 2 * 83_653_863
    assert controlnet.weight_bytes / 2 == pytest.approx(1.251e9, rel=0.001)
    assert controlnet.runs_per_row and not vae.runs_per_row
    assert text.weight_bytes == 2 * (123_060_480 + 694_659_840)


def test_text_encoders_have_the_listed_parameters() -> None:
    """Counted by the library on the meta device, from the published configurations."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    clip_h = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    clip_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in net.parameters()) for net in (CLIPTextModel(clip_l), CLIPTextModel(clip_h), CLIPTextModelWithProjection(clip_g))
        ]
    assert model_config("sdxl")["text_encoder_parameters"] == [counts[0], counts[2]]
    assert model_config("sd15")["text_encoder_parameters"] == [counts[0]]
    assert model_config("sd21")["text_encoder_parameters"] == [counts[1]]


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sd21", 865_910_724)])
def test_the_other_families_have_the_known_parameters(name: str, parameters: int) -> None:
    assert profile_model(name, 512, 512).weight_bytes == 2 * parameters


# against the library's own forward on a narrow network


def test_flops_are_those_of_the_librarys_forward() -> None:
    profile = profile_unet(NARROW, latent_height=16, latent_width=24, context_length=7, dtype=torch.float32)
    unet = UNet2DConditionModel(**NARROW)
    unet.set_attn_processor(AttnProcessor())  # plain matrix products, which torch's own counter sees on the CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 4, 16, 24), 1, torch.zeros(1, 7, 24))
    embedding = 2 * (32 * 128 + 128 * 128)
    assert profile.flops_per_row == counter.get_total_flops() - embedding


def test_every_weight_belongs_to_one_piece_or_the_embedding() -> None:
    profile = profile_unet(NARROW, latent_height=8, latent_width=8, dtype=torch.float32)
    assert profile.weight_bytes == sum(parameter.nbytes for parameter in UNet2DConditionModel(**NARROW).parameters())


def test_pieces_are_the_finest_of_the_program_and_skips_match() -> None:
    profile = profile_unet(NARROW, latent_height=8, latent_width=8)
    assert tuple(cost.piece for cost in profile.pieces) == build_program(UNet2DConditionModel(**NARROW)).finest_pieces()
    pushed = [index for index, cost in enumerate(profile.pieces) if cost.skip_bytes_per_row]
    assert [taken.source for cost in profile.pieces for taken in cost.takes] == pushed[::-1]


def test_a_cut_inside_a_transformer_takes_its_input_along() -> None:
    profile = profile_unet(NARROW, latent_height=8, latent_width=8)
    inside = [cost for cost in profile.pieces if cost.piece.end_block is not None]
    assert inside
    assert all(cost.residual_bytes_per_row == cost.hidden_bytes_per_row for cost in inside)
    assert all(cost.residual_bytes_per_row == 0 for cost in profile.pieces if cost.piece.end_block is None)


def test_numbers_scale_with_the_dtype() -> None:
    half, full = (profile_unet(NARROW, latent_height=8, latent_width=8, dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.working_bytes_per_row() == pytest.approx(2 * half.working_bytes_per_row(), rel=0.01)
    assert full.flops_per_row == half.flops_per_row


def test_working_memory_is_more_than_the_skips_and_far_below_keeping_everything() -> None:
    profile = profile_unet(NARROW, latent_height=8, latent_width=8)
    assert profile.skip_bytes_per_row < profile.working_bytes_per_row() < 20 * profile.skip_bytes_per_row


def test_a_profile_is_counted_once_per_shape() -> None:
    first = profile_unet(NARROW, latent_height=8, latent_width=8)
    assert profile_unet({**NARROW, "_name_or_path": "elsewhere"}, latent_height=8, latent_width=8) is first
    assert profile_unet(NARROW, latent_height=8, latent_width=16) is not first


def test_a_network_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into segments"):
        profile_unet({**NARROW, "class_embed_type": "timestep"}, latent_height=8, latent_width=8)


def test_controlnet_and_vae_of_narrow_models() -> None:
    unet = empty_unet(NARROW)
    controlnet = profile_control_network(unet, build_program(unet), latent_height=8, latent_width=8)
    assert controlnet is not None and profile_control_network(unet, build_program(unet), latent_height=8, latent_width=8) is controlnet
    assert controlnet.weight_bytes > 0 and controlnet.flops_per_row > 0
    vae = profile_vae_decoder({"block_out_channels": [32, 32], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8,
                               "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
                              latent_height=8, latent_width=8)  # fmt: skip
    assert vae.weight_bytes > 0 and vae.working_bytes_per_row > 0


# measured times


def test_measured_times_share_out_the_same_sum() -> None:
    profile = make_profile([1.0, 2.0, 5.0])
    measured = with_measured_ms(profile, {Piece(0): 3.0, Piece(1): 1.0, Piece(2): 4.0})
    assert [cost.work_per_row for cost in measured.pieces] == pytest.approx([3.0, 1.0, 4.0])
    assert measured.flops_per_row == profile.flops_per_row


def test_pieces_without_a_time_keep_their_flops() -> None:
    measured = with_measured_ms(make_profile([1.0, 2.0, 5.0]), {Piece(0): 9.0, Piece(1): 3.0})
    assert [cost.work_per_row for cost in measured.pieces] == pytest.approx([2.25, 0.75, 5.0])


def test_equal_pieces_count_the_median_of_their_times() -> None:
    """One slow sample among equal blocks, as another process causes it, does not move a cut."""
    profile = make_profile([1.0, 1.0, 1.0, 4.0])
    measured = with_measured_ms(profile, {Piece(0): 2.0, Piece(1): 30.0, Piece(2): 2.0, Piece(3): 8.0})
    assert [cost.work_per_row for cost in measured.pieces] == pytest.approx([1.0, 1.0, 1.0, 4.0])


def test_a_time_of_a_whole_segment_is_shared_by_flops() -> None:
    profile = profile_unet(NARROW, latent_height=8, latent_width=8)
    measured = with_measured_ms(profile, {Piece(0): 1.0, Piece(1): 3.0})
    assert measured.work_per_row == pytest.approx(profile.work_per_row)
    first = [cost for cost in measured.pieces if cost.piece.segment == 1]
    flops = [sum(cost.flops_per_row for cost in profile.pieces if cost.piece.segment == number) for number in (0, 1)]
    assert len(first) == 3
    assert sum(cost.work_per_row for cost in first) == pytest.approx(0.75 * sum(flops))
    assert len({round(cost.work_per_row / cost.flops_per_row, 6) for cost in first}) == 1


def test_no_times_change_nothing() -> None:
    profile = make_profile([1.0, 2.0])
    assert with_measured_ms(profile, {}) is profile
    assert with_measured_ms(profile, {Piece(0): 0.0}) is profile


# pieces


def test_adjacent_parts_merge() -> None:
    parts = [Piece(3), Piece(4, 0, 1), Piece(4, 1, 2), Piece(4, 2, None), Piece(5, 0, 2), Piece(6)]
    assert merge_pieces(parts) == (Piece(3), Piece(4), Piece(5, 0, 2), Piece(6))
    assert merge_pieces([Piece(4, 1, 2), Piece(4, 3, None)]) == (Piece(4, 1, 2), Piece(4, 3, None))


def test_contains() -> None:
    assert contains(Piece(4), Piece(4, 1, 2)) and contains(Piece(4, 1, None), Piece(4, 2, None)) and contains(Piece(4), Piece(4))
    assert not contains(Piece(4, 1, 3), Piece(4, 2, None)) and not contains(Piece(4), Piece(5)) and not contains(Piece(4, 1, 2), Piece(4))


def test_a_profile_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="has no pieces"):
        make_profile([])
