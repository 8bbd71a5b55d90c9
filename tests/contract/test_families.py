"""An unknown family in a separate folder makes pictures with the whole product: on one slot, on two as replicas and as layers, with a LoRA,
without a change to any other file. References: one slot for two, and a checkpoint with the LoRA merged into its weights for the LoRA.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.families import registry
from backend.families.family import Family
from backend.families.key_map import KeyMap, Rows, cut_rows
from backend.families.latent_format import LatentFormat
from backend.loader import load_checkpoint
from backend.modules.k_model import KModel
from backend.modules.k_prediction import shift_time
from backend.nn.network_call import NetworkCall
from backend.parallel.planning.preview import preview_plan
from backend.parallel.running import status
from backend.sampling.registry import SamplerSpec
from modules.application import Application
from modules.errors import RequestError
from tests.contract.sources import ROOT_DIR
from tests.support.applications import installed_application
from tests.support.extensions import loaded_builtin
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import img2img, pixels, run, txt2img

SOURCE = ROOT_DIR / "tests" / "support" / "made_up_family"
WIDTH = 32
JOB: dict[str, Any] = {"batch_size": 2, "do_not_save_grid": True, "steps": 4, "cfg_scale": 3.0, "sampler_name": "Euler a"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp("elsewhere") / "families"
    shutil.copytree(SOURCE, folder)
    with registry.families_in(folder) as (family,):
        yield family
    assert "glyphs" not in {one.name for one in registry.all_families()}


@pytest.fixture(scope="module")
def data_dir(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a checkpoint of the family, a LoRA for its fused matrices, and a checkpoint with that LoRA merged in."""
    folder = tmp_path_factory.mktemp("data")
    tensors = _make_tensors(family)
    change = _make_change(tensors)
    checkpoints = folder / "models" / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    save_file(tensors, checkpoints / "glyphs.safetensors")
    merged = {key: tensor + change[key][0] @ change[key][1] if key in change else tensor for key, tensor in tensors.items()}
    save_file(merged, checkpoints / "merged.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if "guidance" not in key}, checkpoints / "quick.safetensors")
    (folder / "models" / "Lora").mkdir()
    lora = {}
    for key, (up, down) in change.items():
        layer = f"lora_unet_{key.removeprefix('glyph.').removesuffix('.weight').replace('.', '_')}"
        lora.update({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down})
    save_file(lora, folder / "models" / "Lora" / "bold.safetensors")
    return folder


def _make_tensors(family: Family) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = family.build_denoiser.__globals__
        denoiser, encoder = module["Glyphs"](WIDTH, 2), module["LetterEncoder"](WIDTH)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            latent_channels=8,
        )
    return {key: tensor.clone() for key, tensor in family.join_checkpoint(denoiser, vae, [encoder]).items()}


