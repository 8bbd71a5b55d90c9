"""The LoRA extension: files found by name change the picture and leave no trace, on one CPU and on virtual GPUs; routes, settings, names."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.memory import current
from backend.patcher.weight_patches import unpatched_tensors
from backend.storage.kinds import storage_of
from modules.application import Application
from modules.checkpoints.hashes import HashStore
from modules.errors import OptionError
from modules.infotext.parameters import parse_generation_parameters
from modules.processing import Processed
from modules.prompts.extra_networks import ExtraNetworkParams, extra_network_registry
from modules.scripts import callbacks
from tests.support.applications import installed_application
from tests.support.extensions import builtin_module, loaded_builtin
from tests.support.loras import write_lora
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

MIB = 2**20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder = tmp_path_factory.mktemp("lora")
    with narrow_application(folder, is_shallow=True) as (app, models):
        loras = folder / "models" / "Lora"
        write_lora(loras / "style.safetensors", models["sd15"], metadata={"ss_output_name": "My style"})
        write_lora(loras / "sub" / "text.safetensors", models["sd15"], unet=False)
        write_lora(loras / "drawing.safetensors", models["sd15"], te=False)
        save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}, loras / "foreign.safetensors")
        (loras / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{" + b" " * 50)
        with loaded_builtin(app, "sd_forge_lora"):
            yield app
    current.forget()


def files() -> Any:
    """The registry of the extension."""
    return builtin_module("networks").registry()


def picture(result: Processed) -> np.ndarray:
    return pixels(result.images[result.index_of_first_image])


def make(prompt: str = "a red cat", **fields: Any) -> np.ndarray:
    return picture(run(txt2img(prompt=prompt, **fields)))


def weights(app: Application) -> dict[str, Tensor]:
    engine = app.models.ensure_loaded()
    models = {"unet": engine.forge_objects.unet.model, "clip": engine.forge_objects.clip.cond_stage_model}
    return {f"{name}.{key}": tensor.to("cpu").clone() for name, model in models.items() for key, tensor in model.state_dict().items()}


def use_devices(app: Application, **flags: Any) -> None:
    app.models.unload()
    config = BackendConfig(**flags)
    memory_management.configure(config, probe_devices(config))


VIRTUAL = {"virtual_gpus_bytes": (256 * MIB,)}


CASES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "virtual": VIRTUAL,
    "streamed": {**VIRTUAL, "vram_mode": "no"},
    "two": {"virtual_gpus_bytes": (256 * MIB, 256 * MIB)},
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_a_lora_changes_the_picture_and_leaves_without_a_trace(app: Application, flags: dict[str, Any]) -> None:
    use_devices(app, **flags)
    before, at_first = make(), weights(app)
    both, again = make("a red cat<lora:style:0.8>"), make("a red cat <lora:style:0.8>")
    assert not np.array_equal(before, both) and np.array_equal(both, again)
    half = make("a red cat<lora:style:0.4>")
    assert not np.array_equal(half, both) and not np.array_equal(half, before)
    assert np.array_equal(make("a red cat<lora:style:0.8>"), both)  # starts from the original, not from the previous state
    assert np.array_equal(make(), before)
    now = weights(app)
    assert [name for name in at_first if not torch.equal(at_first[name], now[name])] == []


def test_the_same_picture_on_every_device(app: Application) -> None:
    pictures = []
    for flags in CASES.values():
        use_devices(app, **flags)
        pictures.append(make("a red cat<lora:style:0.8>"))
    assert all(np.array_equal(pictures[0], one) for one in pictures[1:])


def test_text_encoders_and_unet_have_multipliers_of_their_own(app: Application) -> None:
    plain, both = make(), make("a red cat<lora:style:0.8>")
    assert np.array_equal(make("a red cat<lora:style:0>"), plain)
    text, unet = make("a red cat<lora:style:0.8:0>"), make("a red cat<lora:style:0:0.8>")
    assert len({array.tobytes() for array in (plain, both, text, unet)}) == 4
    assert np.array_equal(make("a red cat<lora:style:te=0.8:unet=0>"), text)
    assert np.array_equal(make("a red cat<lora:drawing:0:0.8>"), make("a red cat<lora:drawing:0.8>"))
    assert not np.array_equal(make("a red cat<lora:text:0.8>"), plain)


def test_several_loras_add_up_in_any_order(app: Application) -> None:
    one = make("a red cat<lora:style:0.5><lora:drawing:0.5>")
    two = make("a red cat<lora:drawing:0.5><lora:style:0.5>")
    assert np.abs(one - two).max() <= 1
    assert np.abs(one - make("a red cat<lora:style:0.5>")).max() > 1


@pytest.mark.parametrize("name", ["style", "My style", "my STYLE", "STYLE"])
def test_names_that_mean_a_file(app: Application, name: str) -> None:
    result = run(txt2img(prompt=f"a red cat<lora:{name}:0.8>"))
    assert np.array_equal(picture(result), make("a red cat<lora:style:0.8>"))
    assert f'Lora hashes: "{name}: {files().find("style").shorthash}"' in result.infotexts[0]
    assert len(files().find("style").shorthash) == 12


def test_the_old_kind_means_the_same(app: Application) -> None:
    assert np.array_equal(make("a red cat<lyco:style:0.8>"), make("a red cat<lora:style:0.8>"))


def test_an_embedding_that_came_with_a_file_counts_while_the_file_is_used(app: Application) -> None:
    folder = app.config.lora_dirs[0]
    width = next(iter(app.models.ensure_loaded().embeddings.widths.values()))
    pair = load_file(folder / "style.safetensors")
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(5))
    unfit = torch.ones(1, width + 1)
    save_file({**pair, "bundle_emb.my.word.string_to_param.*": vectors, "bundle_emb.unfit.string_to_param.*": unfit}, folder / "bundled.safetensors")
    plain = make("my.word cat<lora:style:1>")
    result = run(txt2img(prompt="my.word cat<lora:bundled:1>"))
    assert not np.array_equal(picture(result), plain)
    assert "embedding unfit" in result.comments
    assert np.array_equal(make("a cat<lora:bundled:1>"), make("a cat<lora:style:1>"))
    assert np.array_equal(make("my.word cat<lora:style:1>"), plain)
    (folder / "bundled.safetensors").unlink()


def test_an_unknown_name_is_said_and_the_picture_is_made(app: Application) -> None:
    result = run(txt2img(prompt="a red cat<lora:gone:1><lora:away:1>"))
    assert "Networks not found: gone, away" in result.comments


def test_a_misspelt_name_is_told_the_nearest(app: Application) -> None:
    result = run(txt2img(prompt="a red cat<lora:sub\\stlye:1>"))
    assert "Networks not found: sub\\stlye; for 'sub\\\\stlye', nearest are 'style'" in result.comments
    assert np.array_equal(picture(result), make())
    assert "Lora hashes" not in result.infotexts[0]


@pytest.mark.parametrize(("name", "words"), [("foreign", "does not fit SD 1.x"), ("foreign", "made for Flux"), ("broken", "broken.safetensors")])
def test_a_file_that_cannot_be_used_is_said_and_the_others_are_used(app: Application, name: str, words: str) -> None:
    result = run(txt2img(prompt=f"a red cat<lora:{name}:1><lora:style:0.8>"))
    assert words in result.comments
    assert np.array_equal(picture(result), make("a red cat<lora:style:0.8>"))


def test_every_batch_may_name_others_and_the_infotext_says_which(app: Application) -> None:
    result = run(txt2img(prompt=["a red cat<lora:style:0.8>", "a red cat"], seed=[1, 1], n_iter=2))
    first, second = (pixels(image) for image in result.images[result.index_of_first_image :])
    assert np.array_equal(first, make("a red cat<lora:style:0.8>")) and np.array_equal(second, make())
    infotexts = result.infotexts[result.index_of_first_image :]
    assert ["Lora hashes" in text for text in infotexts] == [True, False]


def test_the_second_pass_may_have_its_own(app: Application) -> None:
    hires = {"enable_hr": True, "hr_scale": 2.0, "hr_upscaler": "Latent", "denoising_strength": 0.7, "hr_second_pass_steps": 2}
    plain = make(**hires)
    assert not np.array_equal(make(hr_prompt="a red cat<lora:style:0.8>", **hires), plain)
    assert np.array_equal(make(**hires), plain)


def test_settings(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    named = make("a red cat<lora:style:0.8>")
    monkeypatch.setitem(app.options.data, "sd_lora", "style")
    monkeypatch.setitem(app.options.data, "extra_networks_default_multiplier", 0.8)
    assert np.array_equal(make(), named)
    assert np.array_equal(make("a red cat<lora:style:0.8>"), named)
    monkeypatch.setitem(app.options.data, "lora_add_hashes_to_infotext", False)
    assert "Lora hashes" not in run(txt2img(prompt="a red cat<lora:style:0.8>")).infotexts[0]


def test_a_replaced_file_is_read_again(app: Application, tmp_path: Path) -> None:
    path = files().roots[0] / "replaced.safetensors"
    tensors = load_file(files().roots[0] / "drawing.safetensors")
    save_file(tensors, path)
    first = make("a red cat<lora:replaced:0.8>")
    save_file({key: tensor * 0.5 for key, tensor in tensors.items()}, path, metadata={"changed": "yes"})
    assert not np.array_equal(make("a red cat<lora:replaced:0.8>"), first)


def test_files_are_kept_as_the_setting_says(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    make("a red cat<lora:style:0.8>")
    make("a red cat<lora:drawing:0.8>")
    assert builtin_module("networks").patch_sets.names() == ["drawing"]
    monkeypatch.setitem(app.options.data, "lora_in_memory_limit", 1)
    make("a red cat<lora:style:0.8>")
    assert builtin_module("networks").patch_sets.names() == ["drawing", "style"]


def test_fp8_storage_merged_and_added_while_layers_run(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {}
    for choice in ("float8-e4m3fn", "float8-e4m3fn (fp16 LoRA)"):
        monkeypatch.setitem(app.options.data, "forge_unet_storage_dtype", choice)
        use_devices(app, **VIRTUAL)
        plain = make()
        pictures[choice] = make("a red cat<lora:style:0.8>")
        unet = app.models.ensure_loaded().forge_objects.unet
        assert unet.has_online_lora() is choice.endswith("(fp16 LoRA)")
        assert not np.array_equal(pictures[choice], plain) and np.array_equal(make(), plain)
    one, two = pictures.values()
    assert not np.array_equal(one, two)


def test_each_prompt_of_a_batch_has_its_own_strength(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over weights in four bits, where another strength rewrites nothing; and the client is told that the batch is made in parts."""
    monkeypatch.setitem(app.options.data, "forge_unet_storage_dtype", "bnb-nf4")
    use_devices(app, **VIRTUAL)
    prompts = ["a red cat<lora:style:0.8>", "a red cat<lora:style:0.8>", "a red cat<lora:style:0.3>", "a red cat"]
    job = txt2img(prompt=prompts, seed=[5, 5, 5, 5], batch_size=4)
    stored = weights(app)
    together = run(job)
    alone = [make(prompt, seed=5) for prompt in prompts]
    for found, wanted in zip(together.images[together.index_of_first_image :], alone, strict=True):
        assert np.array_equal(pixels(found), wanted)
    assert not np.array_equal(alone[1], alone[2]) and not np.array_equal(alone[2], alone[3])
    assert "pictures are made 1 at a time, not 4" in together.comments
    assert "<lora:style:0.3>" in together.infotexts[together.index_of_first_image + 2]
    now = weights(app)
    assert all(storage_of(now[key]).is_same(storage_of(tensor)) for key, tensor in stored.items())
    halves = run(txt2img(prompt=[prompts[0], prompts[0], prompts[3], prompts[3]], seed=[5, 6, 5, 6], batch_size=4))
    assert "pictures are made 2 at a time, not 4" in halves.comments and len(halves.images) - halves.index_of_first_image == 4


