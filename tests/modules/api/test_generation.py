from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.pictures.metadata import read_info_from_image
from tests.modules.api.conftest import Server, ServerFactory, from_base64, info_of, to_base64, write_checkpoint_header

INFO_KEYS = {
    "prompt",
    "all_prompts",
    "negative_prompt",
    "all_negative_prompts",
    "seed",
    "all_seeds",
    "subseed",
    "all_subseeds",
    "subseed_strength",
    "width",
    "height",
    "sampler_name",
    "cfg_scale",
    "steps",
    "batch_size",
    "restore_faces",
    "face_restoration_model",
    "sd_model_name",
    "sd_model_hash",
    "sd_vae_name",
    "sd_vae_hash",
    "seed_resize_from_w",
    "seed_resize_from_h",
    "denoising_strength",
    "extra_generation_params",
    "index_of_first_image",
    "infotexts",
    "styles",
    "job_timestamp",
    "clip_skip",
    "is_using_inpainting_conditioning",
    "version",
    "comments",
}

PICTURE = to_base64(Image.new("RGB", (96, 64), "red"))


def test_an_answer_has_pictures_the_request_and_info(server: Server) -> None:
    answer = server.txt2img(prompt="a cat", negative_prompt="dog", seed=5, steps=3, width=64, height=64, batch_size=2)
    assert set(answer) == {"images", "parameters", "info"}
    assert len(answer["images"]) == 2
    assert answer["parameters"]["prompt"] == "a cat"
    assert answer["parameters"]["steps"] == 3
    info = info_of(answer)
    assert set(info) == INFO_KEYS
    assert info["all_seeds"] == [5, 6]
    assert (info["width"], info["height"], info["steps"], info["negative_prompt"]) == (64, 64, 3, "dog")


def test_pictures_carry_their_own_infotext(server: Server) -> None:
    answer = server.txt2img(prompt="a cat", seed=5, steps=3, width=64, height=64, batch_size=2)
    info = info_of(answer)
    for text, infotext, seed in zip(answer["images"], info["infotexts"], (5, 6)):
        assert read_info_from_image(from_base64(text))[0] == infotext
        assert f"Seed: {seed}," in infotext


