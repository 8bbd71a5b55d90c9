"""The arithmetic of built-in extensions that no library has, against formulas written out here."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from backend.attention import attention_function
from tests.support.extensions import import_builtin

MULTIDIFFUSION, HYPERTILE = ("sd_forge_multidiffusion", "overlapping_views"), ("hypertile", "tiled_attention")


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Kohya HRFix


def test_blocks_shrink_at_the_chosen_one_while_noise_is_high_and_grow_to_the_skip() -> None:
    shrink, hooks = import_builtin("sd_forge_kohya_hrfix", "deep_shrink"), {}
    unet = SimpleNamespace(
        clone=lambda: unet,
        set_model_input_block_patch=lambda hook: hooks.update(before=hook),
        set_model_input_block_patch_after_skip=lambda hook: hooks.update(after=hook),
        set_model_output_block_patch=lambda hook: hooks.update(output=hook),
    )
    shrink.patch_hrfix(unet, 3, 2.0, (10.0, 2.0), after_skip=True, down="area", up="nearest-exact")
    hidden = drawn(1, 4, 8, 6)
    at = {"block": ("input", 3), "sigmas": torch.tensor([5.0])}
    assert "before" not in hooks
    assert torch.allclose(hooks["after"](hidden, at), functional.avg_pool2d(hidden, 2))
    for other in ({"block": ("input", 4)}, {"sigmas": torch.tensor([1.0])}, {"sigmas": torch.tensor([11.0])}):
        assert hooks["after"](hidden, {**at, **other}) is hidden
    grown, skip = hooks["output"](hidden[..., ::2, ::2], hidden, at)
    assert grown.shape == skip.shape == hidden.shape
    shrink.patch_hrfix(unet, 3, 2.0, (10.0, 2.0), after_skip=False, down="area", up="area")
    assert "before" in hooks


# dynamic thresholding


def imagen(x0: Tensor, percentile: float) -> Tensor:
    """Imagen's section 2.3 in each channel around its mean, as far as the mimicked picture goes: here in numpy."""
    return torch.from_numpy(np.quantile(np.abs(x0.numpy()), percentile, axis=2, keepdims=True)).float()


@pytest.mark.parametrize("percentile", [1.0, 0.9])
def test_thresholded_values_spread_as_those_of_the_mimicked_scale(percentile: float) -> None:
    module = import_builtin("sd_forge_dynamic_thresholding", "dynamic_threshold")
    cond, uncond = drawn(2, 4, 6, 5), drawn(2, 4, 6, 5, seed=2)
    result = module.DynamicThreshold(mimic_scale=7.0, threshold_percentile=percentile).guide(cond, uncond, 20.0, 500.0)
    high, low = ((uncond + scale * (cond - uncond)).flatten(2) for scale in (20.0, 7.0))
    away, mimicked = high - high.mean(dim=2, keepdim=True), low - low.mean(dim=2, keepdim=True)
    wanted = mimicked.abs().amax(dim=2, keepdim=True)
    limit = torch.maximum(imagen(away, percentile), wanted)
    expected = high.mean(dim=2, keepdim=True) + away.clamp(-limit, limit) / limit * wanted
    assert torch.allclose(result.flatten(2), expected, atol=1e-4)
    alone = module.DynamicThreshold(threshold_percentile=percentile).guide(cond[1:], uncond[1:], 20.0, 500.0)
    assert torch.allclose(alone, result[1:], atol=1e-5), "a picture does not depend on its batch"


