"""Preprocessors without networks: what each finds in pictures with a known answer, and how they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules_forge import image_maps
from modules_forge.builtin_preprocessors import builtin_preprocessors
from modules_forge.network_preprocessors import NETWORK_FILES, NOT_HERE, OLD_NAMES, explain_missing
from modules_forge.supported_preprocessor import Preprocessor, PreprocessorParameter


def _step(height: int = 16, width: int = 16, at: int = 8, low: int = 0, high: int = 255) -> np.ndarray:
    picture = np.full((height, width, 3), low, dtype=np.uint8)
    picture[:, at:] = high
    return picture


def _random(height: int = 70, width: int = 100) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_canny_finds_one_pixel_of_a_step_in_every_direction() -> None:
    edges = image_maps.find_edges(_step(), 100, 200)[..., 0]
    assert (edges[:, 7] == 255).all() and (edges > 0).sum() == 16
    assert np.array_equal(image_maps.find_edges(np.ascontiguousarray(_step().swapaxes(0, 1)), 100, 200)[..., 0], edges.T)
    diagonal = np.where(np.add.outer(np.arange(16), np.arange(16))[..., None] < 16, 0, 255).astype(np.uint8).repeat(3, axis=2)
    found = image_maps.find_edges(diagonal, 100, 200)[..., 0]
    assert all(1 <= (row > 0).sum() <= 2 for row in found[1:-1])


def test_canny_follows_a_weak_edge_only_from_a_strong_one() -> None:
    """A step in height from 100 to 40: its gradient is four times that."""
    picture = _step(high=0)
    picture[:8, 8:], picture[8:, 8:] = 100, 40
    both = image_maps.find_edges(picture, 100, 300)[..., 0]
    assert (both[:7, 7] == 255).all() and (both[10:, 7] == 255).all()
    weak = _step(high=40)
    assert image_maps.find_edges(weak, 100, 300).max() == 0
    assert image_maps.find_edges(weak, 300, 100).max() == 0, "thresholds in either order"
    assert image_maps.find_edges(weak, 50, 100).max() == 255


def test_canny_takes_the_channel_that_changes_most() -> None:
    picture = _step(high=0)
    picture[:, 8:, 2] = 255
    assert (image_maps.find_edges(picture, 100, 200)[:, 7] == 255).all()


def test_simple_maps() -> None:
    picture = _random()
    assert np.array_equal(image_maps.invert(picture), 255 - picture)
    assert np.array_equal(image_maps.threshold(picture, 60)[..., 1] == 255, (picture > 60).all(axis=2))
    assert np.array_equal(image_maps.take_intensity(picture, 1.0)[..., 0], picture.max(axis=2))
    flat = np.full((20, 20, 3), 77, dtype=np.uint8)
    for result in (image_maps.blur(flat, 3.0), image_maps.make_color_grid(flat), image_maps.shuffle(flat)):
        assert (result == 77).all()
    assert image_maps.find_scribble(flat, 32).max() == image_maps.find_lines(flat, 6.0, 8.0).max() == 0


def test_luminance_is_that_of_pillows_lab() -> None:
    """Pillow's color management (LittleCMS) gives L* of sRGB from 0 to 255; it adapts to D50, so colors differ slightly."""
    from PIL import ImageCms

    picture = _random()
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.fromarray(picture), transform)
    assert lab is not None
    difference = np.asarray(lab)[..., 0].astype(int) - image_maps.take_luminance(picture, 1.0)[..., 0]
    assert abs(difference).mean() < 3 and abs(difference).max() < 14
    greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    lab = ImageCms.applyTransform(Image.fromarray(greys), transform)
    assert abs(np.asarray(lab)[..., 0].astype(int) - image_maps.take_luminance(greys, 1.0)[..., 0]).max() <= 1


def test_lines_are_bright_where_the_picture_is_dark() -> None:
    picture = np.full((40, 40, 3), 255, dtype=np.uint8)
    picture[:, 20] = 0
    for found in (image_maps.find_lines(picture, 6.0, 8.0)[..., 0], image_maps.find_scribble(picture, 32)[..., 0]):
        assert (found[:, 20] > 100).all() and found[:, :10].max() == found[:, 30:].max() == 0


def test_blur_is_pillows_gaussian_within_rounding() -> None:
    from PIL import ImageFilter

    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=2)
    reference = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).filter(ImageFilter.GaussianBlur(2.0)))
    assert abs(reference[8:-8, 8:-8].astype(int) - image_maps.blur(picture, 2.0)[8:-8, 8:-8]).max() <= 2


def test_shuffled_colours_are_the_pictures_own_and_the_same_each_time() -> None:
    picture = _step(64, 64, 32)
    one = image_maps.shuffle(picture)
    assert np.array_equal(one, image_maps.shuffle(picture)) and not np.array_equal(one, image_maps.shuffle(picture, seed=2))
    assert not np.array_equal(one, picture) and {0, 255} <= set(np.unique(one))


def test_a_color_grid_has_squares_of_64() -> None:
    grid = image_maps.make_color_grid(_random(128, 192))
    assert grid.shape == (128, 192, 3)
    assert all(len(np.unique(grid[r : r + 64, c : c + 64].reshape(-1, 3), axis=0)) == 1 for r in (0, 64) for c in (0, 64, 128))


