"""Reading what other programs leave in their pictures: ComfyUI's node graphs and NovelAI's comments, as the infotext users know.

Pure: texts in, text out. Must not know files, images or settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from modules.infotext import build_infotext

COMFY_SAMPLERS = {
    "euler": "Euler",
    "euler_cfg_pp": "Euler",
    "euler_ancestral": "Euler a",
    "euler_ancestral_cfg_pp": "Euler a",
    "heun": "Heun",
    "heunpp2": "HeunPP2",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_sde_gpu": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_gpu": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_3m_sde_gpu": "DPM++ 3M SDE",
    "ddpm": "DDPM",
    "lcm": "LCM",
    "ipndm": "IPNDM",
    "ipndm_v": "IPNDM_V",
    "deis": "DEIS",
    "ddim": "DDIM",
    "uni_pc": "UniPC",
    "uni_pc_bh2": "UniPC",
}
COMFY_SCHEDULES = {
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "kl_optimal": "KL Optimal",
}
NOVELAI_SAMPLERS = {
    "k_dpmpp_2m": "DPM++ 2M",
    "k_dpmpp_sde": "DPM++ SDE",
    "k_dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_2s_ancestral": "DPM++ 2S a",
    "k_dpm_fast": "DPM fast",
    "k_dpm_2": "DPM2",
    "k_dpm_2_ancestral": "DPM2 a",
    "k_euler": "Euler",
    "k_euler_ancestral": "Euler a",
    "k_heun": "Heun",
    "k_lms": "LMS",
    "ddim": "DDIM",
    "ddim_v3": "DDIM",
    "plms": "PLMS",
}
NOVELAI_CLIP_SKIP = 2
NOVELAI_ENSD = 31337

_MAX_GRAPH_DEPTH = 64
_CHECKPOINT_INPUTS = ("ckpt_name", "unet_name", "model_name")


def infotext_from_novelai(description: str, comment: str, size_px: tuple[int, int]) -> str | None:
    """The infotext of a NovelAI picture from its `Description` and `Comment` chunks; None when the comment is not NovelAI's JSON."""
    settings = _json_object(comment)
    if settings is None or "steps" not in settings:
        return None
    sampler = str(settings.get("sampler", ""))
    params = {
        "Steps": settings["steps"],
        "Sampler": NOVELAI_SAMPLERS.get(sampler, "Euler a"),
        "CFG scale": settings.get("scale"),
        "Seed": settings.get("seed"),
        "Size": f"{size_px[0]}x{size_px[1]}",
        "Denoising strength": settings.get("strength"),
        "Clip skip": NOVELAI_CLIP_SKIP,
        "ENSD": NOVELAI_ENSD,
    }
    prompt = description or str(settings.get("prompt", ""))
    return build_infotext(prompt, str(settings.get("uc") or ""), params)


def infotext_from_comfy(graph_text: str) -> str | None:
    """The infotext of a ComfyUI picture from its `prompt` chunk (the executed graph as JSON); None when no sampler node is in it.

    With several sampler nodes the one nearest to the saved picture counts.
    """
    graph = _json_object(graph_text)
    if graph is None:
        return None
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    sampler = _last_sampler(nodes)
    if sampler is None:
        return None
    graph_reader = _Graph(nodes)
    return build_infotext(graph_reader.text(sampler, "positive"), graph_reader.text(sampler, "negative"), graph_reader.params(sampler))


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _last_sampler(nodes: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The sampler node from which no other sampler's latent follows."""
    samplers = {key: node for key, node in nodes.items() if "positive" in node["inputs"] and "steps" in node["inputs"]}
    graph = _Graph(nodes)
    upstream = {found for node in samplers.values() for found in graph.ancestors(node["inputs"].get("latent_image")) if found in samplers}
    last = [node for key, node in samplers.items() if key not in upstream] or list(samplers.values())
    return last[0] if last else None


class _Graph:
    """Follows the links [node id, output index] of a ComfyUI graph."""

    def __init__(self, nodes: Mapping[str, dict[str, Any]]) -> None:
        self._nodes = nodes

    def ancestors(self, link: Any) -> Iterator[str]:
        """Ids of the node behind a link and of all nodes before it, each once."""
        seen: set[str] = set()
        waiting = [link]
        while waiting:
            key = self._linked_key(waiting.pop())
            if key is None or key in seen:
                continue
            seen.add(key)
            yield key
            waiting.extend(self._nodes[key]["inputs"].values())

    def _linked_key(self, link: Any) -> str | None:
        if isinstance(link, (list, tuple)) and len(link) == 2 and str(link[0]) in self._nodes:
            return str(link[0])
        return None

    def value(self, raw: Any, names: tuple[str, ...], depth: int = 0) -> Any:
        """A plain value, or the first of the inputs `names` of the node it is linked to."""
        key = self._linked_key(raw)
        if key is None or depth > _MAX_GRAPH_DEPTH:
            return raw if isinstance(raw, (str, int, float)) else None
        inputs = self._nodes[key]["inputs"]
        for name in names:
            if name in inputs:
                return self.value(inputs[name], names, depth + 1)
        return None

    def text(self, sampler: Mapping[str, Any], side: str) -> str:
        """The texts of all prompt nodes that lead to the sampler's `side` input."""
        names = ("text", "text_g", "text_l", "string", "value")
        found = []
        for key in self.ancestors(sampler["inputs"].get(side)):
            inputs = self._nodes[key]["inputs"]
            name = next((name for name in names[:3] if name in inputs and "clip" in inputs), None)
            if name is not None:
                found.append(str(self.value(inputs[name], names) or ""))
        return ", ".join(text for text in found if text)

    def params(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        inputs = sampler["inputs"]
        sampler_name = self.value(inputs.get("sampler_name"), ("sampler_name",))
        schedule = self.value(inputs.get("scheduler"), ("scheduler",))
        denoise = self.value(inputs.get("denoise"), ("denoise",))
        return {
            "Steps": self.value(inputs.get("steps"), ("steps", "value")),
            "Sampler": COMFY_SAMPLERS.get(str(sampler_name), sampler_name),
            "Schedule type": COMFY_SCHEDULES.get(str(schedule), schedule),
            "CFG scale": self.value(inputs.get("cfg"), ("cfg", "value")),
            "Seed": self.value(inputs.get("seed", inputs.get("noise_seed")), ("seed", "noise_seed", "value")),
            "Size": self._latent_size(inputs.get("latent_image")),
            "Model": self._checkpoint(inputs.get("model")),
            "Denoising strength": denoise if isinstance(denoise, (int, float)) and denoise < 1 else None,
            "Version": "ComfyUI",
        }

    def _latent_size(self, link: Any) -> str | None:
        for key in self.ancestors(link):
            inputs = self._nodes[key]["inputs"]
            if isinstance(inputs.get("width"), int) and isinstance(inputs.get("height"), int):
                return f"{inputs['width']}x{inputs['height']}"
        return None

    def _checkpoint(self, link: Any) -> str | None:
        for key in self.ancestors(link):
            inputs = self._nodes[key]["inputs"]
            for name in _CHECKPOINT_INPUTS:
                if isinstance(inputs.get(name), str):
                    file_name = inputs[name].replace("\\", "/").rsplit("/", 1)[-1]
                    return file_name.rsplit(".", 1)[0]
        return None
