from __future__ import annotations

import json
from typing import Any

import pytest

from modules.infotext.foreign import infotext_from_comfy, infotext_from_novelai, infotext_from_novelai_json
from modules.infotext.text import parse_infotext

# The graph of ComfyUI's default workflow, as stored in its PNG chunk `prompt`.
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
    graph["8"]["inputs"]["samples"] = ["23", 0]
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


# graphs with separate nodes for settings and conditions

PIECES: dict[str, Any] = {
    "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
    "good": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["te", 0]}},
    "more": {"class_type": "CLIPTextEncode", "inputs": {"text": "in snow", "clip": ["te", 0]}},
    "bad": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["te", 0]}},
    "latent": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
    "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 31}},
    "select": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}},
    "sigmas": {"class_type": "BasicScheduler", "inputs": {"scheduler": "beta", "steps": 9, "denoise": 1.0, "model": ["unet", 0]}},
    "net": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "canny.safetensors"}},
    "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["vae", 0]}},
    "save": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["decode", 0]}},
}


def sampled(positive: str = "good", negative: str = "bad", slots: tuple[int, int] = (0, 0), **nodes: Any) -> dict[str, str]:
    """What is read from a KSampler with these conditions."""
    sampler = {"seed": 1, "steps": 4, "cfg": 5, "sampler_name": "euler", "scheduler": "simple", "latent_image": ["latent", 0], "model": ["unet", 0]}
    inputs = {**sampler, "positive": [positive, slots[0]], "negative": [negative, slots[1]]}
    return read({"sampler": {"class_type": "KSampler", "inputs": inputs}, **nodes})


def read(nodes: dict[str, Any]) -> dict[str, str]:
    text = infotext_from_comfy(json.dumps({**PIECES, **nodes}))
    assert text is not None
    return parse_infotext(text)


def prompts(parsed: dict[str, str]) -> tuple[str, str]:
    return parsed["Prompt"], parsed["Negative prompt"]


GUIDERS: dict[str, tuple[dict[str, Any], str, tuple[str, str]]] = {
    "CFGGuider": ({"model": ["unet", 0], "positive": ["good", 0], "negative": ["bad", 0], "cfg": 3.5}, "3.5", ("a fox", "blurry")),
    "BasicGuider": ({"model": ["unet", 0], "conditioning": ["good", 0]}, "1", ("a fox", "")),
    "DualCFGGuider": (
        {"model": ["unet", 0], "cond1": ["good", 0], "cond2": ["more", 0], "negative": ["bad", 0], "cfg_conds": 6.0, "cfg_cond2_negative": 2.0},
        "6.0",
        ("a fox, in snow", "blurry"),
    ),
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_comfy_custom_sampler_with_a_guider(guider: str) -> None:
    inputs, scale, texts = GUIDERS[guider]
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["select", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    parsed = read({"guider": {"class_type": guider, "inputs": inputs}, "sampler": {"class_type": "SamplerCustomAdvanced", "inputs": links}})
    assert prompts(parsed) == texts
    assert (parsed["Steps"], parsed["Seed"], parsed["CFG scale"]) == ("9", "31", scale)
    assert (parsed["Sampler"], parsed["Schedule type"], parsed["Model"]) == ("DPM++ 2M", "Beta", "flux1-dev")
    assert (parsed["Size-1"], parsed["Size-2"]) == ("1024", "768")


def test_comfy_custom_sampler_with_nodes_that_are_a_sampler_and_a_schedule() -> None:
    inputs = {"model": ["unet", 0], "add_noise": True, "noise_seed": 8, "cfg": 2.5, "positive": ["flux", 0], "negative": ["zero", 0]}
    parsed = read(
        {
            "sampler": {
                "class_type": "SamplerCustom",
                "inputs": {**inputs, "sampler": ["own", 0], "sigmas": ["half", 1], "latent_image": ["latent", 0]},
            },
            "own": {"class_type": "SamplerDPMPP_2M_SDE", "inputs": {"solver_type": "midpoint", "eta": 1.0}},
            "half": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["karras", 0], "step": 3}},
            "karras": {"class_type": "KarrasScheduler", "inputs": {"steps": 11, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 7.0}},
            "flux": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.0, "conditioning": ["good", 0]}},
            "zero": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["good", 0]}},
        }
    )
    assert prompts(parsed) == ("a fox", "")
    assert (parsed["Sampler"], parsed["Schedule type"], parsed["Steps"], parsed["Seed"]) == ("DPM++ 2M SDE", "Karras", "11", "8")
    assert (parsed["CFG scale"], parsed["Distilled CFG Scale"]) == ("2.5", "3.0")


