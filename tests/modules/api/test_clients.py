"""Requests as real clients send them: which routes they call in which order, and every field of their bodies."""

from __future__ import annotations

import json

from PIL import Image

from tests.modules.api.conftest import Server, ServerFactory, from_base64, info_of, to_base64, write_checkpoint_header

PICTURE = to_base64(Image.new("RGB", (64, 64), "red"))

# The whole body that the Python package webuiapi sends for txt2img() with its defaults.
WEBUIAPI_COMMON = {
    "prompt": "cute squirrel",
    "styles": [],
    "seed": 1003,
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "negative_prompt": "ugly, out of frame",
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "sampler_index": "Euler a",
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
}
WEBUIAPI_TXT2IMG = WEBUIAPI_COMMON | {
    "enable_hr": False,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "denoising_strength": 0.7,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "refiner_checkpoint": None,
    "refiner_switch_at": None,
    "disable_extra_networks": False,
    "comments": {},
}
WEBUIAPI_IMG2IMG = WEBUIAPI_COMMON | {
    "init_images": [PICTURE],
    "resize_mode": 0,
    "denoising_strength": 0.75,
    "image_cfg_scale": 1.5,
    "mask": None,
    "mask_blur": 4,
    "inpainting_fill": 0,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 0,
    "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 1,
    "include_init_images": False,
}


def test_webuiapi_txt2img(server: Server) -> None:
    answer = server.txt2img(**WEBUIAPI_TXT2IMG)
    info = info_of(answer)
    assert from_base64(answer["images"][0]).size == (512, 512)
    assert info["sampler_name"] == "Euler a"
    assert info["seed"] == 1003
    p = server.last_request
    assert (p.eta, p.s_noise, p.enable_hr, p.scheduler) == (1.0, 1, False, "Automatic")
    assert p.options.samples_format == "png"


def test_webuiapi_txt2img_with_hires(server: Server) -> None:
    server.txt2img(**WEBUIAPI_TXT2IMG | {"enable_hr": True, "hr_upscaler": "Latent (nearest-exact)", "hr_second_pass_steps": 10})
    p = server.last_request
    assert (p.enable_hr, p.hr_upscaler, p.hr_second_pass_steps, p.denoising_strength) == (True, "Latent (nearest-exact)", 10, 0.7)


def test_webuiapi_img2img_and_inpainting(server: Server) -> None:
    assert from_base64(server.img2img(**WEBUIAPI_IMG2IMG)["images"][0]).size == (512, 512)
    server.img2img(**WEBUIAPI_IMG2IMG | {"mask": PICTURE, "inpainting_fill": 1, "mask_blur": 8})
    p = server.last_request
    assert p.image_mask.size == (64, 64)
    assert (p.mask_blur_x, p.inpaint_full_res, p.image_cfg_scale) == (8, True, 1.5)


def test_webuiapi_chooses_a_model_by_its_title(start_server: ServerFactory) -> None:
    with start_server(checkpoints=("one.safetensors", "two.safetensors")) as server:
        titles = [model["title"] for model in server.get("/sdapi/v1/sd-models")]
        current = server.get("/sdapi/v1/options")["sd_model_checkpoint"]
        chosen = next(title for title in titles if title != current)
        server.post("/sdapi/v1/options", {"sd_model_checkpoint": chosen})
        server.txt2img(**WEBUIAPI_TXT2IMG)
        assert server.last_request.options.sd_model_checkpoint == chosen
        assert server.app.models.resolve().checkpoint.title == chosen


def test_webuiapi_reads_everything_it_can(server: Server) -> None:
    for route in (
        "options", "cmd-flags", "samplers", "schedulers", "sd-vae", "upscalers", "latent-upscale-modes", "sd-models", "hypernetworks",
        "face-restorers", "realesrgan-models", "prompt-styles", "embeddings", "memory", "scripts", "script-info", "progress", "extensions"
    ):  # fmt: skip
        server.get(f"/sdapi/v1/{route}")
    for route in ("refresh-checkpoints", "interrupt", "skip"):
        server.post(f"/sdapi/v1/{route}")
    extra = {
        "image": PICTURE, "resize_mode": 0, "show_extras_results": True, "gfpgan_visibility": 0, "codeformer_visibility": 0, "codeformer_weight": 0,
        "upscaling_resize": 2, "upscaling_resize_w": 512, "upscaling_resize_h": 512, "upscaling_crop": True, "upscaler_1": "Lanczos",
        "upscaler_2": "None", "extras_upscaler_2_visibility": 0, "upscale_first": False
    }  # fmt: skip
    assert from_base64(server.post("/sdapi/v1/extra-single-image", extra)["image"]).size == (128, 128)
    assert server.post("/sdapi/v1/png-info", {"image": f"data:image/png;base64,{PICTURE}"})["info"] == ""


def test_chat_front_ends(server: Server) -> None:
    """SillyTavern's body: settings of the chat, its kind of override_settings, and fields that no WebUI has."""
    body = {
        "prompt": "best quality, absurdres, a portrait",
        "negative_prompt": "lowres, bad anatomy",
        "sampler_name": "DPM++ 2M",
        "scheduler": "Karras",
        "steps": 20,
        "cfg_scale": 7,
        "width": 128,
        "height": 128,
        "restore_faces": False,
        "enable_hr": True,
        "hr_upscaler": "Latent",
        "hr_scale": 1.5,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "seed": None,
        "clip_skip": 2,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    assert len(server.txt2img(**body)["images"]) == 1
    assert server.last_request.options.CLIP_stop_at_last_layers == 2


def test_a_minimal_script_in_the_wiki_style(server: Server) -> None:
    """The few lines shown in A1111's wiki: two fields in, base64 out, the parameters read back by png-info."""
    answer = server.txt2img(prompt="puppy dog", steps=5)
    read = server.post("/sdapi/v1/png-info", {"image": "data:image/png;base64," + answer["images"][0]})
    assert read["info"] == info_of(answer)["infotexts"][0]
    assert read["parameters"]["Steps"] == "5"


def test_javascript_numbers_and_header(server: Server) -> None:
    """Numbers as JavaScript forms send them: whole floats, and digits as strings."""
    raw = json.dumps({"prompt": "a", "steps": 20.0, "seed": "77", "cfg_scale": "7.5", "width": "128", "height": 128.0, "tiling": "false"})
    answer = server.client.post("/sdapi/v1/txt2img", content=raw.encode(), headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == 200
    p = server.last_request
    assert (p.steps, p.seed, p.cfg_scale, p.width, p.tiling) == (20, 77, 7.5, 128, False)


def test_two_clients_with_two_models_get_each_their_own(start_server: ServerFactory, tmp_path: object) -> None:
    with start_server(checkpoints=("one.safetensors",)) as server:
        write_checkpoint_header(server.app.config.ckpt_dirs[0] / "later.safetensors", "128x128")
        big = server.txt2img(override_settings={"sd_model_checkpoint": "later"})
        small = server.txt2img(override_settings={"sd_model_checkpoint": "one"})
        assert [from_base64(answer["images"][0]).width for answer in (big, small)] == [128, 64]
