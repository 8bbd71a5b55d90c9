from __future__ import annotations

import json
from typing import Any

from modules.infotext import parse_infotext
from modules.infotext_foreign import infotext_from_comfy, infotext_from_novelai

# The graph of ComfyUI's default workflow, as its PNG chunk `prompt` holds it.
COMFY: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub\\v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a glass bottle, galaxy", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}


def test_comfy_default_workflow() -> None:
    text = infotext_from_comfy(json.dumps(COMFY))
    assert text is not None
    parsed = parse_infotext(text)
    assert parsed["Prompt"] == "a glass bottle, galaxy"
    assert parsed["Negative prompt"] == "text, watermark"
    assert parsed["Sampler"] == "DPM++ 2M"
    assert parsed["Schedule type"] == "Karras"
    assert parsed["Seed"] == "156680208700286"
    assert (parsed["Size-1"], parsed["Size-2"]) == ("512", "640")
    assert parsed["Model"] == "v1-5-pruned-emaonly"
    assert "Denoising strength" not in parsed


def test_comfy_values_that_come_from_other_nodes_and_a_second_pass() -> None:
    graph = json.loads(json.dumps(COMFY))
    graph["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": 77}}
    graph["21"] = {"class_type": "PrimitiveString", "inputs": {"value": "a linked prompt"}}
    graph["6"]["inputs"]["text"] = ["21", 0]
    second = json.loads(json.dumps(graph["3"]))
    second["inputs"].update(seed=["20", 0], denoise=0.5, steps=12, latent_image=["22", 0])
    graph["22"] = {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["3", 0], "scale_by": 2}}
    graph["23"] = second
    text = infotext_from_comfy(json.dumps(graph))
    assert text is not None
    parsed = parse_infotext(text)
    assert parsed["Steps"] == "12"
    assert parsed["Seed"] == "77"
    assert parsed["Denoising strength"] == "0.5"
    assert parsed["Prompt"] == "a linked prompt"


def test_comfy_cycles_and_nonsense_give_nothing() -> None:
    loop = {"1": {"inputs": {"positive": ["1", 0], "negative": ["1", 0], "steps": ["1", 0], "text": ["1", 0], "latent_image": ["1", 0]}}}
    infotext_from_comfy(json.dumps(loop))
    assert infotext_from_comfy("a cat") is None
    assert infotext_from_comfy("[1, 2]") is None
    assert infotext_from_comfy(json.dumps({"9": {"inputs": {"images": []}}})) is None
    assert infotext_from_comfy("[" * 100_000) is None


def test_novelai() -> None:
    comment = {"steps": 28, "sampler": "k_euler_ancestral", "seed": 42, "strength": 0.7, "noise": 0.2, "scale": 11.0, "uc": "lowres, bad"}
    text = infotext_from_novelai("1girl, {masterpiece}", json.dumps(comment), (512, 768))
    assert text is not None
    parsed = parse_infotext(text)
    assert parsed["Prompt"] == "1girl, {masterpiece}"
    assert parsed["Negative prompt"] == "lowres, bad"
    assert parsed["Sampler"] == "Euler a"
    assert parsed["CFG scale"] == "11.0"
    assert (parsed["Size-1"], parsed["Size-2"], parsed["Clip skip"], parsed["ENSD"]) == ("512", "768", "2", "31337")
    assert infotext_from_novelai("x", "not json", (1, 1)) is None
