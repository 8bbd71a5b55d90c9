"""Finds out what a checkpoint's UNet predicts: the noise (epsilon) or the velocity v.

Sources, in this order: marker keys in the file (`v_pred`, `ztsnr`, `edm_vpred.*`), its metadata, a `.yaml` file next to it. SD 2.x files from 2022
have none of these, so the UNet is run once to find out (`predicts_velocity`). Everything else predicts noise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml  # type: ignore[import-untyped]

from backend.checkpoint_file import TensorFile
from backend.storage.running import computing_in

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor

logger = logging.getLogger(__name__)

EPSILON, V_PREDICTION, FLOW = "epsilon", "v_prediction", "flow"
_MEANINGS = {EPSILON: "noise", V_PREDICTION: "v", FLOW: "flow"}
_METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_MAX_YAML_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionSpec:
    """`kind` is "epsilon", "v_prediction" or "flow"; `source` says where that was read.

    `sigma_range` (least, greatest) is set for continuous EDM schedules, as in CosXL. `shift` applies to a flow's times; 1 means no shift.
    """

    kind: str
    has_zero_terminal_snr: bool = False
    sigma_range: tuple[float, float] | None = None
    shift: float = 1.0
    source: str

    @property
    def meaning(self) -> str:
        """What the network predicts, for the log."""
        return _MEANINGS.get(self.kind, self.kind)


def read_prediction(file: TensorFile, *, prefix: str = "") -> PredictionSpec | None:
    """The prediction given by the file, its metadata or the yaml next to it, else None. `prefix`: the UNet's, which marker keys may have too."""
    marks = {key.removeprefix(prefix) for key in file.infos if key.count(".") <= 3}
    if {"edm_vpred.sigma_max", "edm_vpred.sigma_min"} <= marks:
        least, greatest = (float(file.read(_find(file, prefix, f"edm_vpred.sigma_{end}")).float().item()) for end in ("min", "max"))
        return PredictionSpec(kind=V_PREDICTION, sigma_range=(least, greatest), source="the key edm_vpred.sigma_max")
    has_zero_terminal_snr = "ztsnr" in marks or file.metadata.get("ss_zero_terminal_snr") == "True"
    if "v_pred" in marks:
        return PredictionSpec(kind=V_PREDICTION, has_zero_terminal_snr=has_zero_terminal_snr, source="the key v_pred")
    said = _read_metadata(file.metadata) or _read_yaml(file)
    if said is None:
        return None
    kind, source = said
    return PredictionSpec(kind=kind, has_zero_terminal_snr=has_zero_terminal_snr and kind == V_PREDICTION, source=source)


def _find(file: TensorFile, prefix: str, name: str) -> str:
    return name if name in file.infos else prefix + name


def _read_metadata(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    for key in _METADATA_KEYS:
        kind = _kind_of(metadata.get(key, ""))
        if kind is not None:
            return kind, f"the metadata {key}"
    if metadata.get("ss_v_parameterization") == "True":
        return V_PREDICTION, "the metadata ss_v_parameterization"
    return None


def _kind_of(word: object) -> str | None:
    text = str(word).strip().lower()
    if text in ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "velocity"):
        return V_PREDICTION
    return EPSILON if text in ("epsilon", "eps") else None


def _read_yaml(file: TensorFile) -> tuple[str, str] | None:
    """`parameterization` from the training configuration next to the checkpoint, which has the same name with `.yaml`."""
    path = file.path.with_suffix(".yaml")
    if not path.is_file() or path.stat().st_size > _MAX_YAML_BYTES:
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        logger.warning("%s next to the checkpoint cannot be read (%s); it is ignored.", path.name, error)
        return None
    kind = _kind_of(_find_value(content, "parameterization"))
    return None if kind is None else (kind, path.name)


def _find_value(content: Any, name: str) -> Any:
    if not isinstance(content, Mapping):
        return None
    if name in content:
        return content[name]
    return next((found for found in (_find_value(value, name) for value in content.values()) if found is not None), None)


# --- asking the UNet ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predicts_velocity(unet: UNet2DConditionModel) -> bool:
    """Whether an SD 2.x UNet predicts v, found by running it once on a flat gray latent at the last timestep, 999.

    There x is nearly pure noise: x = 0.07 x0 + 0.998 eps. To a trained network a flat 0.5 does not look like noise, so it assumes a strongly
    positive x0: a noise predictor returns values close to x, a velocity predictor values close to -x0, which are far lower. The inputs and the
    limit -1 have been used for this test since 2022. Computed in fp32 regardless of the stored dtype.
    """
    weight = next(unet.parameters())
    x_BCHW = torch.full((1, unet.config.in_channels, 8, 8), 0.5, device=weight.device)
    context_BLC = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, device=weight.device)
    with computing_in(unet, torch.float32):
        output_BCHW: Tensor = unet(x_BCHW, 999, context_BLC, return_dict=False)[0]
    return bool((output_BCHW - x_BCHW).mean() < -1.0)
