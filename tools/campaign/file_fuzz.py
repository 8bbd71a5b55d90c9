"""Mutated files for every parser of foreign files: each is read or rejected with one of our errors, in bounded time and memory.

    python -m tools.campaign.file_fuzz [--cases 3000] [--seed 0] [--reader NAME] [--keep FOLDER]

Seeds are small valid files of each kind. A mutation changes bytes, or the contents of a container (a safetensors header, a pickle in its zip, text in
a PNG), because checksums catch most damage to containers. Each reader runs in a separate process: if it dies, that counts as a failure, and the
file that killed it is kept. A case that hangs is aborted; if that fails, the reader's process is killed.
Writes benchmarks/campaign_file_fuzz.md.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save as save_safetensors

from tools.campaign import network_files
from tools.development import ROOT_DIR

REPORT = ROOT_DIR / "benchmarks" / "campaign_file_fuzz.md"
MAX_CASE_S = 20.0
MAX_GROWTH_MIB = 1500
_HOSTILE = (
    b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"[" * 1000,
    b'{"a":' * 1000, b"1e400", b"NaN", b"9" * 5000, b'"\\ud800"', b"-1", b"1" * 20,
    b"\xe9", b"\xc2\xb2", b"\xef\xbb\xbf", b"\r\n\r\n", b'"', b",,,,", b";", b"\\", b"null",
    b"[]", b"{}", b"true", b"\x85" * 300, b"(", b"t", b"R", b"cos\nsystem\n",
    b"h\x05", b"0", b"}", b"s", b"\x8a\xff", b"X\xff\xff\xff\x7f", b"BINGET", b"../", b"\x1b[0m", b"<lora:a:1>", b": ", b"Steps: ",
)  # fmt: skip


class Hang(BaseException):
    """A case took too long. Not an Exception, so that no reader catches it."""


class Refused(Exception):
    """The library behind a reader rejected the file, and the reader's caller handles that."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How to read one kind of file, which errors it may raise, and valid seed files.

    `finish` is applied to each file once it is written. `one_of`: of so many cases one is run, where reading is slow."""

    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    refusals: Callable[[], tuple[type[BaseException], ...]]
    inside: Callable[[bytes, random.Random], bytes] | None = None
    finish: Callable[[Path], None] | None = None
    one_of: int = 1


@dataclass
class Outcome:
    """Results of a reader's cases. `failures` are (case, error)."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest_ms: float = 0.0
    growth_mib: float = 0.0


# mutations


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Apply a few random changes to the bytes."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[place % len(data)] = chance.randrange(256)
        elif kind == 2:
            data[place:place] = chance.choice(_HOSTILE)
        elif kind == 3:
            del data[place : place + chance.choice((1, 2, 8, 64))]
        elif kind == 4:
            hostile = chance.choice(_HOSTILE)
            data[place : place + len(hostile)] = hostile
        elif kind == 5:
            start = chance.randrange(len(data) + 1)
            data[place:place] = data[start : start + chance.choice((1, 4, 16, 100))]
        else:
            del data[place:]
    return bytes(data)


def _inside_safetensors(content: bytes, chance: random.Random) -> bytes:
    header_bytes = int.from_bytes(content[:8], "little")
    header = mutate(content[8 : 8 + header_bytes], chance)
    return len(header).to_bytes(8, "little") + header + content[8 + header_bytes :]


def _inside_zip(content: bytes, chance: random.Random) -> bytes:
    if not content.startswith(b"PK"):
        return mutate(content, chance)
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(written, "w") as target:
        victim = chance.choice(["data.pkl"] * 8 + ["version", "byteorder", "/data/0"])
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, mutate(data, chance) if entry.filename.endswith(victim) else data)
    return written.getvalue()


def _inside_png(content: bytes, chance: random.Random) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        chunks = PngImagePlugin.PngInfo()
        for key, text in image.text.items():  # type: ignore[attr-defined]  # PNG images have it
            changed = mutate(text.encode("latin-1", "replace"), chance).decode("latin-1").replace("\0", "")
            (chunks.add_itxt if chance.random() < 0.5 else chunks.add_text)(key, changed)
        written = io.BytesIO()
        image.save(written, "PNG", pnginfo=chunks)
    return written.getvalue()


# seeds