@pytest.mark.parametrize(("samples_format", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF")])
def test_pictures_come_in_the_format_of_the_settings(server: Server, samples_format: str, kind: str) -> None:
    answer = server.txt2img(prompt="a cat", steps=1, override_settings={"samples_format": samples_format})
    picture = from_base64(answer["images"][0])
    assert picture.format == kind
    assert read_info_from_image(picture)[0] == info_of(answer)["infotexts"][0]


def test_an_empty_body_makes_a_picture_of_the_models_own_size(server: Server) -> None:
    answer = server.txt2img()
    assert from_base64(answer["images"][0]).size == (64, 64)
    assert (answer["parameters"]["width"], answer["parameters"]["steps"], answer["parameters"]["sampler_index"]) == (64, 50, "Euler")
    assert server.last_request.sampler_name == "Euler"


@pytest.mark.parametrize(
    ("resolution", "sizes", "size"),
    [
        ("64x64", {"width": 128}, (128, 512)),
        ("64x64", {"width": 512, "height": 512}, (512, 512)),
        ("96x64", {}, (96, 64)),
        ("1024x1024", {}, (512, 512)),
        ("512x512", {}, (512, 512)),
        ("nonsense", {}, (512, 512)),
        (None, {}, (512, 512)),
    ],
)
def test_the_models_own_size_counts_only_when_it_is_small_and_no_size_was_sent(
    start_server: ServerFactory, tmp_path: Path, resolution: str | None, sizes: dict[str, int], size: tuple[int, int]
) -> None:
    with start_server(checkpoints=()) as server:
        write_checkpoint_header(tmp_path / "models" / "Stable-diffusion" / "x.safetensors", resolution)
        server.txt2img(**sizes)
        assert (server.last_request.width, server.last_request.height) == size
        server.img2img(init_images=[PICTURE], **sizes)
        assert (server.last_request.width, server.last_request.height) == size


def test_the_size_of_the_checkpoint_that_the_request_selects_counts(start_server: ServerFactory, tmp_path: Path) -> None:
    with start_server() as server:
        write_checkpoint_header(tmp_path / "models" / "Stable-diffusion" / "zwei.safetensors", "128x128")
        server.txt2img(override_settings={"sd_model_checkpoint": "zwei"})
        assert (server.last_request.width, server.last_request.height) == (128, 128)
        assert server.last_request.options.sd_model_checkpoint.startswith("zwei.safetensors")


def test_sides_are_cut_to_multiples_of_8_and_the_answer_says_so(server: Server) -> None:
    answer = server.txt2img(width=100, height=71)
    assert from_base64(answer["images"][0]).size == (96, 64)
    assert "Size: 96x64" in info_of(answer)["infotexts"][0]
    assert (answer["parameters"]["width"], answer["parameters"]["height"]) == (96, 64)


def test_null_counts_as_not_sent(server: Server) -> None:
    fields = (
        "prompt",
        "steps",
        "width",
        "height",
        "seed",
        "cfg_scale",
        "sampler_name",
        "scheduler",
        "script_args",
        "alwayson_scripts",
        "send_images",
    )
    server.txt2img(**dict.fromkeys(fields))
    p = server.last_request
    assert (p.prompt, p.steps, p.width, p.height, p.cfg_scale) == ("", 50, 64, 64, 7.0)


def test_unknown_fields_of_other_versions_are_ignored(server: Server) -> None:
    server.txt2img(prompt="a", outpath_samples="/etc", sd_model="x", save_to_cloud=True)
    assert server.last_request.outpath_samples != "/etc"


@pytest.mark.parametrize(
    ("fields", "sampler", "scheduler"),
    [
        ({"sampler_name": "Euler a"}, "Euler a", "Automatic"),
        ({"sampler_name": "k_euler_a"}, "Euler a", "Automatic"),
        ({"sampler_name": "DPM++ 2M Karras"}, "DPM++ 2M", "Automatic"),
        ({"sampler_name": "Euler Karras"}, "Euler", "Karras"),
        ({"sampler_name": "euler A", "scheduler": "sgm_uniform"}, "Euler a", "SGM Uniform"),
        ({"sampler_index": "Heun"}, "Heun", "Automatic"),
        ({"sampler_index": "Heun", "sampler_name": "DDIM"}, "DDIM", "Automatic"),
        ({"scheduler": "Exponential"}, "Euler", "Exponential"),
    ],
)
def test_samplers_and_schedules_by_any_of_their_names(server: Server, fields: dict[str, str], sampler: str, scheduler: str) -> None:
    server.txt2img(**fields)
    assert (server.last_request.sampler_name, server.last_request.scheduler) == (sampler, scheduler)


def test_nothing_is_saved_unless_asked(server: Server) -> None:
    server.txt2img()
    assert (server.last_request.do_not_save_samples, server.last_request.do_not_save_grid) == (True, True)
    server.txt2img(save_images=True)
    assert (server.last_request.do_not_save_samples, server.last_request.do_not_save_grid) == (False, False)


def test_pictures_can_be_left_out(server: Server) -> None:
    answer = server.txt2img(send_images=False)
    assert answer["images"] == []
    assert info_of(answer)["infotexts"]


def test_override_settings_count_for_this_request_alone(server: Server) -> None:
    server.txt2img(override_settings={"CLIP_stop_at_last_layers": 2, "sd_vae": "None"})
    assert server.last_request.options.CLIP_stop_at_last_layers == 2
    assert server.app.options.CLIP_stop_at_last_layers == 1


def test_hires_without_its_own_cfg_takes_that_of_the_first_pass(server: Server) -> None:
    server.txt2img(enable_hr=True, denoising_strength=0.5, cfg_scale=4.5)
    assert server.last_request.hr_cfg == 4.5
    server.txt2img(enable_hr=True, denoising_strength=0.5, cfg_scale=4.5, hr_cfg=2)
    assert server.last_request.hr_cfg == 2


def test_pictures_in_a_request_are_decoded(server: Server) -> None:
    mask = to_base64(Image.new("L", (48, 32), 255))
    server.img2img(init_images=["data:image/png;base64," + PICTURE], mask=mask, mask_blur=2, inpainting_fill=1, denoising_strength=0.4)
    p = server.last_request
    assert p.init_images[0].size == (96, 64)
    assert p.image_mask.size == (96, 64)  # a mask of another size is stretched to match
    assert (p.mask_blur_x, p.mask_blur_y, p.inpainting_fill, p.denoising_strength) == (2, 2, 1, 0.4)


def test_init_images_are_echoed_only_on_request(server: Server) -> None:
    mask = to_base64(Image.new("L", (96, 64), 255))
    parameters = server.img2img(init_images=[PICTURE], mask=mask)["parameters"]
    assert parameters["init_images"] is None
    assert parameters["mask"] is None
    assert parameters["denoising_strength"] == 0.75
    parameters = server.img2img(init_images=[PICTURE], mask=mask, include_init_images=True)["parameters"]
    assert parameters["init_images"] == [PICTURE]
    assert parameters["mask"] == mask


def test_a_picture_turned_by_its_camera_comes_upright(server: Server) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    server.img2img(init_images=[to_base64(Image.new("RGB", (80, 40)), "JPEG", exif=exif)])
    assert server.last_request.init_images[0].size == (40, 80)


INFOTEXT = (
    "a cat, oil\nNegative prompt: dog\nSteps: 12, Sampler: Euler a, Schedule type: Karras, CFG scale: 3.5, Seed: 99, Size: 128x96, "
    "Variation seed: 7, Variation seed strength: 0.25, Clip skip: 2, ENSD: 31337, Denoising strength: 0.6, Hires upscale: 1.5, "
    "Hires upscaler: Lanczos, Hires steps: 4, Version: v1.10.1"
)


def test_infotext_fills_what_the_body_leaves_out(server: Server) -> None:
    server.txt2img(infotext=INFOTEXT, seed=5, override_settings={"CLIP_stop_at_last_layers": 3})
    p = server.last_request
    assert (p.prompt, p.negative_prompt, p.steps, p.sampler_name, p.scheduler, p.cfg_scale) == ("a cat, oil", "dog", 12, "Euler a", "Karras", 3.5)
    assert (p.seed, p.width, p.height, p.subseed, p.subseed_strength) == (5, 128, 96, 7, 0.25)
    assert (p.enable_hr, p.hr_scale, p.hr_upscaler, p.hr_second_pass_steps, p.denoising_strength, p.hr_cfg) == (True, 1.5, "Lanczos", 4, 0.6, 3.5)
    assert p.options.eta_noise_seed_delta == 31337
    assert p.options.CLIP_stop_at_last_layers == 3


@pytest.mark.parametrize(
    ("pair", "field", "kept"),
    [
        ("Model: gone, Model hash: 0123456789", None, None),
        ("VAE: gone.safetensors", None, None),
        ("Module 1: gone", None, None),
        ("Refiner: gone [0123456789], Refiner switch at: 0.5", "refiner_checkpoint", None),
        ("Hires checkpoint: gone, Hires upscale: 2, Denoising strength: 0.5", "hr_checkpoint_name", None),
        ("Hires upscaler: 4x_gone, Hires upscale: 2, Denoising strength: 0.5", "hr_upscaler", None),
        ("Sampler: Gone++", "sampler_name", None),
        ("Schedule type: Gone", "scheduler", "Automatic"),
    ],
)
def test_what_an_infotext_names_and_is_not_here_is_left_out_with_a_comment(server: Server, pair: str, field: str | None, kept: str | None) -> None:
    server.txt2img(infotext=f"a cat\nSteps: 5, Seed: 99, Size: 64x64, {pair}")
    p = server.last_request
    assert (p.prompt, p.steps, p.seed) == ("a cat", 5, 99)
    assert any("gone" in comment.lower() for comment in p.comments), p.comments
    if field is not None:
        assert "gone" not in str(getattr(p, field)).lower()
        assert kept is None or getattr(p, field) == kept


def test_what_the_body_names_itself_is_checked_beside_an_infotext(server: Server) -> None:
    infotext = "a cat\nSteps: 5, Seed: 99, Size: 64x64, Refiner: gone, Refiner switch at: 0.5"
    answer = server.client.post("/sdapi/v1/txt2img", json={"infotext": infotext, "sampler_name": "Gone++"})
    assert answer.status_code in (404, 422)
    assert server.client.post("/sdapi/v1/txt2img", json={"infotext": infotext, "override_settings": {"sd_vae": "gone"}}).status_code in (404, 422)


def test_infotext_of_an_answer_asks_for_the_same_picture_again(server: Server) -> None:
    first = server.txt2img(prompt="a cat, [b:c:0.5]", negative_prompt="x", seed=77, steps=9, cfg_scale=4, sampler_name="Heun", width=72, height=80)
    second = server.txt2img(infotext=info_of(first)["infotexts"][0])
    assert second["images"] == first["images"]
    assert info_of(second)["infotexts"] == info_of(first)["infotexts"]


def test_many_waiting_requests_do_not_hold_up_the_others(server: Server) -> None:
    go_on = threading.Event()
    server.maker.before = lambda p: go_on.wait(60)  # type: ignore[assignment, return-value]
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(server.txt2img, prompt=str(number), send_images=False) for number in range(60)]
        while server.get("/internal/pending-tasks")["size"] < 59:
            threading.Event().wait(0.02)
        assert server.get("/sdapi/v1/progress")["state"]["job"] == "txt2img"
        assert server.get("/internal/ping") == {}
        server.post("/sdapi/v1/interrupt")
        assert server.app.state.interrupted
        go_on.set()
        assert len([job.result() for job in waiting]) == 60
    prompts = [p.prompt for p in server.maker.requests]
    assert len(prompts) == 60


def failing(error: Exception) -> Any:
    def fail(_: Any) -> None:
        raise error

    return fail


def test_an_internal_error_is_a_500_without_a_stack_trace(server: Server) -> None:
    server.maker.before = failing(ZeroDivisionError("division by zero\nTraceback: secret"))
    answer = server.client.post("/sdapi/v1/txt2img", json={})
    assert answer.status_code == 500
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert answer.json()["error"] == "ZeroDivisionError"
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    server.maker.before = lambda p: None
    server.txt2img()


class OutOfMemoryError(RuntimeError):
    """Named like torch's own."""


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_is_a_class_of_its_own(server: Server, error: Exception) -> None:
    server.maker.before = failing(error)
    answer = server.client.post("/sdapi/v1/txt2img", json={})
    assert answer.status_code == 507
    assert answer.json()["error"] == "OutOfMemoryError"
    assert "smaller" in answer.json()["detail"]


def test_the_engines_out_of_memory_error_shows_its_table(server: Server) -> None:
    from backend.memory.errors import DeviceRow, OutOfMemory  # imports torch

    row = DeviceRow(device="cuda:0", name="Card", total_bytes=8 << 30, free_bytes=1 << 30, holders=(("unet", 5 << 30),))
    server.maker.before = failing(OutOfMemory("the VAE", device="cuda:0", need_bytes=2 << 30, table=[row]))
    answer = server.client.post("/sdapi/v1/txt2img", json={})
    assert answer.status_code == 507
    assert "cuda:0 (Card): total 8192 MiB, free 1024 MiB, used by unet 5120 MiB" in answer.json()["detail"]


def test_without_a_checkpoint_the_answer_says_where_to_put_one_and_it_works_then(start_server: ServerFactory, tmp_path: Path) -> None:
    with start_server(checkpoints=()) as server:
        answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": "a"})
        assert 400 <= answer.status_code < 500
        assert str(tmp_path / "models" / "Stable-diffusion") in answer.json()["detail"]
        assert ".safetensors" in answer.json()["detail"]
        write_checkpoint_header(tmp_path / "models" / "Stable-diffusion" / "new.safetensors")
        assert from_base64(server.txt2img(prompt="a")["images"][0]).size == (64, 64)


def test_the_same_request_gives_the_same_pixels_alone_and_in_a_batch(server: Server) -> None:
    alone = from_base64(server.txt2img(seed=12)["images"][0])
    in_batch = from_base64(server.txt2img(seed=11, batch_size=3)["images"][1])
    assert np.array_equal(np.asarray(alone), np.asarray(in_batch))


def test_what_the_user_was_told_reaches_the_client(server: Server) -> None:
    server.maker.before = lambda p: (p.comment("LoRA gone not found"), p.comment("two\nlines"))
    assert info_of(server.txt2img(prompt="a cat"))["comments"] == ["LoRA gone not found", "two", "lines"]
    server.maker.before = lambda p: None
    assert info_of(server.txt2img(prompt="a cat"))["comments"] == []


def test_without_a_password_nobody_knows_who_asks(server: Any) -> None:
    server.txt2img()
    assert server.last_request.user is None


def test_the_user_is_the_one_who_gave_the_password(start_server: Any) -> None:
    with start_server(api_auth=(("ann", "secret"), ("bob", "secret2"))) as server:
        assert server.client.post("/sdapi/v1/txt2img", json={}, auth=("bob", "secret2")).status_code == 200
        assert server.last_request.user == "bob"


@pytest.mark.parametrize(("users", "label"), [((), "a red cat" * 22 + "a "), ((("me", "secret"),), "")], ids=["open", "with a password"])
def test_the_queue_shows_prompts_unless_the_api_has_a_password(start_server: ServerFactory, users: tuple[tuple[str, str], ...], label: str) -> None:
    """Who opens the page need not know the API's password."""
    with start_server(api_auth=users) as server:
        server.client.auth = users[0] if users else None
        server.txt2img(prompt="a red cat" * 40, steps=1)
        (line,) = server.app.jobs.lines()
    assert line.label == label