def _make_change(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    names = ("glyph.blocks.0.qkv.weight", "glyph.blocks.1.qkv.weight", "glyph.blocks.1.out.weight", "glyph.head.project.weight")
    return {
        name: (torch.randn(tensors[name].shape[0], 2, generator=generator) * 0.3, torch.randn(2, tensors[name].shape[1], generator=generator) * 0.3)
        for name in names
    }


def _pictures(app: Application, checkpoint: str = "glyphs", make: Any = txt2img, **fields: Any) -> np.ndarray:
    request = make(**{**JOB, **fields}, override_settings={"sd_model_checkpoint": checkpoint})
    return np.stack([pixels(image) for image in run(request).images])


@pytest.fixture(scope="module")
def expected(data_dir: Path) -> dict[str, np.ndarray]:
    """Pictures made on one slot."""
    with virtual_fleet(1), installed_application(data_dir) as app, loaded_builtin(app, "sd_forge_lora"):
        app.options.live_previews_enable = False
        found = {"plain": _pictures(app), "lora": _pictures(app, prompt="a red cat<lora:bold:1>"), "merged": _pictures(app, "merged")}
        assert app.models.engine is not None and app.models.engine.family == "glyphs"
        return found


def test_one_slot_makes_pictures(expected: dict[str, np.ndarray]) -> None:
    assert expected["plain"].shape == (2, 64, 64, 3)
    assert expected["plain"].std() > 1 and not np.array_equal(*expected["plain"])


def test_a_lora_on_the_file_s_fused_matrices_is_the_same_change_of_the_network_s_own(expected: dict[str, np.ndarray]) -> None:
    assert not np.array_equal(expected["lora"], expected["plain"])
    assert np.abs(expected["lora"] - expected["merged"]).max() <= 1


def test_the_request_s_distilled_guidance_reaches_the_network_as_a_row(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both passes and branches, if the network takes it; a file whose network does not take it gets none."""
    calls: list[NetworkCall] = []
    run_network = KModel.run_network

    def record(model: KModel, call: NetworkCall) -> Tensor:
        calls.append(call)
        return run_network(model, call)

    monkeypatch.setattr(KModel, "run_network", record)

    def guidance_rows() -> list[list[float]]:
        rows = [call.rows["guidance"].tolist() for call in calls if "guidance" in call.rows]
        calls.clear()
        return list(map(list, dict.fromkeys(map(tuple, rows))))

    job: dict[str, Any] = {**JOB, "sampler_name": "Euler", "override_settings": {"sd_model_checkpoint": "glyphs"}}
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        weak = run(txt2img(**job, distilled_cfg_scale=0.0))
        assert guidance_rows() == [[0.0] * 4]
        strong = run(txt2img(**{**job, **hires, "distilled_cfg_scale": 5.0, "hr_distilled_cfg": 7.5, "cfg_scale": 1.0, "hr_cfg": 1.0}))
        assert guidance_rows() == [[5.0] * 2, [7.5] * 2]
        assert "CFG scale: 3, Distilled CFG Scale: 0, Seed" in weak.infotexts[0]
        assert "Distilled CFG Scale: 5, Seed" in strong.infotexts[0] and "Hires Distilled CFG Scale: 7.5" in strong.infotexts[0]
        assert app.models.engine is not None
        conditions = app.models.engine.get_learned_conditioning(["a letter"])
        assert isinstance(conditions, dict) and conditions["guidance"].tolist() == [2.0]
        assert not np.array_equal(_pictures(app, distilled_cfg_scale=0.0), _pictures(app, distilled_cfg_scale=5.0))
        calls.clear()
        quick = run(txt2img(**{**job, "override_settings": {"sd_model_checkpoint": "quick"}}))
        assert guidance_rows() == [] and "Distilled" not in quick.infotexts[0] and not app.models.engine.use_distilled_cfg_scale


def test_another_guidance_does_not_encode_the_prompt_again(data_dir: Path) -> None:
    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        first = _pictures(app, prompt="a cat AND a dog", distilled_cfg_scale=1.0)
        assert app.models.engine is not None
        encode, asked = app.models.engine.get_learned_conditioning, []
        app.models.engine.get_learned_conditioning = lambda prompt: asked.append(list(prompt)) or encode(prompt)  # type: ignore[method-assign,func-returns-value]
        other = _pictures(app, prompt="a cat AND a dog", distilled_cfg_scale=9.0)
        again = _pictures(app, prompt="a cat AND a dog", distilled_cfg_scale=1.0)
        assert asked == []
        assert np.array_equal(again, first) and not np.array_equal(other, first)
        _pictures(app, prompt="a cow AND a dog", distilled_cfg_scale=1.0)
        assert asked == [["a cow", " a dog"]]


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
def test_two_slots_make_the_same_pictures(data_dir: Path, expected: dict[str, np.ndarray], strategy: str) -> None:
    with virtual_fleet(2), installed_application(data_dir) as app, loaded_builtin(app, "sd_forge_lora"):
        app.options.live_previews_enable = False
        app.options.set("multi_gpu_strategy", strategy)
        assert np.abs(_pictures(app) - expected["plain"]).max() <= 1
        plan = status.current_plan()
        assert plan is not None and (plan.strategy, {slot for stage in plan.stages for slot in stage}) == (strategy, {0, 1})
        assert np.abs(_pictures(app, prompt="a red cat<lora:bold:1>") - expected["lora"]).max() <= 1


def test_what_the_family_has_no_form_of_is_refused_and_the_rest_works(data_dir: Path) -> None:
    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = True
        app.options.show_progress_every_n_steps = 1
        app.options.live_preview_refresh_period = 0
        with pytest.raises(RequestError, match=r"Restart.*flow model"):
            _pictures(app, sampler_name="Restart")
        with pytest.raises(RequestError, match=r"Align Your Steps.*flow model"):
            _pictures(app, sampler_name="Euler", scheduler="Align Your Steps")
        assert _pictures(app, sampler_name="DPM++ 2M SDE", batch_size=1).std() > 1
        assert _pictures(app, make=img2img, batch_size=1, denoising_strength=0.5).shape == (1, 64, 64, 3)
        hires = _pictures(app, batch_size=1, enable_hr=True, hr_scale=2.0, hr_upscaler="Latent", denoising_strength=0.6)
        assert hires.shape == (1, 128, 128, 3)


def test_settings_of_a_flow_act_for_their_job_and_are_written(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise levels of each pass, seen where they are computed. 64x64 pixels are 256 tokens of this family: shift 5; twice as large, 17."""
    seen: list[Tensor] = []
    compute = SamplerSpec.compute_sigmas

    def record(spec: SamplerSpec, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(compute(spec, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(SamplerSpec, "compute_sigmas", record)

    def levels(scheduler: str, **settings: Any) -> tuple[list[Tensor], str]:
        seen.clear()
        hires = {"enable_hr": True, "hr_scale": 2.0, "hr_upscaler": "Latent", "denoising_strength": 0.6}
        overrides = {"sd_model_checkpoint": "glyphs", **settings}
        job = {**JOB, **hires, "batch_size": 1, "sampler_name": "Euler", "scheduler": scheduler, "override_settings": overrides}
        infotext = run(txt2img(**job)).infotexts[0]
        return list(seen), infotext

    with virtual_fleet(1), installed_application(data_dir) as app:
        app.options.live_previews_enable = False
        for settings, shifts, words in (
            ({}, (3.0, 3.0), None),
            ({"flow_shift": 1.0}, (1.0, 1.0), "Shift: 1"),
            ({"flow_shift_by_size": True}, (5.0, 17.0), "Shift by size: True"),
            ({}, (3.0, 3.0), None),
        ):
            found, infotext = levels("Simple", **settings)
            assert len(found) == 2
            for sigmas, shift in zip(found, shifts):
                num_steps = len(sigmas) - 1
                times = torch.arange(num_steps, 0, -1) / num_steps
                torch.testing.assert_close(sigmas[:-1], shift_time(times, shift), atol=5e-3, rtol=0)
            assert "Shift" not in infotext if words is None else words in infotext
        (plain, _), infotext = levels("Normal")
        (forge, _), forge_infotext = levels("Normal", flow_schedules_of_forge=True)
        torch.testing.assert_close(forge[:-1], torch.linspace(1, 0.003, 4), atol=1e-3, rtol=0)
        assert plain[1] > forge[1] + 0.1
        assert "Forge flow schedules: True" in forge_infotext and "Forge" not in infotext


def test_the_model_is_saved_as_it_was_read(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "models" / "Stable-diffusion" / "glyphs.safetensors"
    with virtual_fleet(1):
        engine = load_checkpoint(path, config=BackendConfig())
        engine.save_checkpoint(tmp_path / "again.safetensors")
        memory_management.unload_all_models()
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_there_is_a_plan_before_it_is_loaded(data_dir: Path) -> None:
    with virtual_fleet(2):
        preview = preview_plan(data_dir / "models" / "Stable-diffusion" / "glyphs.safetensors")
    assert (preview.model, preview.side_px) == ("Glyphs", 64)


def test_an_incomplete_file_says_what_is_missing(data_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(data_dir / "models" / "Stable-diffusion" / "glyphs.safetensors")
    for missing, message in (
        ("letters.table.weight", "part.safetensors needs a letter text encoder: put"),
        ("glyph.head.project.weight", "its transformer lacks 1"),
    ):
        path = tmp_path / "part.safetensors"
        save_file({key: tensor for key, tensor in tensors.items() if key != missing}, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, config=BackendConfig())


# the parts of a family


def test_families_are_asked_in_the_order_of_their_ranks() -> None:
    families = registry.all_families()
    assert [family.rank for family in families] == sorted(family.rank for family in families)
    assert len({family.name for family in families}) == len(families)
    assert registry.find_family("sdxl").latent == LatentFormat(channels=4, factor=8, scale=0.13025)
    with pytest.raises(KeyError, match=r"nothing.*sdxl"):
        registry.find_family("nothing")


def test_a_file_of_no_family_is_none(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with open_tensor_file(tmp_path / "other.safetensors") as file:
        assert registry.identify(file) is None


def test_a_latent_format_goes_there_and_back() -> None:
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for format_ in (
        LatentFormat(channels=3, factor=8, scale=2.0, shift=0.5),
        LatentFormat(channels=3, factor=8, scale=(1.0, 2.0, 4.0), shift=(0.0, 1.0, 2.0)),
    ):
        torch.testing.assert_close(format_.to_vae(format_.from_vae(z)), z)
    per_channel = LatentFormat(channels=3, factor=8, scale=(1.0, 2.0, 4.0), shift=(0.0, 1.0, 2.0), cell=2)
    torch.testing.assert_close(per_channel.from_vae(z)[:, 2], (z[:, 2] - 2.0) * 4.0)
    assert per_channel.multiple_px == 16
    with pytest.raises(ValueError, match="2 numbers for 3 channels"):
        LatentFormat(channels=3, factor=8, scale=(1.0, 2.0))
    with pytest.raises(ValueError, match="preview has 1 rows"):
        LatentFormat(channels=3, factor=8, scale=1.0, preview=((0.0, 0.0, 0.0),))


def test_a_key_map_names_both_ways_and_joins_what_shares_a_matrix() -> None:
    """Like Flux's single blocks: q, k, v and the first half of the MLP are one matrix with unequal parts."""
    rows = {"a.q": Rows(0, 2, 7), "a.mlp": Rows(2, 7, 7)}
    names = KeyMap(modules={"a.q": "one.linear1", "a.mlp": "one.linear1", "out": "final"}, rows=rows)
    assert names.original("a.mlp.weight") == ("one.linear1.weight", Rows(2, 7, 7))
    assert names.original("out.bias") == ("final.bias", None) and names.original("alike.bias") == ("alike.bias", None)
    assert (names.ours("final.weight"), names.ours("one.linear1.weight"), names.ours("alike.bias")) == ("out.weight", None, "alike.bias")
    assert dict(names.shared()) == {"one.linear1": rows}
    q, mlp = torch.randn(2, 3), torch.randn(5, 3)
    joined = names.to_original({"a.mlp.weight": mlp, "a.q.weight": q, "out.weight": q})
    assert torch.equal(joined["one.linear1.weight"], torch.cat([q, mlp])) and joined["final.weight"] is q
    assert torch.equal(cut_rows(joined["one.linear1.weight"], rows["a.mlp"]), mlp)
    with pytest.raises(ValueError, match=r"3 rows.*7"):
        cut_rows(torch.zeros(3, 3), rows["a.q"])


def test_a_key_map_swaps_halves_and_knows_other_spellings() -> None:
    """Like Flux's last norm, whose shift comes before its scale in the files."""
    names = KeyMap(modules={"norm": "ada.1"}, rows={"norm": Rows(0, 4, 4, swapped=True)}, respelled={".scale": ".weight"})
    ours = torch.arange(8.0).reshape(4, 2)
    theirs = names.to_original({"norm.weight": ours})["ada.1.weight"]
    assert theirs[:, 0].tolist() == [4.0, 6.0, 0.0, 2.0] and torch.equal(cut_rows(theirs, Rows(0, 4, 4, swapped=True)), ours)
    assert [place.key for place in names.places("key.scale")] == ["key.scale", "key.weight"]
    assert names.places("norm.weight") == (("ada.1.weight", Rows(0, 4, 4, swapped=True)),)