def test_other_ways_to_measure_and_to_mix() -> None:
    module = import_builtin("sd_forge_dynamic_thresholding", "dynamic_threshold")
    cond, uncond = drawn(1, 4, 6, 5), drawn(1, 4, 6, 5, seed=2)
    guided = uncond + 15.0 * (cond - uncond)
    spread = module.DynamicThreshold(variability_measure="STD").guide(cond, uncond, 15.0, 10.0).flatten(2)
    mimicked = (uncond + 7.0 * (cond - uncond)).flatten(2)
    assert torch.allclose(spread.std(dim=2), mimicked.std(dim=2), rtol=1e-4)
    assert torch.allclose(spread.mean(dim=2), guided.flatten(2).mean(dim=2), atol=1e-4)
    scaled = module.DynamicThreshold(scaling_startpoint="ZERO", separate_feature_channels=False).guide(cond, uncond, 15.0, 10.0)
    factor = scaled / guided
    assert torch.allclose(factor, factor.flatten()[0].expand_as(factor), rtol=1e-3)
    assert torch.equal(module.DynamicThreshold(interpolate_phi=0.0).guide(cond, uncond, 15.0, 10.0), guided)
    assert torch.isfinite(module.DynamicThreshold().guide(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 15.0, 10.0)).all()


def test_modes_of_the_scales() -> None:
    modes = import_builtin("sd_forge_dynamic_thresholding", "dynamic_threshold").MODES
    at = {name: [round(mode(progress, 2.0), 4) for progress in (0.0, 0.5, 1.0)] for name, mode in modes.items()}
    assert at == {
        "Constant": [1, 1, 1],
        "Linear Down": [1, 0.5, 0],
        "Cosine Down": [1, 0.7071, 0],
        "Half Cosine Down": [1, 0.8776, 0.5403],
        "Linear Up": [0, 0.5, 1],
        "Cosine Up": [0, 0.2929, 1],
        "Half Cosine Up": [0, 0.1224, 0.4597],
        "Power Up": [0, 0.25, 1],
        "Power Down": [1, 0.75, 0],
        "Linear Repeating": [1, 1, 1],
        "Cosine Repeating": [1, 1, 1],
        "Sawtooth": [0, 0, 0],
    }
    assert [modes["Linear Repeating"](0.25, 2.0), modes["Cosine Repeating"](0.25, 2.0), modes["Sawtooth"](0.25, 2.0)] == [0, 0, 0.5]


# MultiDiffusion and Mixture of Diffusers


@pytest.mark.parametrize(
    ("length", "side", "overlap", "starts"), [(10, 4, 1, [0, 3, 6]), (4, 8, 2, [0]), (8, 4, 0, [0, 4]), (9, 4, 3, [0, 1, 2, 3, 4, 5])]
)
def test_views_cover_all_places_with_their_overlap(length: int, side: int, overlap: int, starts: list[int]) -> None:
    views = import_builtin(*MULTIDIFFUSION)
    found = views.list_starts(length, side, overlap)
    assert found == starts
    assert all(second - first <= side - overlap for first, second in itertools.pairwise(found))


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_views_are_averaged_as_the_papers_say(method: str, at_once: int) -> None:
    """The network here tells where a place lies in its view, and its row's text, so that weights and the order of rows show."""
    module = import_builtin(*MULTIDIFFUSION)
    calls: list[int] = []

    def network(x: Tensor, sigma: Tensor, c_crossattn: Tensor, c_concat: Tensor, transformer_options: dict[str, Any], **_: Any) -> Tensor:
        calls.append(x.shape[0])
        pictures = x.shape[0] // 2
        assert transformer_options["uncond_indices"] == [*range(pictures)] and transformer_options["cond_indices"] == [*range(pictures, 2 * pictures)]
        assert transformer_options["picture_indices"] == [*range(pictures)] * 2
        assert torch.equal(x[:, :1], c_concat), "both are cut alike"
        ramp = torch.arange(x.shape[-1]).float() * 0.1
        return x * 2 + ramp + c_crossattn.mean(dim=(1, 2)).view(-1, 1, 1, 1) + sigma.view(-1, 1, 1, 1)

    x, text, sigma = drawn(4, 3, 8, 9), drawn(4, 7, 5, seed=2), torch.tensor([1.0, 2.0, 1.0, 2.0])
    arguments = {"c_crossattn": text, "c_concat": x[:, :1], "transformer_options": {"cond_or_uncond": [1, 0]}}
    viewed = module.ViewedNetwork(method, (4, 5), 2, at_once)
    output = viewed(network, {"input": x, "timestep": sigma, "c": arguments, "cond_or_uncond": [1, 0]})
    assert sum(calls) == 4 * 3 * 3 and max(calls) == 4 * min(at_once, 9)
    total, weights = torch.zeros_like(x), torch.zeros(8, 9)
    for top in (0, 2, 4):
        for left in (0, 2, 4):
            weight = torch.ones(4, 5)
            if method != "MultiDiffusion":
                rows, columns = (torch.exp(-(((torch.arange(side) - (side - 1) / 2) / side) ** 2) / 0.02) for side in (4, 5))
                weight = rows[:, None] * columns[None, :]
            answer = x[..., top : top + 4, left : left + 5] * 2 + torch.arange(5) * 0.1
            total[..., top : top + 4, left : left + 5] += answer * weight
            weights[top : top + 4, left : left + 5] += weight
    expected = total / weights + text.mean(dim=(1, 2)).view(-1, 1, 1, 1) + sigma.view(-1, 1, 1, 1)
    assert torch.allclose(output, expected, atol=1e-4)


