"""`python -m tools.bad_input`: sends bad files, flags and requests to a running product, and writes its answers to docs/bad_input.md."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "models" / "Stable-diffusion" / "demo-shapes-64.safetensors"
GOOD: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64}
FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("negative width", {"width": -64}),
    ("width 0", {"width": 0}),
    ("width 100000", {"width": 100_000}),
    ("width 67, not divisible by 8", {"width": 67}),
    ("width as text", {"width": "wide"}),
    ("8192 x 8192", {"width": 8192, "height": 8192}),
    ("a million steps", {"steps": 10**6}),
    ("0 steps", {"steps": 0}),
    ("2.5 steps", {"steps": 2.5}),
    ("CFG scale NaN", {"cfg_scale": float("nan")}),
    ("CFG scale infinite", {"cfg_scale": float("inf")}),
    ("negative CFG scale", {"cfg_scale": -1}),
    ("batch of a million", {"batch_size": 10**6}),
    ("batch of 0", {"batch_size": 0}),
    ("a billion batches", {"n_iter": 10**9}),
    ("unknown sampler", {"sampler_name": "Eulr a"}),
    ("unknown schedule", {"scheduler": "Karas"}),
    ("seed as text", {"seed": "random"}),
    ("prompt as a number", {"prompt": 7}),
    ("prompt as a list", {"prompt": ["a", "b"]}),
    ("unknown setting", {"override_settings": {"no_such_setting": 1}}),
    ("unknown checkpoint", {"override_settings": {"sd_model_checkpoint": "nowhere"}}),
    ("setting of the wrong type", {"override_settings": {"CLIP_stop_at_last_layers": "last"}}),
    ("unknown script", {"script_name": "no such script"}),
    ("unknown always-on script", {"alwayson_scripts": {"no such script": {"args": []}}}),
    ("unknown upscaler for hires fix", {"enable_hr": True, "hr_upscaler": "Magic"}),
]
INIT_IMAGES: list[tuple[str, dict[str, Any]]] = [
    ("no init image", {}),
    ("empty list of init images", {"init_images": []}),
    ("init image that is no base64", {"init_images": ["!!!"]}),
    ("init image that is text", {"init_images": [base64.b64encode(b"hello").decode()]}),
    ("init image of the server's own network", {"init_images": ["http://127.0.0.1:22/a.png"]}),
    ("denoising strength 2", {"init_images": ["!!!"], "denoising_strength": 2}),
    ("resize mode 9", {"init_images": ["!!!"], "resize_mode": 9}),
]
FLAGS: list[tuple[str, list[str]]] = [
    ("misspelt flag", ["--lisen"]),
    ("the same device twice", ["--device-id", "0,0"]),
    ("a GPU that is not there", ["--device-id", "7"]),
    ("no number of a device", ["--device-id", "one"]),
    ("virtual GPU of no size", ["--virtual-gpus", "0GB"]),
    ("port 99999", ["--port", "99999"]),
    ("two precisions", ["--all-in-fp16", "--all-in-fp32"]),
    ("a checkpoint that is not there", ["--ckpt", "nowhere.safetensors"]),
]


def send(url: str, body: Any = None) -> tuple[int, str]:
    """Status and first sentence of an answer."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            parsed = json.loads(answer.read())
            size = parsed.get("parameters", {}) if isinstance(parsed, dict) else {}
            return answer.status, f"a picture of {size.get('width')}x{size.get('height')}" if size else "done"
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        try:
            parsed = json.loads(text)
        except ValueError:
            return error.code, text
        return error.code, str(parsed.get("detail") or parsed.get("error"))