def _tensor_seeds() -> list[bytes]:
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(5, dtype=torch.float16), "none": torch.empty(0, 3)}
    return [save_safetensors(tensors, {"modelspec.resolution": "512x512", "ss_tag_frequency": '{"a": {"b": 1}}'})]


def _gguf_seeds() -> list[bytes]:
    """A denoiser, and text encoders with tokenizers."""
    return [_gguf_seed("flux"), _gguf_seed("qwen3", "gpt2"), _gguf_seed("gemma2", "llama")]


def _gguf_seed(architecture: str, tokenizer: str = "") -> bytes:
    import gguf  # only for these seeds

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_array("comfy.gguf.orig_shape.conv", [2, 4, 8])
        writer.add_string("general.name", "one")
        if tokenizer:
            letters = [chr(97 + number) for number in range(26)]
            writer.add_tokenizer_model(tokenizer)
            writer.add_token_list([*letters, "ab"])
            writer.add_token_types([1] * 26 + [4])
            writer.add_token_scores([-float(number) for number in range(27)])
            writer.add_token_merges(["a b", *(f"{letter} b" for letter in letters[1:])])
        numbers = torch.arange(128.0).reshape(2, 64).numpy()
        for name, kind in (("a.weight", gguf.GGMLQuantizationType.Q8_0), ("conv", gguf.GGMLQuantizationType.Q4_0)):
            writer.add_tensor(name, gguf.quants.quantize(numbers[: 2 if name == "a.weight" else 1], kind), raw_dtype=kind)
        writer.add_tensor("b.bias", numbers[0, :5])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _low_bit_seeds() -> list[bytes]:
    """fp8 and int8 with scales, NF4 with and without double quantization, and comfy-kitchen's formats."""

    def text(value: Any) -> torch.Tensor:
        return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)

    scaled = {
        "a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(4, 1), "a.comfy_quant": text({"format": "float8_e4m3fn"}),
        "b.weight": torch.ones(4, 8).to(torch.float8_e5m2), "b.scale_weight": torch.ones(()), "scaled_fp8": torch.zeros(2).to(torch.float8_e5m2),
        "c.weight": torch.ones(4, 8, dtype=torch.int8), "c.SCB": torch.ones(4),
    }  # fmt: skip
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 64]}
    four = {"a.weight": torch.ones(128, 1, dtype=torch.uint8), "a.weight.quant_map": torch.ones(16)}
    plain = {**four, "a.weight.absmax": torch.ones(4), "a.weight.quant_state.bitsandbytes__nf4": text(state)}
    nested = {
        **four, "a.weight.absmax": torch.ones(4, dtype=torch.uint8), "a.weight.nested_absmax": torch.ones(1),
        "a.weight.nested_quant_map": torch.ones(256),
        "a.weight.quant_state.bitsandbytes__nf4": text({**state, "nested_blocksize": 256, "nested_offset": 0.1}),
    }  # fmt: skip
    del plain["a.weight.quant_map"], nested["a.weight.quant_map"]
    rotated = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    kitchen = {
        "a.weight": torch.ones(4, 16, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1), "a.comfy_quant": text(rotated),
        "b.weight": torch.ones(4, 32).to(torch.float8_e4m3fn), "b.weight_scale": torch.ones(128, 4, dtype=torch.uint8),
        "b.comfy_quant": text({"format": "mxfp8"}), "c.weight": torch.ones(4, 8, dtype=torch.uint8),
        "c.weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn), "c.weight_scale_2": torch.ones(()), "c.comfy_quant": text({"format": "nvfp4"}),
    }  # fmt: skip
    return [save_safetensors(tensors) for tensors in (scaled, plain, nested, kitchen)]


def _pickle_seeds(*, is_zip: bool) -> list[bytes]:
    contents: list[Any] = [{"state_dict": {"a": torch.ones(3, 4), "b": torch.ones(2).half()}, "epoch": 3}, {"a": {"b": torch.ones(2)}}, torch.ones(2)]
    seeds = []
    for content in contents:
        written = io.BytesIO()
        torch.save(content, written, _use_new_zipfile_serialization=is_zip)
        seeds.append(written.getvalue())
    return seeds