def test_a_picture_as_large_as_one_view_goes_through_the_network_as_it_is() -> None:
    module = import_builtin(*MULTIDIFFUSION)
    x = drawn(2, 3, 4, 4)
    output = module.ViewedNetwork("MultiDiffusion", (8, 8), 0, 4)(
        lambda x, sigma: x + 1, {"input": x, "timestep": torch.ones(2), "c": {}, "cond_or_uncond": [0]}
    )
    assert torch.equal(output, x + 1)


def test_residuals_of_control_networks_are_cut_at_their_own_scale() -> None:
    module = import_builtin(*MULTIDIFFUSION)
    view = module.View(8, 0, 8, 16)
    residual = torch.arange(16.0).view(1, 1, 4, 4)
    assert view.cut_scaled(residual, 16, 32).flatten().tolist() == [8.0, 9.0, 12.0, 13.0]


# hypertile


def test_tiles_are_the_smallest_divisors_that_are_large_enough() -> None:
    module = import_builtin(*HYPERTILE)
    assert module.list_tile_sides(64, 12, 3) == [16, 32, 64]
    assert module.list_tile_sides(7, 12, 3) == [7]
    assert module.list_tile_sides(13, 4, 3) == [13], "a prime is not cut"
    assert module.find_grid(64, 96, 32 * 48) == (1, 32, 48)
    assert module.find_grid(5, 5, 9) == (1, 3, 3) and module.find_grid(8, 8, 10) is None


def test_tiled_attention_is_attention_within_each_tile() -> None:
    module = import_builtin(*HYPERTILE)
    tiling = module.HyperTile(seed=4, tile_px=16, max_depth=0, swap_size=1)
    tokens, extra = drawn(2, 4 * 6, 8), {"original_shape": [2, 4, 4, 6], "sigmas": torch.tensor([3.0]), "block": ("input", 1)}
    normed, context, value = tiling._cut(tokens, tokens, tokens, extra)
    assert normed.shape == (2 * 6, 4, 8), "2 x 3 tiles of 2 x 2 tokens"
    output = tiling._join(attention_function(normed, context, value, 2), extra)
    picture = tokens.view(2, 4, 6, 8)
    for top in (0, 2):
        for left in (0, 2, 4):
            tile = picture[:, top : top + 2, left : left + 2].reshape(2, 4, 8)
            expected = attention_function(tile, tile, tile, 2).view(2, 2, 2, 8)
            assert torch.allclose(output.view(2, 4, 6, 8)[:, top : top + 2, left : left + 2], expected, atol=1e-6)
    deeper = {**extra, "original_shape": [2, 4, 8, 12]}
    assert tiling._cut(tokens, tokens, tokens, deeper)[0] is tokens, "deeper than max_depth"
    assert tiling._join(tokens, deeper) is tokens


# soft inpainting