@pytest.mark.parametrize("preprocessor", builtin_preprocessors(), ids=lambda one: one.name)
def test_every_preprocessor_takes_any_picture(preprocessor: Preprocessor) -> None:
    for picture in (_random(), np.full((30, 50), 9, dtype=np.uint8), np.zeros((33, 20, 4), dtype=np.uint8)):
        found = preprocessor(picture, resolution=128)
        assert isinstance(found, np.ndarray) and found.dtype == np.uint8
        if preprocessor.slider_resolution.gradio_update_kwargs["visible"]:
            assert min(found.shape[:2]) == 128


def test_sliders_reach_the_map_and_default_to_their_values() -> None:
    found = {one.name: one for one in builtin_preprocessors()}
    tile = found["tile_resample"](_random(), 512, slider_1=2.0)
    assert tile.shape[:2] == (35, 50)
    assert found["tile_resample"](_random(), 512).shape[:2] == (70, 100)
    weak = _step(128, 128, 64, high=40)
    assert found["canny"](weak, 128).max() == 0 and found["canny"](weak, 128, 20, 50).max() == 255


def test_inpaint_cuts_the_mask_out_of_the_hint() -> None:
    found = {one.name: one for one in builtin_preprocessors()}
    hint, mask = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 0.9
    cond, rest = found["inpaint_global_harmonious"].process_before_every_sampling(None, hint, mask)
    assert rest is None and (cond[..., :4] == -1).all() and (cond[..., 4:] == 0.5).all()
    assert found["inpaint_only"].process_before_every_sampling(None, hint, None)[0] is hint


def test_inpaint_only_keeps_what_is_not_masked() -> None:
    functions: list[Any] = []

    class Unet:
        def clone(self) -> Unet:
            return Unet()

        def set_model_sampler_post_cfg_function(self, function: Any) -> None:
            functions.append(function)

    class Engine:
        class forge_objects:
            unet = Unet()

        @staticmethod
        def encode_first_stage(x: torch.Tensor) -> torch.Tensor:
            assert float(x.max()) == 0.0
            return torch.full((1, 4, 1, 2), 7.0)

    process = type("P", (), {"sd_model": Engine})
    found = {one.name: one for one in builtin_preprocessors()}
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., :8] = 1.0
    found["inpaint_only"].process_before_every_sampling(process, torch.full((1, 3, 8, 16), 0.5), mask)
    kept = functions[0]({"denoised": torch.zeros(1, 4, 1, 2)})
    assert kept[0, 0, 0].tolist() == [0.0, 7.0]


def test_a_parameter_is_told_to_clients() -> None:
    parameter = PreprocessorParameter(label="X", value=3, minimum=1, maximum=9, step=1)
    assert parameter.api_json == {
        "name": "X",
        "value": 3,
        "min": 1,
        "max": 9,
        "step": 1,
    }


OURS = {"CLIP-ViT-L (IPAdapter)", "SigLIP (Redux)"}
"""That Forge does not have: for pictures shown to Flux.1."""


def test_every_preprocessor_of_forge_is_here_or_explained() -> None:
    """The names that Forge offers."""
    names = [
        "None",
        "canny",
        "invert (from white bg & black line)",
        "animal_openpose",
        "blur_gaussian",
        "densepose (pruple bg & purple torso)",
        "densepose_parula (black bg & blue torso)",
        "depth_anything",
        "depth_hand_refiner",
        "depth_leres",
        "depth_leres++",
        "depth_marigold",
        "depth_midas",
        "depth_zoe",
        "dw_openpose_full",
        "inpaint_global_harmonious",
        "inpaint_only",
        "inpaint_only+lama",
        "instant_id_face_keypoints",
        "lineart_anime",
        "lineart_anime_denoise",
        "lineart_coarse",
        "lineart_realistic",
        "lineart_standard (from white bg & black line)",
        "mediapipe_face",
        "mlsd",
        "normal_midas",
        "normalbae",
        "openpose",
        "openpose_face",
        "openpose_faceonly",
        "openpose_full",
        "openpose_hand",
        "recolor_intensity",
        "recolor_luminance",
        "reference_only",
        "reference_adain",
        "reference_adain+attn",
        "scribble_hed",
        "scribble_pidinet",
        "scribble_xdog",
        "seg_anime_face",
        "seg_ofade20k",
        "seg_ofcoco",
        "seg_ufade20k",
        "shuffle",
        "softedge_hed",
        "softedge_hedsafe",
        "softedge_pidinet",
        "softedge_pidisafe",
        "softedge_teed",
        "t2ia_color_grid",
        "t2ia_sketch_pidi",
        "threshold",
        "tile_resample",
        "tile_colorfix",
        "tile_colorfix+sharp",
        "CLIP-ViT-H (IPAdapter)",
        "CLIP-ViT-bigG (IPAdapter)",
        "InsightFace+CLIP-H (IPAdapter)",
        "InsightFace (InstantID)",
        "CLIP-G (Revision)",
        "CLIP-G (Revision ignore prompt)",
    ]
    here = {one.name for one in builtin_preprocessors()} - OURS
    assert here <= set(names)
    for name in set(names) - here:
        assert name in str(explain_missing(name.upper(), "/somewhere")), name
    assert not here & (set(NETWORK_FILES) | set(NOT_HERE)) and set(OLD_NAMES.values()) <= here | set(NETWORK_FILES)
    assert explain_missing("sideways", "/somewhere") is None