def _lora_seeds() -> list[bytes]:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    pair = {f"{layer}.lora_up.weight": torch.ones(4, 2), f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.alpha": torch.tensor(2.0)}
    dora = {**pair, f"{layer}.dora_scale": torch.ones(4, 1)}
    facts = {"lora_adapter_metadata": '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"x": 2}}'}
    peft = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 4),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(4, 2),
    }
    return [save_safetensors(dora, {"ss_base_model_version": "sd_v1"}), save_safetensors(peft, facts)]


def _embedding_seeds() -> list[bytes]:
    seeds = []
    for is_zip in (True, False):
        written = io.BytesIO()
        torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": "cat", "step": 3}, written, _use_new_zipfile_serialization=is_zip)
        seeds.append(written.getvalue())
    return seeds


def _png(chunks: dict[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    written = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 10, 10, 255)).save(written, "PNG", pnginfo=info)
    return written.getvalue()


def _png_seeds() -> list[bytes]:
    graph = {
        "3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 2, "positive": ["4", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "cat"}},
    }
    novelai = {"Software": "NovelAI", "Description": "cat", "Comment": '{"steps": 28, "sampler": "k_euler", "seed": 1, "uc": "dog"}'}
    return [
        _png({"parameters": 'a cat, (b:1.2)\nNegative prompt: dog\nSteps: 20, Sampler: Euler, Size: 64x64, Lora hashes: "a: 12"'}),
        _png({"prompt": json.dumps(graph)}),
        _png(novelai),
    ]


def _picture_embedding_seeds() -> list[bytes]:
    import base64

    data = {"string_to_param": {"*": {"TORCHTENSOR": [[0.5] * 8] * 2}}, "name": "cat", "step": 1}
    return [_png({"sd-ti-embedding": base64.b64encode(json.dumps(data).encode()).decode()})]


def _json_seeds() -> list[bytes]:
    return [json.dumps({"a": [1, 2.5, None, True], "b": {"c": "d\u00e9"}, "activation text": "cat", "preferred weight": 0.5}).encode()]


def _style_seeds() -> list[bytes]:
    return [
        b'name,prompt,negative_prompt\r\nfox,"a fox, red","blurry, dark"\r\n# note,,\r\nowl,"{prompt}, owl",\r\n',
        b"\xef\xbb\xbfname,prompt\ncat,a cat\n",
    ]


def _sentencepiece_seeds() -> list[bytes]:
    """Three pieces with scores, and a normalization."""
    texts = [b"\x0a" + bytes([len(text)]) + text for text in (b"a", b"bc", b"\xe2\x96\x81")]
    pieces = [text + b"\x15\0\0\x80\xbf" for text in texts]
    return [b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in pieces) + b"\x1a\x06\x12\x04\x01\x02\x03\x04"]


# readers


def _read_tensors(path: Path) -> None:
    from backend.checkpoint_file import open_tensor_file
    from backend.gguf_tokenizer import read_gguf_tokenizer

    with open_tensor_file(path) as file:
        for key in file.infos:
            file.read(key)
        for model in ("gpt2", "llama", "t5"):
            read_gguf_tokenizer(file, model=model, num_rows=2**20)


def _read_checkpoint(path: Path) -> None:
    from modules.checkpoints.listing import read_safetensors_metadata

    json.dumps(read_safetensors_metadata(path), allow_nan=False, ensure_ascii=False).encode()
    _read_tensors(path)


def _read_lora(path: Path) -> None:
    from backend.patcher.lora_files import load_lora, read_lora_file

    file = read_lora_file(path)
    load_lora(file.layers, {})
    str(file.family)


def _read_embedding(path: Path) -> None:
    from backend.text_processing.embedding_files import read_embedding

    read_embedding(path)


def _read_picture(path: Path) -> None:
    from modules.infotext.text import parse_infotext
    from modules.pictures.metadata import read_info_from_image

    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused from error
    with image:
        text, _ = read_info_from_image(image)
    parse_infotext(text or "")


def _read_json(path: Path) -> None:
    from backend.foreign_json import read_json_file

    json.dumps(read_json_file(path), allow_nan=False, ensure_ascii=False).encode()


def _read_description(path: Path) -> None:
    from modules.checkpoints.cache import FileCache
    from modules.prompts.extra_networks import get_user_metadata

    get_user_metadata(path.with_suffix(".safetensors"))
    FileCache(path.parent).peek(path.stem, "a", path)