def test_half_masked_places_keep_their_share_and_their_contrast() -> None:
    module = import_builtin("soft-inpainting", "soft_masks")
    soft = module.SoftInpainting(mask_blend_power=2.0, mask_blend_scale=0.5, inpaint_detail_preservation=4.0)
    assert torch.allclose(soft.share_of_new(torch.tensor([0.0, 0.25, 1.0]), 3.0), torch.tensor([0.0, 0.25 ** (0.5 * 9.0), 1.0]))
    old, new, share = drawn(1, 4, 3, 3), drawn(1, 4, 3, 3, seed=2), torch.full((1, 4, 3, 3), 0.3)
    mixed = soft.blend(old, new, share)
    straight = 0.7 * old + 0.3 * new
    length = (0.7 * old.norm(dim=1) ** 4 + 0.3 * new.norm(dim=1) ** 4) ** 0.25
    assert torch.allclose(mixed, straight * (length / straight.norm(dim=1)).unsqueeze(1), atol=1e-4)
    assert torch.allclose(soft.blend(old, new, torch.zeros(4, 3, 3)), old, atol=1e-4)
    assert torch.allclose(soft.blend(old, new, torch.ones(4, 3, 3)), new, atol=1e-4)


def test_ranked_means_lie_between_minimum_and_maximum_of_the_neighborhood() -> None:
    module = import_builtin("soft-inpainting", "soft_masks")
    flat = np.full((5, 6), 3.0)
    assert np.allclose(module.mean_of_ranks(flat, 0.25, 0.75), 3.0)
    spike = np.zeros((7, 7))
    spike[3, 3] = 9.0
    assert module.mean_of_ranks(spike, 0.25, 0.75).max() == 0.0, "an outlier is gone"
    grown = module.mean_of_ranks(spike, 0.9, 1.0)
    assert grown[3, 3] > 1.0 and grown[2, 3] > 0.5 and grown[0, 0] == 0.0, "a change reaches its neighbors"


def test_the_original_shows_where_little_has_changed() -> None:
    module = import_builtin("soft-inpainting", "soft_masks")
    old = drawn(4, 12, 12)
    new = old.clone()
    new[:, :, 6:] += 3.0
    places = module.SoftInpainting().changed_places(old, new, torch.ones(12, 12))
    assert places[:, :3].max() < 0.05 and places[:, 9:].min() > 0.95
    covered = module.SoftInpainting(composite_mask_influence=1.0).changed_places(old, new, torch.zeros(12, 12))
    assert covered.max() < 0.01, "with the mask's influence, what is not masked stays"


# the latent modifier


def changes(**fields: Any) -> Any:
    return import_builtin("sd_forge_latent_modifier", "latent_changes").LatentModifier(**fields)


def guided(modifier: Any, *, scale: float = 6.0, only: int | None = None, timestep: float = 300.0) -> Tensor:
    rows = slice(None) if only is None else slice(only, only + 1)
    x, cond, uncond = drawn(2, 4, 8, 8)[rows] * 3, drawn(2, 4, 8, 8, seed=2)[rows], drawn(2, 4, 8, 8, seed=3)[rows]
    count = x.shape[0]
    generators = [torch.Generator().manual_seed(seed) for seed in ((5, 6) if only is None else (5 + only,))]
    result: Tensor = modifier.guide(x, cond, uncond, torch.full((count,), 2.0), torch.full((count,), timestep), scale, generators, 0.18)
    return result


def test_without_changes_it_is_plain_guidance() -> None:
    cond, uncond = drawn(2, 4, 8, 8, seed=2), drawn(2, 4, 8, 8, seed=3)
    assert torch.allclose(guided(changes()), uncond + 6.0 * (cond - uncond), atol=1e-4)