def test_a_saved_model_has_no_lora_in_it(app: Application, tmp_path: Path) -> None:
    make()
    engine = app.models.ensure_loaded()
    engine.save_checkpoint(tmp_path / "plain.safetensors")
    make("a red cat<lora:style:0.8>")
    patched = weights(app)
    engine.save_checkpoint(tmp_path / "with.safetensors")
    one, two = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "with.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)
    now = weights(app)
    assert all(torch.equal(patched[key], now[key]) for key in patched)
    assert unpatched_tensors(engine.forge_objects.unet.model).keys() == engine.forge_objects.unet.model.state_dict().keys()


def pasted(text: str) -> dict[str, Any]:
    params = parse_generation_parameters(text)
    callbacks.infotext_pasted_callback(text, params)
    return params


def test_names_that_are_not_there_cost_one_look_at_the_folders(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    plain = type(files()).refresh
    monkeypatch.setattr(type(files()), "refresh", lambda self: looks.append(1) or plain(self))
    shorthash = files().find("style").shorthash
    looks.clear()
    found = files().find_all(["style", *(f"gone {number}" for number in range(500))])
    assert (found[0].name, set(found[1:]), len(looks)) == ("style", {None}, 1)
    hashes = ", ".join(f"theirs {number}: {shorthash}" for number in range(500))
    text = f'a cat <lora:theirs 7:0.8>\nSteps: 3, Sampler: Euler, Seed: 1, Lora hashes: "{hashes}"'
    params: dict[str, Any] = parse_generation_parameters(text)
    callbacks.infotext_pasted_callback(text, params)
    assert params["Prompt"] == "a cat <lora:style:0.8>" and len(looks) == 2


def test_of_more_networks_than_a_model_takes_the_first_are_used_and_the_client_is_told(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.getmodule(type(extra_network_registry["lora"])), "MAX_MENTIONS", 2)
    first = " ".join(f"<lora:style:{number / 10}>" for number in (1, 2))
    result = run(txt2img(prompt=f"a cat {first} <lora:drawing:1> <lora:drawing:0.5>", steps=1))
    assert "names 4 networks; the first 2 are put on the model" in str(result.comments)
    assert np.array_equal(picture(result), picture(run(txt2img(prompt=f"a cat {first}", steps=1))))


def test_a_pasted_infotext_finds_a_file_that_has_another_name_here(app: Application) -> None:
    entry = files().find("style")
    assert entry is not None
    prompt = "a cat <lora:their style:0.8> <lora:their style 2:1> <lora:gone:1>"
    text = f'{prompt}\nSteps: 3, Sampler: Euler, Seed: 1, Lora hashes: "their style: {entry.shorthash}, gone: 123456789abc"'
    assert pasted(text)["Prompt"] == "a cat <lora:style:0.8> <lora:their style 2:1> <lora:gone:1>"
    kept = f'a cat <lora:drawing:0.8>\nSteps: 3, Sampler: Euler, Seed: 1, Lora hashes: "drawing: {entry.shorthash}"'
    assert pasted(kept)["Prompt"] == "a cat <lora:drawing:0.8>"


def test_the_hash_of_nothing_is_no_files(app: Application) -> None:
    """Trainers wrote it into files that they hashed wrongly, and a file without tensors has it."""
    nothing = hashlib.sha256().hexdigest()
    folder = files().roots[0]
    paths = [folder / f"{name}.safetensors" for name in ("whole", "short", "empty")]
    for path, written in zip(paths, (nothing, nothing[:12].upper())):
        save_file({"x": torch.ones(1)}, path, metadata={"sshs_model_hash": written})
    save_file({}, paths[-1])
    files().refresh()
    try:
        for asked in (nothing, nothing[:12], nothing[:8]):
            text = f'a <lora:theirs:1>\nSteps: 3, Sampler: Euler, Seed: 1, Lora hashes: "theirs: {asked}"'
            assert pasted(text)["Prompt"] == "a <lora:theirs:1>"
        assert nothing[:12] not in [files().find(path.stem).shorthash for path in paths]
    finally:
        for path in paths:
            path.unlink()
        files().refresh()


# what other extensions and clients use


def client_of(app: Application) -> TestClient:
    server = FastAPI()
    callbacks.app_started_callback(None, server)
    return TestClient(server)


def test_clients_are_told_which_files_there_are(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_of(app).get("/sdapi/v1/loras").status_code == 404  # no --api
    monkeypatch.setattr(app, "config", dataclasses.replace(app.config, api=True, api_auth=(("me", "secret"),)))
    client = client_of(app)
    assert client.get("/sdapi/v1/loras").status_code == 401
    client.auth = ("me", "secret")
    assert client.get("/sdapi/v1/loras").json()  # the first request scans the folders
    path = files().roots[0] / "people" / "late.safetensors"
    path.parent.mkdir()
    save_file({"x": torch.ones(1)}, path, metadata={"ss_output_name": "My cat", "ss_tag_frequency": '{"a": 1}'})
    assert "late" not in [entry["name"] for entry in client.get("/sdapi/v1/loras").json()]
    answer = client.post("/sdapi/v1/refresh-loras")
    assert (answer.status_code, answer.json()) == (200, None)
    expected = {"name": "late", "alias": "My cat", "path": str(path), "metadata": {"ss_output_name": "My cat", "ss_tag_frequency": {"a": 1}}}
    assert [entry for entry in client.get("/sdapi/v1/loras").json() if entry["name"] == "late"] == [expected]
    path.unlink()
    client.post("/sdapi/v1/refresh-loras")


def test_other_extensions_find_the_names_they_know(app: Application) -> None:
    networks, lora = builtin_module("networks"), builtin_module("lora")
    make("a red cat<lora:My style:0.8:0.4>")
    (used,) = lora.loaded_loras
    assert (used.name, used.mentioned_name, used.te_multiplier, used.unet_multiplier) == ("style", "My style", 0.8, 0.4)
    assert lora.loaded_loras is networks.loaded_networks and used.modules
    assert networks.available_networks["style"].alias == "My style" and lora.available_loras.keys() == networks.available_networks.keys()
    assert networks.available_network_aliases["My style"] is networks.available_networks["style"]
    assert used.network_on_disk.sd_version.name == "SD1" and used.network_on_disk.shorthash in networks.available_network_hash_lookup
    engine = app.models.ensure_loaded()
    networks.load_networks(["drawing", "gone"], [0.5, 1.0])
    assert [one.name for one in networks.loaded_networks] == ["drawing"] and engine.current_lora_hash != "[]"
    (identifier,) = engine.forge_objects.unet.lora_patches
    assert identifier[:2] == (used.network_on_disk.filename.replace("style", "drawing"), 0.5)
    tensors = networks.load_lora_state_dict(used.network_on_disk.filename)
    original = engine.forge_objects_original
    unet, clip = networks.load_lora_for_models(original.unet, original.clip, tensors, 0.5, 0.0)
    assert len(unet.lora_patches) == 1 and clip is original.clip and not original.unet.lora_patches
    assert np.array_equal(make(), make("a red cat<lora:style:0>"))


# prompts and files


@pytest.mark.parametrize(
    ("text", "te", "unet"),
    [
        ("x", 1.0, 1.0),
        ("x:0.5", 0.5, 0.5),
        ("x:0.5:0.2", 0.5, 0.2),
        ("x:te=0.3", 0.3, 0.3),
        ("x:0.5:unet=2", 0.5, 2.0),
        ("x:te=0.1:unet=-1", 0.1, -1.0),
        ("x::0.4", 1.0, 0.4),
        ("x: 0.5 ", 0.5, 0.5),
    ],
)
@pytest.mark.usefixtures("app")
def test_multipliers(text: str, te: float, unet: float) -> None:
    extra = builtin_module("extra_networks_lora")
    assert extra.parse_mention(ExtraNetworkParams(text.split(":"))) == extra.LoraMention(name="x", te_multiplier=te, unet_multiplier=unet)


@pytest.mark.parametrize("text", ["x:strong", "x:nan", "x:1:inf", "x:1:1:8", "x:dyn=8"])
@pytest.mark.usefixtures("app")
def test_what_has_no_effect_is_said(text: str) -> None:
    mention = builtin_module("extra_networks_lora").parse_mention(ExtraNetworkParams(text.split(":")))
    assert (mention.te_multiplier, mention.unet_multiplier, len(mention.notices)) == (1.0, 1.0, 1)


@pytest.mark.usefixtures("app")
def test_files_of_one_name_and_of_one_alias(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from modules.checkpoints.cache import FileCache

    for below, alias in (("a.safetensors", "same"), ("b.safetensors", "same"), ("deep/a.safetensors", "own"), ("c.pt", ""), ("d.txt", "")):
        path = tmp_path / "Lora" / below
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"x": torch.ones(1)}, path, metadata={"ss_output_name": alias, "sshs_model_hash": "f" * 64, "ssmd_cover_images": "[1]"})
        else:
            path.write_bytes(b"data")
    registry = builtin_module("networks").LoraRegistry([tmp_path / "Lora", tmp_path / "missing"], HashStore(FileCache(tmp_path / "cache")))
    assert sorted(entry.name for entry in registry) == sorted(registry.list_names()) == ["a", "b", "c"]
    assert "Two LoRA files are named a" in caplog.text
    found = {
        name: entry.path.relative_to(tmp_path / "Lora").as_posix() for name in ("a", "b", "deep/a", "own", "c") if (entry := registry.find(name))
    }
    assert found == {"a": "a.safetensors", "b": "b.safetensors", "deep/a": "deep/a.safetensors", "own": "deep/a.safetensors", "c": "c.pt"}
    assert registry.find("same") is None and registry.find("none") is None and registry.find("") is None
    entry = registry.find("a")
    assert entry is not None and entry.shorthash == "f" * 12 and "ssmd_cover_images" not in entry.metadata
    (tmp_path / "Lora" / "a.safetensors").unlink()
    later = registry.find("a")
    assert later is not None and later.path.parent.name == "deep"


# other applications come last: a process has one set of extensions


def test_frozen_settings_freeze_those_of_extensions_too(tmp_path: Path) -> None:
    with installed_application(tmp_path, freeze_settings=True) as frozen, loaded_builtin(frozen, "sd_forge_lora"):
        with pytest.raises(OptionError, match="frozen"):
            frozen.options.set("sd_lora", "style")
        with pytest.raises(OptionError, match="frozen"):
            frozen.save_options()


def test_without_the_extension_the_tag_is_named_as_unknown(tmp_path: Path) -> None:
    with narrow_application(tmp_path, is_shallow=True) as (plain, _), loaded_builtin(plain):
        result = run(txt2img(prompt="a red cat<lora:style:1>"))
        assert "extra network of kind <lora:...>, which is unknown" in result.comments
        assert "sd_lora" not in plain.options.data_labels