@contextmanager
def serve(data_dir: Path, *flags: str) -> Iterator[str]:
    """A separate product on a free port, API only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "launch.py", "--skip-install", "--nowebui", "--port", str(port), "--data-dir", str(data_dir), *flags]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/internal/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def write_bad_files(folder: Path) -> dict[str, str]:
    """File name -> what is wrong with the file."""
    import torch  # heavy
    from safetensors.torch import save_file

    whole = DEMO.read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html><body>404: not found</body></html>" * 40)
    (folder / "text.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8)}, folder / "lora.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(512, 4, 3, 3), "encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}, folder / "vae.safetensors")
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(8)}, folder / "flux.safetensors")
    save_file({"anything": torch.zeros(1)}, folder / "unknown.safetensors")
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": _Hostile()}}, folder / "hostile.ckpt")
    return {
        "truncated.safetensors": "half of a download",
        "empty.safetensors": "empty file",
        "page.safetensors": "a web page saved as a checkpoint",
        "text.ckpt": "a git-lfs pointer",
        "lora.safetensors": "a LoRA in the checkpoint folder",
        "vae.safetensors": "a VAE in the checkpoint folder",
        "flux.safetensors": "a Flux model",
        "unknown.safetensors": "no known model",
        "hostile.ckpt": "a pickle that would run a command",
    }


class _Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 1",)


def start_with(flags: list[str], data_dir: Path) -> str:
    """The console output; a product that starts anyway is stopped."""
    command = [sys.executable, "launch.py", "--skip-install", "--nowebui", "--port", "7899", "--data-dir", str(data_dir), *flags]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=60)
        outcome = f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        process.terminate()
        said, _ = process.communicate(timeout=60)
        outcome = "starts"
    lines = [line for line in said.splitlines() if line.strip() and "nothing to install" not in line and "--skip-install: packages" not in line]
    return f"{outcome}: {' '.join(lines)}"


def ask_everything() -> list[tuple[str, str, str]]:
    """(kind, input, answer)."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        data_dir = Path(name)
        folder = data_dir / "models" / "Stable-diffusion"
        folder.mkdir(parents=True)
        with serve(data_dir) as url:
            rows.append(("file", "no checkpoint of the user's (the demo model is shown)", "{} {}".format(*send(f"{url}/sdapi/v1/txt2img", GOOD))))
            shutil.copy(DEMO, folder)
            rows.append(("file", "... and one put there, no restart", "{} {}".format(*send(f"{url}/sdapi/v1/txt2img", GOOD))))
            bad_files = write_bad_files(folder)
            send(f"{url}/sdapi/v1/refresh-checkpoints", b"")
            for file_name, what in bad_files.items():
                body = GOOD | {"override_settings": {"sd_model_checkpoint": file_name}}
                rows.append(("file", what, "{} {}".format(*send(f"{url}/sdapi/v1/txt2img", body))))
            rows.append(("file", "... and the model before is still served", "{} {}".format(*send(f"{url}/sdapi/v1/txt2img", GOOD))))
            rows += [("txt2img", what, "{} {}".format(*send(f"{url}/sdapi/v1/txt2img", GOOD | fields))) for what, fields in FIELDS]
            rows.append(("txt2img", "a body that is no JSON", "{} {}".format(*send(f"{url}/sdapi/v1/txt2img", b"{prompt:"))))
            rows += [("img2img", what, "{} {}".format(*send(f"{url}/sdapi/v1/img2img", GOOD | fields))) for what, fields in INIT_IMAGES]
        rows += [("flag", f"{what}: `{' '.join(flags)}`", start_with(flags, data_dir)) for what, flags in FLAGS]
        return [(kind, what, answer.replace(name, "DATA").replace(str(REPOSITORY), ".")) for kind, what, answer in rows]


def main() -> None:
    rows = ask_everything()
    lines = ["# What bad input gets", "", "Written by `python -m tools.bad_input` from a running server: status (or exit code) and answer.", ""]
    lines += ["| where | what was given | answer |", "|---|---|---|"]
    lines += [f"| {kind} | {what} | {' '.join(answer.split()).replace('|', '/')} |" for kind, what, answer in rows]
    (REPOSITORY / "docs" / "bad_input.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    faults = [row for row in rows if row[2].startswith("5") or "Traceback" in row[2]]
    sys.exit(f"{len(faults)} answers blame the server: {faults}" if faults else 0)


if __name__ == "__main__":
    main()
