"""Converts the node graph in ComfyUI pictures to an infotext. Linear in the number of nodes and links.

Pure: text in, text out. Must not know files, images or settings.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from modules.infotext.text import build_infotext

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
SAMPLER_NODES = {
    "SamplerEulerAncestral": "euler_ancestral",
    "SamplerEulerAncestralCFGPP": "euler_ancestral_cfg_pp",
    "SamplerLMS": "lms",
    "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_ancestral",
    "SamplerDPMPP_SDE": "dpmpp_sde",
    "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde",
    "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde",
    "SamplerDPMAdaptative": "dpm_adaptive",
}
"""Nodes that are one particular sampler, and its name."""
SCHEDULE_NODES = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "BetaSamplingScheduler": "beta"}
"""Nodes that are one particular schedule, and its name."""

_MAX_VALUE_LINKS = 64
_CHECKPOINT_INPUTS = ("ckpt_name", "unet_name", "model_name")
_PROMPT_INPUTS = ("text", "text_g", "text_l", "t5xxl", "clip_g", "clip_l", "prompt")
_TEXT_VALUES = ("text", "text_g", "text_l", "string", "value", "prompt")
_NO_CONDITIONS = frozenset(
    {"clip", "vae", "model", "control_net", "image", "images", "mask", "pixels", "samples", "latent_image", "clip_vision_output"}
)
"""Inputs that lead away from the prompts of this picture."""

Node = Mapping[str, Any]


def infotext_from_comfy(graph_text: str) -> str | None:
    """The infotext of a ComfyUI picture from its `prompt` chunk (the executed graph as JSON); None if it contains no sampler node.

    If there are several sampler nodes, uses the one whose picture was saved.
    """
    graph = json_object(graph_text)
    if graph is None:
        return None
    reader = _Graph({str(key): node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)})
    sampler = reader.saved_sampler()
    if sampler is None:
        return None
    positive, negative = reader.prompts(sampler)
    return build_infotext(positive, negative, reader.params(sampler))


def json_object(text: str) -> dict[str, Any] | None:
    """`text` parsed as a JSON object, or None."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_sampler(inputs: Mapping[str, Any]) -> bool:
    """KSampler nodes have a steps input, SamplerCustom has sigmas, SamplerCustomAdvanced has a guider with the conditions."""
    return ("positive" in inputs and ("steps" in inputs or "sigmas" in inputs)) or ("guider" in inputs and "sigmas" in inputs)


def _is_saver(node: Node) -> bool:
    return "filename_prefix" in node["inputs"] or "save" in str(node.get("class_type", "")).lower()