def _read_styles(path: Path) -> None:
    from modules.prompts.styles import read_styles

    read_styles(path)


def _read_sentencepiece(path: Path) -> None:
    from backend.text_processing.sentencepiece_file import read_sentencepiece

    read_sentencepiece(path.read_bytes())


def _sentencepiece_errors() -> tuple[type[BaseException], ...]:
    from backend.text_processing.sentencepiece_file import SentencePieceError

    return (SentencePieceError,)


def _checkpoint_errors() -> tuple[type[BaseException], ...]:
    from backend.checkpoint_file import CheckpointError

    return (CheckpointError,)


def _lora_errors() -> tuple[type[BaseException], ...]:
    from backend.patcher.lora_files import LoraError

    return (LoraError,)


def _embedding_errors() -> tuple[type[BaseException], ...]:
    from backend.text_processing.embedding import EmbeddingError

    return (EmbeddingError,)


def _json_errors() -> tuple[type[BaseException], ...]:
    from backend.foreign_json import ForeignJsonError

    return (ForeignJsonError,)


def _request_errors() -> tuple[type[BaseException], ...]:
    from modules.errors import RequestError

    return (RequestError, Refused)


def _no_errors() -> tuple[type[BaseException], ...]:
    return ()


def _network_reader(seeds: Callable[[], list[bytes]], read: Callable[[Path], object], *, one_of: int) -> Reader:
    inside, finish = network_files.change_networks, network_files.stretch
    return Reader(suffix=".safetensors", seeds=seeds, read=read, refusals=_checkpoint_errors, inside=inside, finish=finish, one_of=one_of)


READERS: dict[str, Reader] = {
    "safetensors": Reader(suffix=".safetensors", seeds=_tensor_seeds, read=_read_checkpoint, refusals=_checkpoint_errors, inside=_inside_safetensors),
    "GGUF": Reader(suffix=".gguf", seeds=_gguf_seeds, read=_read_tensors, refusals=_checkpoint_errors),
    "low bits": Reader(suffix=".safetensors", seeds=_low_bit_seeds, read=_read_tensors, refusals=_checkpoint_errors, inside=_inside_safetensors),
    "pickle in a zip": Reader(
        suffix=".ckpt", seeds=lambda: _pickle_seeds(is_zip=True), read=_read_tensors, refusals=_checkpoint_errors, inside=_inside_zip
    ),
    "pickle before zips": Reader(suffix=".pt", seeds=lambda: _pickle_seeds(is_zip=False), read=_read_tensors, refusals=_checkpoint_errors),
    "LoRA": Reader(suffix=".safetensors", seeds=_lora_seeds, read=_read_lora, refusals=_lora_errors, inside=_inside_safetensors),
    "embedding": Reader(suffix=".pt", seeds=_embedding_seeds, read=_read_embedding, refusals=_embedding_errors, inside=_inside_zip),
    "embedding in a picture": Reader(
        suffix=".png", seeds=_picture_embedding_seeds, read=_read_embedding, refusals=_embedding_errors, inside=_inside_png
    ),
    "text of a PNG": Reader(suffix=".png", seeds=_png_seeds, read=_read_picture, refusals=_request_errors, inside=_inside_png),
    "JSON": Reader(suffix=".json", seeds=_json_seeds, read=_read_json, refusals=_json_errors),
    "description and cache": Reader(suffix=".json", seeds=_json_seeds, read=_read_description, refusals=_no_errors),
    "styles": Reader(suffix=".csv", seeds=_style_seeds, read=_read_styles, refusals=_request_errors),
    "checkpoint's networks": _network_reader(network_files.checkpoint_seeds, network_files.read_checkpoint, one_of=20),
    "VAE and text encoder": _network_reader(network_files.module_seeds, network_files.read_module, one_of=10),
    "ControlNet and others": _network_reader(network_files.control_seeds, network_files.read_control, one_of=10),
    "SentencePiece": Reader(suffix=".model", seeds=_sentencepiece_seeds, read=_read_sentencepiece, refusals=_sentencepiece_errors),
}


# running


