"""Feeds hostile text of n, 2n, 4n and 8n characters to every parser of text from clients and files, and measures how CPU time grows.

    python -m tools.campaign.parser_growth [--characters 4000] [--report benchmarks/campaign_parser_growth.md]

The exponent is that of the best-fitting power of n over the four lengths: 1 is linear, 2 quadratic. Runs too short to measure count as linear.
`tests/modules/test_text_growth.py` counts the steps of the same parsers on the same texts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import logging
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from backend.text_processing.clip_tokenizer import build_clip_tokenizer, tokenize_plain
from backend.text_processing.composition import split_composition, strip_comments
from backend.text_processing.parsing import parse_prompt_attention
from backend.text_processing.schedule import PassSteps, schedule_prompt
from backend.text_processing.t5_tokenizer import build_t5_tokenizer
from modules.api.pictures import PictureError, decode_picture
from modules.errors import RequestError
from modules.infotext.foreign import infotext_from_comfy, infotext_from_novelai, infotext_from_novelai_json
from modules.infotext.parameters import parse_generation_parameters
from modules.infotext.text import iterate_pairs, parse_infotext
from modules.infotext.versions import parse_version
from modules.launch.extension_folders import BUILTIN_DIR
from modules.pictures.filename_tokens import FilenameGenerator
from modules.pictures.metadata import decode_user_comment
from modules.prompts.extra_networks import parse_prompt
from modules.prompts.styles import PromptStyle, StyleDatabase, read_styles

Reader = Callable[[str], Any]

SHORTEST_MEASURED_MS = 2.0
LARGEST_EXPONENT = 1.4
"""Above what noise and caches make of linear time on a busy machine, well below quadratic."""
NUM_DOUBLINGS = 3

_STEPS = PassSteps(num_base_steps=4)
_NUMBERS = itertools.count()
"""Makes texts unique whose parse result would be cached."""


def _read_csv(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "styles.csv")
        path.write_text(f"name,prompt,negative_prompt\nfox,{text}", encoding="utf-8")
        read_styles(path)


def _find_styles(text: str) -> None:
    database = StyleDatabase([])
    database.styles = dict(_STYLES)
    database.extract_styles_from_prompt(text, text)


_STYLES = {str(index): PromptStyle(str(index), prompt, "") for index, prompt in enumerate(["a", "(a {prompt}", "a, a", " "])}


def _read_picture(text: str) -> None:
    try:
        decode_picture(f"data:{text}", "mask")
    except PictureError:
        return


def _samplers_in_a_row(text: str) -> str | None:
    """A ComfyUI graph with a sampler per 40 characters, each using the previous one's latent, with conditions combined from all."""
    graph: dict[str, Any] = {"0": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["9", 0]}}}
    for index in range(1, len(text) // 40 + 1):
        latent, condition = [f"{index - 1}", 0], [f"c{index - 1}" if index > 1 else "0", 0]
        graph[f"c{index}"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": condition, "conditioning_2": condition}}
        inputs = {"positive": [f"c{index}", 0], "negative": condition, "latent_image": latent, "steps": 1, "seed": 1, "model": latent}
        graph[f"{index}"] = {"class_type": "KSampler", "inputs": inputs}
    return infotext_from_comfy(json.dumps(graph))


@cache
def _tokenizer() -> Any:
    return build_clip_tokenizer()


@cache
def _t5_tokenizer() -> Any:
    return build_t5_tokenizer()


@cache
def _guest(extension: str, module: str) -> Any:
    """A module of a built-in extension, found as the extension finds it."""
    folder = str(BUILTIN_DIR / extension)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)


def _rename_loras(text: str) -> None:
    """A pasted prompt that is `text`, with hashes of LoRAs that are `text` too."""
    params = {"Prompt": text, "Hires prompt": text, "Lora hashes": f"a: 0123456789ab, {text}"}
    _guest("sd_forge_lora", "infotext_lora").use_names_of(lambda hashes: dict.fromkeys(hashes, "b"), params)


@cache
def _axes() -> Any:
    """An axis of numbers and one of texts, and what reads their values."""
    module = _guest("selectable_scripts", "xyz_axes")
    options = {option.label: option for option in module.build_axis_options()}
    return module.read_values, options["Steps"], options["Prompt S/R"]


def _read_axes(text: str) -> None:
    read_values, *options = _axes()
    for option in options:
        with contextlib.suppress(RequestError):
            read_values(option, text, [], csv_mode=True)


def _read_line(text: str) -> None:
    _guest("selectable_scripts", "script_jobs")
    with contextlib.suppress(RequestError):
        _guest("selectable_scripts/scripts", "prompts_from_file").parse_line(f"--prompt {text}")


_GENERATOR = FilenameGenerator(None, 1, "a prompt", Image.new("RGB", (8, 8)))

PARSERS: Mapping[str, Reader] = {
    "emphasis": parse_prompt_attention,
    "emphasis off": lambda text: parse_prompt_attention(text, "None"),
    "schedule": lambda text: schedule_prompt(f"{text} {next(_NUMBERS)}", _STEPS),
    "AND": split_composition,
    "comments": strip_comments,
    "extra networks": parse_prompt,
    "infotext": parse_infotext,
    "pairs": lambda text: list(iterate_pairs(text)),
    "parameters line": lambda text: parse_infotext(f"a\nSteps: 1, Sampler: Euler, Seed: 1, {text}"),
    "generation parameters": lambda text: parse_generation_parameters(f"a\nSteps: 1, Sampler: {text}, Seed: 1, Version: {text}"),
    "version": parse_version,
    "file name pattern": _GENERATOR.apply,
    "data URL": _read_picture,
    "user comment": lambda text: decode_user_comment(b"UNICODE\0" + text.encode("utf-16-be", "replace")),
    "NovelAI comment": lambda text: infotext_from_novelai(text, text, (8, 8)),
    "ComfyUI graph": infotext_from_comfy,
    "ComfyUI samplers": _samplers_in_a_row,
    "NovelAI bits": lambda text: infotext_from_novelai_json(text, (8, 8)),
    "styles.csv": _read_csv,
    "styles in a prompt": _find_styles,
    "ControlNet unit": lambda text: _guest("sd_forge_controlnet", "lib_controlnet.infotext").read_unit(f"Module: canny, Model: {text}"),
    "LoRAs of others": _rename_loras,
    "CLIP's tokens": lambda text: tokenize_plain(_tokenizer(), [text]),
    "T5's tokens": lambda text: tokenize_plain(_t5_tokenizer(), [text]),
    "axis of a plot": _read_axes,
    "line of a job": _read_line,
}

_PIECES = (
    *("a", " ", "\n", "\t ", ":", ": ", ",", ", ", "1", ":1", ".", '"', "\\", '\\"', "#", "|", "(", ")", "[", "]", "{", "}", "<", ">", "=", ";"),
    *("(a", "[a", "(a)", "(a:1", "(a:1)", "[a:b:", "[a:b:5]", "[a|b]", "[a|", "([a)b]", ":1)", "\\(", "a AND ", "BREAK ", "a:1 AND "),
    *("<a:", "<lora:a", "<lora:a:1>", "<a", "ab: ", 'ab: "', "ab: [", 'ab: ["', 'ab: "b", ', "ab: {", "Steps: 1, ", "\nSteps: ", "1x", "Steps:1\n"),
    *(
        "[seed",
        "[seed]",
        "<a>",
        "[datetime<",
        "[datetime<a>]",
        ";a",
        "a/",
        ";base64,",
        "v1.",
        '{"a":',
        '{"1":{"inputs":',
        "'a',",
        "\nNegative prompt: ",
    ),
)


def hostile_texts() -> Mapping[str, Callable[[int], str]]:
    """Name -> a function giving a text of about that many characters: a repeated piece, nested brackets, spaces between two letters."""
    texts: dict[str, Callable[[int], str]] = {f"{piece!r} repeated": partial(_repeated, piece) for piece in _PIECES}
    texts["blanks between letters"] = lambda length: f"a{' ' * length}a"
    texts["blanks before a hash"] = lambda length: f"a{' ' * length}[a]a"
    texts |= {f"{opening}{closing} nested": partial(_nested, opening, closing) for opening, closing in ("()", "[]", "{}")}
    texts["schedules nested"] = partial(_nested, "[a:", ":5]")
    texts["quotes escaped"] = lambda length: f'ab: "{chr(92) * length}'
    texts["a long key"] = lambda length: f"{'a' * length}: 1"
    texts["commas before a colon"] = lambda length: f"{',' * length}ab: 1"
    return texts


def _repeated(piece: str, length: int) -> str:
    return piece * (length // len(piece))


def _nested(opening: str, closing: str, length: int) -> str:
    depth = length // len(opening + closing)
    return f"{opening * depth}a{closing * depth}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--characters", type=int, default=4000, help="n, the length of the shortest text")
    parser.add_argument("--report", type=Path, help="also write the table to this file")
    asked = parser.parse_args(arguments)
    logging.disable()  # warnings about the texts are irrelevant here
    lengths = [asked.characters * 2**doubling for doubling in range(NUM_DOUBLINGS + 1)]
    rows = [(name, *_worst(name, lengths)) for name in PARSERS]
    text = "\n".join(_report(lengths, rows))
    print(text)
    if asked.report:
        asked.report.write_text(f"{text}\n", encoding="utf-8")
    return int(any(exponent > LARGEST_EXPONENT for *_, exponent in rows))


def _worst(name: str, lengths: list[int]) -> tuple[str, list[float], float]:
    """(text, ms per length, exponent) of the text with the largest exponent; if all are linear, of the slowest."""
    measured = [(kind, times, exponent_of(lengths, times)) for kind, times in _times_ms(name, lengths)]
    return max(measured, key=lambda one: (one[2] > LARGEST_EXPONENT, one[1][-1]))


def _times_ms(name: str, lengths: list[int]) -> Iterator[tuple[str, list[float]]]:
    for kind, text_of in hostile_texts().items():
        yield kind, [_cpu_ms(PARSERS[name], text_of(length)) for length in lengths]


def _cpu_ms(read: Reader, text: str) -> float:
    """The shorter of two runs."""
    times = []
    for _ in range(2):
        started = time.process_time()
        read(text)
        times.append((time.process_time() - started) * 1000)
    return min(times)


def exponent_of(lengths: list[int], times_ms: list[float]) -> float:
    """The slope of log time over log length by least squares; 0 if the longest run is too short to measure."""
    if times_ms[-1] < SHORTEST_MEASURED_MS:
        return 0.0
    points = [(math.log(length), math.log(max(ms, 0.01))) for length, ms in zip(lengths, times_ms) if ms > SHORTEST_MEASURED_MS / 4]
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _report(lengths: list[int], rows: list[tuple[str, str, list[float], float]]) -> Iterator[str]:
    yield "# How readers of text grow"
    yield ""
    yield f"`python -m tools.campaign.parser_growth --characters {lengths[0]}`, Python {platform.python_version()}, {platform.machine()}, CPU ms."
    yield f"{len(PARSERS)} readers, {len(hostile_texts())} kinds of hostile text each; the worst is shown."
    yield f"An exponent above {LARGEST_EXPONENT} fails."
    yield ""
    yield f"| reader | worst text | {' | '.join(f'{length:,} characters' for length in lengths)} | exponent |"
    yield f"| --- | --- | {' | '.join('---:' for _ in lengths)} | ---: |"
    for name, kind, times, exponent in rows:
        shown = kind.replace("|", "\\|")
        yield f"| {name} | {shown} | {' | '.join(f'{ms:.1f}' for ms in times)} | {f'{exponent:.2f}' if exponent else 'too short'} |"


if __name__ == "__main__":
    sys.exit(main())
