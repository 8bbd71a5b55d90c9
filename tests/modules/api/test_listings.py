from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from backend.text_processing.embedding import Embedding
from modules.prompts.styles import PromptStyle
from tests.modules.api.conftest import Server, write_checkpoint_header


def names(items: list[dict[str, object]], key: str = "name") -> list[object]:
    return [item[key] for item in items]


def test_samplers_and_schedulers(server: Server) -> None:
    samplers = {item["name"]: item for item in server.get("/sdapi/v1/samplers")}
    assert {"Euler", "Euler a", "DPM++ 2M", "Heun", "DDIM", "UniPC", "LCM"} <= set(samplers)
    assert "k_euler_a" in samplers["Euler a"]["aliases"]
    assert all(isinstance(value, str) for value in samplers["DPM++ 2M"]["options"].values())
    schedulers = {item["name"]: item for item in server.get("/sdapi/v1/schedulers")}
    assert schedulers["karras"]["label"] == "Karras"
    assert schedulers["karras"]["default_rho"] == 7.0
    assert schedulers["automatic"]["label"] == "Automatic"


def test_upscalers_and_latent_modes(server: Server) -> None:
    assert names(server.get("/sdapi/v1/upscalers")) == ["None", "Lanczos", "Nearest"]
    modes = names(server.get("/sdapi/v1/latent-upscale-modes"))
    assert modes[0] == "Latent"
    assert "Latent (nearest-exact)" in modes


def test_checkpoints_appear_when_looked_for_again(server: Server, tmp_path: Path) -> None:
    [item] = server.get("/sdapi/v1/sd-models")
    assert item["model_name"] == "tiny"
    assert item["title"].startswith("tiny.safetensors")
    assert Path(item["filename"]).is_file()
    write_checkpoint_header(tmp_path / "models" / "Stable-diffusion" / "sub" / "other.safetensors")
    assert len(server.get("/sdapi/v1/sd-models")) == 1
    assert server.post("/sdapi/v1/refresh-checkpoints") is None
    assert names(server.get("/sdapi/v1/sd-models"), "model_name") == ["sub_other", "tiny"]


def test_vae_and_text_encoder_files(server: Server, tmp_path: Path) -> None:
    for folder, name in (("VAE", "kl.safetensors"), ("text_encoder", "clip.safetensors")):
        write_checkpoint_header(tmp_path / "models" / folder / name)
    assert server.get("/sdapi/v1/sd-modules") == []
    server.post("/sdapi/v1/refresh-vae")
    assert names(server.get("/sdapi/v1/sd-modules"), "model_name") == ["kl.safetensors", "clip.safetensors"]
    assert names(server.get("/sdapi/v1/sd-vae"), "model_name") == ["kl.safetensors"]


def test_styles(server: Server) -> None:
    server.app.styles.styles["Oil"] = PromptStyle("Oil", "{prompt}, oil", None)
    assert {"name": "Oil", "prompt": "{prompt}, oil", "negative_prompt": ""} in server.get("/sdapi/v1/prompt-styles")


class DatabaseOfTest:
    def __init__(self) -> None:
        self.word_embeddings = {"word": Embedding(name="word", vectors_by_encoder={"clip_l": torch.zeros(3, 768)}, step=500, sd_checkpoint="abc")}
        self.skipped_embeddings = {"xl": Embedding(name="xl", vectors_by_encoder={"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)})}
        self.reloads = 0

    def load_textual_inversion_embeddings(self, force_reload: bool = False) -> None:
        self.reloads += force_reload


def test_embeddings_of_the_loaded_model(server: Server) -> None:
    assert server.get("/sdapi/v1/embeddings") == {"loaded": {}, "skipped": {}}
    server.post("/sdapi/v1/refresh-embeddings")
    database = DatabaseOfTest()
    server.app.models.engine = SimpleNamespace(embeddings=database)  # type: ignore[assignment]
    answer = server.get("/sdapi/v1/embeddings")
    assert answer["loaded"]["word"] == {"step": 500, "sd_checkpoint": "abc", "sd_checkpoint_name": None, "shape": 768, "vectors": 3}
    assert answer["skipped"]["xl"]["vectors"] == 1
    server.post("/sdapi/v1/refresh-embeddings")
    assert database.reloads == 1


def test_what_there_is_none_of_is_an_empty_list(server: Server) -> None:
    for route in ("hypernetworks", "face-restorers", "realesrgan-models", "script-info", "extensions"):
        assert server.get(f"/sdapi/v1/{route}") == []
    assert server.get("/sdapi/v1/scripts") == {"txt2img": [], "img2img": []}


def test_an_extension_without_git_is_listed_with_empty_facts(server: Server, tmp_path: Path) -> None:
    from modules.scripts.installed import Extension

    for name in ("archive", "odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / ".git").write_text("gitdir: nowhere")
    found = [Extension(name, str(tmp_path / name)) for name in ("archive", "odd")]
    server.app.extensions = [*found, Extension("ours", str(tmp_path), is_builtin=True)]
    listed = server.get("/sdapi/v1/extensions")
    assert listed[0] == {"name": "archive", "remote": "", "branch": "", "commit_hash": "", "version": "", "commit_date": "", "enabled": True}
    assert [one["name"] for one in listed] == ["archive", "odd"]