@contextlib.contextmanager
def within(limit_s: float, *, isolated: bool) -> Iterator[None]:
    """Abort what takes too long: with Hang while Python code runs, else, if `isolated`, by ending the process when a library never returns."""

    def stop(*_: object) -> None:
        raise Hang(f"broken off after {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    if isolated:
        faulthandler.dump_traceback_later(2 * limit_s, exit=True)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isolated:
            faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def run_reader(reader: Reader, folder: Path, *, cases: int, seed: int, limit_s: float = MAX_CASE_S, isolated: bool = False) -> Outcome:
    """Read `cases` mutated files. Each is stored in `folder` while it is read, so that one that kills the process is still there."""
    outcome, refusals, seeds = Outcome(), reader.refusals(), reader.seeds()
    path = folder / f"case{reader.suffix}"
    before_mib = _peak_mib()
    for case in range(0, cases, reader.one_of):
        chance = random.Random(f"{seed} {case}")
        source = chance.choice(seeds)
        change = reader.inside if reader.inside is not None and chance.random() < 0.7 else mutate
        path.write_bytes(change(source, chance))
        if reader.finish is not None:
            reader.finish(path)
        with within(limit_s, isolated=isolated):
            _read_case(reader, refusals, path, case, outcome)
    outcome.growth_mib = _peak_mib() - before_mib
    return outcome


def _read_case(reader: Reader, refusals: tuple[type[BaseException], ...], path: Path, case: int, outcome: Outcome) -> None:
    started = time.perf_counter()
    outcome.cases += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Pillow and torch about malformed files
            reader.read(path)
        outcome.read += 1
    except refusals:
        outcome.refused += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.failures.append((case, f"{type(error).__name__}: {str(error)[:120]}"))
    outcome.slowest_ms = max(outcome.slowest_ms, (time.perf_counter() - started) * 1000)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_in_process(name: str, *, cases: int, seed: int, folder: Path) -> Outcome | str:
    """The outcome of a reader in a separate process, or how that process ended."""
    command = [sys.executable, "-m", "tools.campaign.file_fuzz", "--reader", name, "--cases", str(cases), "--seed", str(seed), "--keep", str(folder)]
    done = subprocess.run(command, cwd=ROOT_DIR, capture_output=True, text=True, check=False)
    try:
        return Outcome(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        said = done.stderr.strip()
        return f"ended with {done.returncode}: {said[:300] if said.startswith('Timeout') else said[-300:]}"


def report_lines(outcomes: dict[str, Outcome | str], *, cases: int, seed: int) -> list[str]:
    """The report as Markdown lines."""
    lines = [
        "# Mutated files for every reader",
        "",
        f"`python -m tools.campaign.file_fuzz --cases {cases} --seed {seed}`, Python {sys.version.split()[0]}, torch {torch.__version__}, CPU.",
        "Each case is a small valid file with one to six random changes, in its bytes or inside its container. A case passes if the file is read",
        f"or rejected with one of our errors, within {MAX_CASE_S:g} s and {MAX_GROWTH_MIB} MiB. Every reader runs in its own process.",
        "This program reads no YAML.",
        "",
        "| reader | cases | read | refused | anything else | slowest ms | peak memory grew by MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in outcomes.items():
        if isinstance(one, str):
            lines.append(f"| {name} | | | | {one} | | |")
            continue
        lines.append(f"| {name} | {one.cases} | {one.read} | {one.refused} | {len(one.failures)} | {one.slowest_ms:.0f} | {one.growth_mib:.0f} |")
    failures = [f"- {name}, case {case}: `{what}`" for name, one in outcomes.items() if isinstance(one, Outcome) for case, what in one.failures[:10]]
    return [*lines, "", *(["## Failures", "", *failures] if failures else ["No failures."]), ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign, or with --reader a single reader, printing its outcome as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=sorted(READERS))
    parser.add_argument("--keep", type=Path, help="folder for the file being read; default: a temporary folder")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.reader:
            print(json.dumps(asdict(run_reader(READERS[chosen.reader], folder, cases=chosen.cases, seed=chosen.seed, isolated=True))))
            return 0
        outcomes = {
            name: run_in_process(name, cases=chosen.cases, seed=chosen.seed, folder=folder / f"{index}") for index, name in enumerate(READERS)
        }
    REPORT.write_text("\n".join(report_lines(outcomes, cases=chosen.cases, seed=chosen.seed)), encoding="utf-8")
    return 0 if all(isinstance(one, Outcome) and not one.failures and one.growth_mib < MAX_GROWTH_MIB for one in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
