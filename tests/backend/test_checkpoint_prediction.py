"""The prediction type of a file: from marker keys, metadata, the yaml next to it, and for SD 2.x by running the UNet."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.checkpoint_file import open_tensor_file
from backend.checkpoint_prediction import EPSILON, V_PREDICTION, predicts_velocity, read_prediction
from tests.support.checkpoints import build_models, write_checkpoint


def _read(path, prefix=""):
    with open_tensor_file(path) as file:
        return read_prediction(file, prefix=prefix)


def _write(path, marks=(), metadata=None):
    save_file({"x": torch.ones(1), **{mark: torch.ones(()) for mark in marks}}, path, metadata=metadata)
    return path


def test_marks_in_the_file(tmp_path):
    assert _read(_write(tmp_path / "a.safetensors")) is None
    v = _read(_write(tmp_path / "b.safetensors", ["v_pred"]))
    assert (v.kind, v.has_zero_terminal_snr) == (V_PREDICTION, False)
    zero = _read(_write(tmp_path / "c.safetensors", ["v_pred", "ztsnr"]))
    assert (zero.kind, zero.has_zero_terminal_snr) == (V_PREDICTION, True)
    edm = _read(_write(tmp_path / "d.safetensors", ["edm_vpred.sigma_max", "edm_vpred.sigma_min"]))
    assert edm.sigma_range == (1.0, 1.0)
    under_prefix = _read(_write(tmp_path / "e.safetensors", ["model.diffusion_model.v_pred"]), prefix="model.diffusion_model.")
    assert under_prefix.kind == V_PREDICTION


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"modelspec.prediction_type": "v"}, V_PREDICTION),
        ({"modelspec.predict_key": "v"}, V_PREDICTION),
        ({"modelspec.predict_key": "epsilon"}, EPSILON),
        ({"ss_v_parameterization": "True"}, V_PREDICTION),
        ({"modelspec.prediction_type": "flow"}, None),
        ({"title": "v"}, None),
    ],
)
def test_metadata(metadata, kind, tmp_path):
    said = _read(_write(tmp_path / "m.safetensors", metadata=metadata))
    assert (said and said.kind) == kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('model:\n  target: ldm\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n', V_PREDICTION),
        ("model:\n  params:\n    parameterization: eps\n", EPSILON),
        ("model:\n  params:\n    linear_start: 0.1\n", None),
        ("not: [closed", None),
        ("!!python/object/apply:os.mkdir [ran]", None),
    ],
)
def test_yaml_next_to_the_file(text, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path / "m.safetensors")
    path.with_suffix(".yaml").write_text(text, encoding="utf-8")
    said = _read(path)
    assert (said and said.kind) == kind
    assert not (tmp_path / "ran").exists()


def test_marker_keys_beat_metadata_and_metadata_beats_yaml(tmp_path):
    path = _write(tmp_path / "m.safetensors", ["v_pred"], {"modelspec.prediction_type": "epsilon"})
    assert _read(path).source == "the key v_pred"
    path = _write(tmp_path / "m.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    path.with_suffix(".yaml").write_text("parameterization: v", encoding="utf-8")
    assert _read(path).kind == EPSILON


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_the_unet_is_run_when_the_file_says_nothing(dtype, tmp_path):
    """On the flat gray latent a velocity predictor returns strongly negative values; here the output's bias replaces training."""
    unet = build_models(tmp_path / "x", "sd20").unet
    assert not predicts_velocity(unet)
    unet.conv_out.bias.sub_(2.0)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    stored = unet.conv_out.bias
    assert predicts_velocity(unet)
    assert unet.conv_out.bias is stored and not unet.conv_out._forward_hooks


def test_sd2_files_without_a_marker_are_identified_by_running_the_unet(tmp_path):
    from backend import memory_management
    from backend.args import BackendConfig
    from backend.devices.probing import probe_devices
    from backend.loader import load_checkpoint

    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    base = write_checkpoint(tmp_path / "base.safetensors", "sd20").path
    state_dict = load_file(base)
    state_dict["model.diffusion_model.out.2.bias"] -= 2.0
    save_file(state_dict, tmp_path / "v768.safetensors")
    kinds = {}
    for path in (base, tmp_path / "v768.safetensors"):
        engine = load_checkpoint(path, config=BackendConfig())
        kinds[path.stem] = (engine.forge_objects.unet.model.predictor.prediction_type, engine.native_size_px, engine.parameterization)
    assert kinds == {"base": ("epsilon", 512, "eps"), "v768": ("v_prediction", 768, "v")}
    (tmp_path / "v768.yaml").write_text("parameterization: eps", encoding="utf-8")
    assert load_checkpoint(tmp_path / "v768.safetensors", config=BackendConfig()).parameterization == "eps"


def test_zero_snr_reaches_the_schedule(tmp_path):
    from backend import memory_management
    from backend.args import BackendConfig
    from backend.devices.probing import probe_devices
    from backend.loader import load_checkpoint

    memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    base = write_checkpoint(tmp_path / "base.safetensors", "sdxl", prediction="v_prediction").path
    save_file(load_file(base) | {"ztsnr": torch.ones(1)}, tmp_path / "zero.safetensors")
    assert 14.6 < float(load_checkpoint(base, config=BackendConfig()).forge_objects.unet.model.predictor.sigma_max) < 14.7
    assert float(load_checkpoint(tmp_path / "zero.safetensors", config=BackendConfig()).forge_objects.unet.model.predictor.sigma_max) > 4000