EVERYTHING: list[dict[str, Any]] = [
    *(
        {"sharpness_multiplier": 400.0, "sharpness_method": method, "affect_uncond": "Sharpness"}
        for method in ("anisotropic", "joint-anisotropic", "gaussian", "cas")
    ),
    *(
        {"tonemap_multiplier": 0.5, "tonemap_percentile": 95.0, "tonemap_method": method}
        for method in ("reinhard", "reinhard_perchannel", "arctan", "quantile", "cfg-mimic", "spatial-norm")
    ),
    {"tonemap_multiplier": 0.1, "tonemap_percentile": 95.0, "tonemap_method": "gated"},
    {"contrast_multiplier": 100.0},
    *({"combat_cfg_drift": 1.0, "combat_method": method} for method in ("subtract", "subtract_channels", "subtract_median", "sharpen")),
    {"rescale_cfg_phi": 0.7},
    *({"extra_noise_multiplier": 50.0, "extra_noise_type": kind} for kind in ("gaussian", "uniform", "perlin", "pink", "green", "pyramid")),
    *(
        {"extra_noise_multiplier": 50.0, "extra_noise_method": method}
        for method in ("add_scaled", "speckle", "cads", "cads_rescaled", "cads_speckle", "cads_speckle_rescaled")
    ),
    {"divisive_norm_multiplier": 0.5, "divisive_norm_size": 255},
    *({"spectral_mod_multiplier": 3.0, "spectral_mod_mode": mode} for mode in ("hard_clamp", "soft_clamp")),
    *({"dyn_cfg_augmentation": method} for method in ("dyncfg-halfcosine", "dyncfg-halfcosine-mimic")),
]


@pytest.mark.parametrize("fields", EVERYTHING, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_every_change_acts_on_each_picture_alone(fields: dict[str, Any]) -> None:
    timestep = 700.0 if "cads" in str(fields) else 300.0
    result = guided(changes(**fields), timestep=timestep)
    assert torch.isfinite(result).all()
    assert (result - guided(changes(), timestep=timestep)).abs().max() > 1e-3
    assert torch.allclose(guided(changes(**fields), only=1, timestep=timestep), result[1:], atol=1e-4)


def test_rescaling_is_that_of_the_paper() -> None:
    """Lin et al. 2023, equations 15 and 16, on velocities."""
    module = import_builtin("sd_forge_latent_modifier", "latent_changes")
    cond, v = drawn(2, 4, 8, 8), drawn(2, 4, 8, 8, seed=2) * 5
    deviation = [torch.std(tensor, dim=[1, 2, 3], keepdim=True) for tensor in (cond, v)]
    assert torch.allclose(module.rescale_guidance(v, cond, 0.7), 0.7 * v * deviation[0] / deviation[1] + 0.3 * v, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "perlin", "pink", "green", "pyramid"])
def test_noise_is_standard_and_that_of_its_seed(kind: str) -> None:
    module = import_builtin("sd_forge_latent_modifier", "latent_noise")
    like = torch.empty(2, 4, 9, 13)

    def make(*seeds: int) -> Tensor:
        return module.make_noise(kind, like[: len(seeds)], [torch.Generator().manual_seed(seed) for seed in seeds])

    noise = make(1, 2)
    assert noise.shape == like.shape
    assert noise.mean(dim=(1, 2, 3)).abs().max() < 1e-5 and (noise.std(dim=(1, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.equal(make(2), noise[1:]) and not torch.equal(noise[0], noise[1])


# StyleAlign


def test_shared_attention_lets_rows_of_a_branch_see_each_other() -> None:
    script = import_builtin("sd_forge_stylealign/scripts", "forge_stylealign")
    q, k, v = (drawn(4, 5, 8, seed=seed) for seed in (1, 2, 3))
    options = {"n_heads": 2, "cond_indices": [2, 3], "uncond_indices": [0, 1]}
    shared = script.SharedAttention(1.0)(q, k, v, options)
    for rows in ([0, 1], [2, 3]):
        together = attention_function(*(tensor[rows].reshape(1, 10, 8) for tensor in (q, k, v)), 2).view(2, 5, 8)
        assert torch.allclose(shared[rows], together, atol=1e-5)
    own = attention_function(q, k, v, 2)
    assert torch.allclose(script.SharedAttention(0.0)(q, k, v, options), own)
    assert torch.allclose(script.SharedAttention(0.25)(q, k, v, options), own + 0.25 * (shared - own), atol=1e-5)