class _Graph:
    """Follows links [node id, output index]. Samplers, guiders and schedulers are represented by their inputs."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes

    def saved_sampler(self) -> Mapping[str, Any] | None:
        """The sampler nearest to a saved picture. Of several, one whose latent feeds no other."""
        samplers = [key for key, node in self._nodes.items() if _is_sampler(node["inputs"])]
        found = self._nearest_samplers(key for key, node in self._nodes.items() if _is_saver(node)) or samplers
        latents = [self._latent(self._nodes[key]["inputs"]) for key in found]
        upstream = set(self._ancestors(*latents))
        last = [key for key in found if key not in upstream] or found
        return self._nodes[last[0]]["inputs"] if last else None

    def _nearest_samplers(self, starts: Iterable[str]) -> list[str]:
        """The first sampler upstream of each node in `starts`. Nodes visited from an earlier start are not visited again."""
        found: list[str] = []
        seen: set[str] = set()
        for start in starts:
            waiting = deque([start])
            while waiting:
                key = waiting.popleft()
                if key in seen:
                    continue
                seen.add(key)
                if _is_sampler(self._nodes[key]["inputs"]):
                    found.append(key)
                    break
                waiting.extend(self._linked_keys(self._nodes[key]["inputs"].values()))
        return found

    def _ancestors(self, *links: Any) -> Iterator[str]:
        """Ids of the linked nodes and everything upstream, each once, nearest first."""
        seen: set[str] = set()
        waiting = deque(self._linked_keys(links))
        while waiting:
            key = waiting.popleft()
            if key not in seen:
                seen.add(key)
                yield key
                waiting.extend(self._linked_keys(self._nodes[key]["inputs"].values()))

    def _linked_keys(self, links: Iterable[Any]) -> list[str]:
        return [str(link[0]) for link in links if self._is_link(link)]

    def _is_link(self, link: Any) -> bool:
        return isinstance(link, (list, tuple)) and len(link) == 2 and isinstance(link[0], (str, int)) and str(link[0]) in self._nodes

    def _inputs_behind(self, link: Any, *names: str) -> Mapping[str, Any]:
        """Inputs of the nearest node upstream of `link` that has one of `names`; of the linked node itself if no names are given. {} if none."""
        for key in self._ancestors(link):
            inputs: Mapping[str, Any] = self._nodes[key]["inputs"]
            if not names or any(name in inputs for name in names):
                return inputs
        return {}

    def _class_behind(self, link: Any) -> str:
        return str(self._nodes[str(link[0])].get("class_type", "")) if self._is_link(link) else ""

    def _value(self, raw: Any, names: tuple[str, ...]) -> Any:
        """A plain value, or the first of the inputs `names` of the linked node."""
        for _ in range(_MAX_VALUE_LINKS):
            if not self._is_link(raw):
                return raw if isinstance(raw, (str, int, float)) else None
            inputs = self._nodes[str(raw[0])]["inputs"]
            raw = next((inputs[name] for name in names if name in inputs), None)
        return None

    # building the infotext

    def _guider(self, sampler: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs with conditions, scale and model: those of the linked `guider`, or the sampler's own."""
        return self._inputs_behind(sampler["guider"], "positive", "conditioning", "cond1") if "guider" in sampler else sampler

    def prompts(self, sampler: Mapping[str, Any]) -> tuple[str, str]:
        guider = self._guider(sampler)
        positive = [guider.get(name) for name in ("positive", "conditioning", "cond1", "cond2")]
        return self._text(*positive), self._text(guider.get("negative"))

    def _text(self, *links: Any) -> str:
        """Texts of all prompt nodes whose conditions reach the links, in input order. A zeroed condition has no text."""
        found: list[str] = []
        seen: set[tuple[str, int]] = set()
        waiting = [link for link in reversed(links) if self._is_link(link)]
        while waiting:
            key, output = str(waiting[-1][0]), waiting.pop()[1]
            if (key, output == 1) in seen:
                continue
            seen.add((key, output == 1))
            node = self._nodes[key]
            name = next((name for name in _PROMPT_INPUTS if name in node["inputs"] and "clip" in node["inputs"]), None)
            if name is not None:
                found.append(str(self._value(node["inputs"][name], _TEXT_VALUES) or ""))
            elif node.get("class_type") != "ConditioningZeroOut":
                waiting += [link for link in reversed(self._conditions(node["inputs"], output)) if self._is_link(link)]
        return ", ".join(text for text in found if text)

    def _conditions(self, inputs: Mapping[str, Any], output: Any) -> list[Any]:
        """Links to the conditions behind an output. A node with both outputs positive first and negative second."""
        if "positive" in inputs and "negative" in inputs:
            return [inputs["negative" if output == 1 else "positive"]]
        return [link for name, link in inputs.items() if name not in _NO_CONDITIONS]

    def params(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        guider = self._guider(sampler)
        schedule = self._inputs_behind(sampler["sigmas"], "steps") if "sigmas" in sampler else sampler
        noise = self._inputs_behind(sampler.get("noise"), "noise_seed", "seed") if "noise" in sampler else sampler
        denoise = self._value(schedule.get("denoise"), ("denoise", "value"))
        sampler_name, schedule_name = self._sampler_name(sampler), self._schedule_name(sampler, schedule)
        return {
            "Steps": self._value(schedule.get("steps"), ("steps", "value")),
            "Sampler": COMFY_SAMPLERS.get(str(sampler_name), sampler_name),
            "Schedule type": COMFY_SCHEDULES.get(str(schedule_name), schedule_name),
            "CFG scale": self._scale(sampler, guider),
            "Distilled CFG Scale": self._distilled_scale(guider),
            "Seed": self._value(noise.get("seed", noise.get("noise_seed")), ("seed", "noise_seed", "value")),
            "Size": self._latent_size(self._latent(sampler)),
            "Model": self._checkpoint(guider.get("model")),
            "Denoising strength": denoise if isinstance(denoise, (int, float)) and denoise < 1 else None,
            "Version": "ComfyUI",
        }

    @staticmethod
    def _latent(sampler: Mapping[str, Any]) -> Any:
        return sampler.get("latent_image", sampler.get("latent", sampler.get("samples")))

    def _sampler_name(self, sampler: Mapping[str, Any]) -> Any:
        if "sampler_name" in sampler:
            return self._value(sampler["sampler_name"], ("sampler_name",))
        link = sampler.get("sampler")
        return SAMPLER_NODES.get(self._class_behind(link)) or self._value(
            self._inputs_behind(link, "sampler_name").get("sampler_name"), ("sampler_name",)
        )

    def _schedule_name(self, sampler: Mapping[str, Any], schedule: Mapping[str, Any]) -> Any:
        if "scheduler" in schedule or "sigmas" not in sampler:
            return self._value(schedule.get("scheduler"), ("scheduler",))
        nodes = (self._nodes[key] for key in self._ancestors(sampler["sigmas"]))
        node = next((node for node in nodes if node["inputs"] is schedule), {})
        return SCHEDULE_NODES.get(str(node.get("class_type")))

    def _scale(self, sampler: Mapping[str, Any], guider: Mapping[str, Any]) -> Any:
        """The CFG scale; 1 for a guider without a negative prompt."""
        raw = next((guider[name] for name in ("cfg", "cfg_conds", "cfg_cond2_negative") if name in guider), None)
        return 1 if raw is None and "guider" in sampler and "conditioning" in guider else self._value(raw, ("cfg", "value"))

    def _distilled_scale(self, guider: Mapping[str, Any]) -> Any:
        found = self._inputs_behind(guider.get("positive", guider.get("conditioning")), "guidance").get("guidance")
        return self._value(found, ("guidance", "value"))

    def _latent_size(self, link: Any) -> str | None:
        for key in self._ancestors(link):
            sides = [self._value(self._nodes[key]["inputs"].get(name), (name, "value")) for name in ("width", "height")]
            if all(isinstance(side, int) for side in sides):
                return f"{sides[0]}x{sides[1]}"
        return None

    def _checkpoint(self, link: Any) -> str | None:
        for key in self._ancestors(link):
            inputs = self._nodes[key]["inputs"]
            for name in _CHECKPOINT_INPUTS:
                if isinstance(inputs.get(name), str):
                    file_name = inputs[name].replace("\\", "/").rsplit("/", 1)[-1]
                    return file_name.rsplit(".", 1)[0]
        return None