@pytest.mark.parametrize("source", ["good", "bad", "joined", "zero"])
def test_comfy_zeroed_conditions_say_nothing(source: str) -> None:
    """ConditioningZeroOut takes a condition and makes zeros of it: its text is not the picture's."""
    zero = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": [source, 0]}}
    joined = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["good", 0], "conditioning_2": ["more", 0]}}
    assert prompts(sampled("good", "zero", zero=zero, joined=joined)) == ("a fox", "")
    half = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["zero", 0], "conditioning_2": ["bad", 0]}}
    assert prompts(sampled("good", "half", zero=zero, joined=joined, half=half)) == ("a fox", "blurry")


@pytest.mark.parametrize("kind", ["ControlNetApplyAdvanced", "InpaintModelConditioning"])
def test_comfy_nodes_with_both_conditions_keep_them_apart(kind: str) -> None:
    inputs = {"positive": ["good", 0], "negative": ["bad", 0], "control_net": ["net", 0], "vae": ["vae", 0], "pixels": ["picture", 0]}
    picture = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
    nodes = {"both": {"class_type": kind, "inputs": inputs}, "picture": picture}
    assert prompts(sampled("both", "both", (0, 1), **nodes)) == ("a fox", "blurry")
    twice = {**nodes, "again": {"class_type": kind, "inputs": {**inputs, "positive": ["both", 0], "negative": ["both", 1]}}}
    assert prompts(sampled("again", "again", (0, 1), **twice)) == ("a fox", "blurry")


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("ConditioningCombine", {"conditioning_1": ["good", 0], "conditioning_2": ["more", 0]}),
        ("ConditioningConcat", {"conditioning_to": ["good", 0], "conditioning_from": ["more", 0]}),
    ],
)
def test_comfy_joined_conditions_in_the_order_of_their_inputs(kind: str, inputs: dict[str, Any]) -> None:
    area = {
        "class_type": "ConditioningSetArea",
        "inputs": {"conditioning": ["joined", 0], "width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0},
    }
    assert prompts(sampled("area", joined={"class_type": kind, "inputs": inputs}, area=area)) == ("a fox, in snow", "blurry")


def test_comfy_takes_the_sampler_whose_picture_was_saved() -> None:
    graph = json.loads(json.dumps(COMFY))
    other = json.loads(json.dumps(graph["3"]))
    other["inputs"].update(seed=5, steps=3)
    only_seen = {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["4", 2]}}
    graph = {"1": other, "2": only_seen, "10": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}, **graph}
    text = infotext_from_comfy(json.dumps(graph))
    assert text is not None
    assert parse_infotext(text)["Steps"] == "20"


def test_novelai_hidden_in_the_alpha_bits() -> None:
    chunks = {
        "Description": "1girl",
        "Software": "NovelAI",
        "Comment": json.dumps({"steps": 28, "sampler": "k_euler", "seed": 7, "scale": 5, "uc": "bad"}),
    }
    text = infotext_from_novelai_json(json.dumps(chunks), (64, 32))
    assert text is not None
    parsed = parse_infotext(text)
    assert prompts(parsed) == ("1girl", "bad")
    assert (parsed["Steps"], parsed["Sampler"], parsed["Seed"], parsed["Size-1"], parsed["Size-2"]) == ("28", "Euler", "7", "64", "32")
    assert infotext_from_novelai_json("a cat\nSteps: 1", (1, 1)) is None
    assert infotext_from_novelai_json('{"Comment": 5}', (1, 1)) is None
