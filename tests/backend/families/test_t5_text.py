"""T5 in users' files: every prefix and spelling of its keys gives transformers' weights; other files are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.families.flux.text import TEXT_ENCODERS
from backend.state_dict import assign_tensors, check_plan
from tests.support.t5_encoders import t5_encoder, t5_state_dict, write_t5

T5 = next(component for component in TEXT_ENCODERS if component.name == "t5xxl")
IDS = torch.tensor([[5, 900, 17, 1, 0, 0]])


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    with open_tensor_file(path) as file:
        (part,) = T5.find(file)
        encoder = T5.build(file, part)
        plan = T5.plan(encoder, file, part)
        check_plan(plan, file, "T5")
        assign_tensors(encoder, plan, file, storage_dtype=dtype)
    return encoder


@pytest.mark.parametrize(
    ("prefix", "table"),
    [
        ("", "shared.weight"),
        ("", "encoder.embed_tokens.weight"),
        ("", "both"),
        ("transformer.", "shared.weight"),
        ("text_encoders.t5xxl.transformer.", "shared.weight"),
        ("text_encoders.t5xxl.", "shared.weight"),
        ("text_encoder_2.", "both"),
        ("text_encoder_3.", "both"),
    ],
)
def test_every_prefix_gives_transformers_features(prefix: str, table: str, tmp_path: Path) -> None:
    more = {f"{prefix}logit_scale": torch.ones(())}
    encoder = load(write_t5(tmp_path / "t5.safetensors", t5_encoder(), prefix=prefix, table=table, more=more))
    assert not any(parameter.is_meta for parameter in encoder.parameters())
    torch.testing.assert_close(encoder(IDS).last_hidden_state, t5_encoder()(IDS).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_plain_type_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = load(write_t5(tmp_path / "t5.safetensors", t5_encoder(), dtype=dtype))
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, t5_encoder().state_dict()[key].to(dtype).float())


def test_the_token_table_is_in_memory_once(tmp_path: Path) -> None:
    encoder = load(write_t5(tmp_path / "t5.safetensors", t5_encoder(), table="both"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == sum(parameter.numel() for parameter in t5_encoder().parameters())


def test_umt5_is_not_t5(tmp_path: Path) -> None:
    more = {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(32, 3)}
    with open_tensor_file(write_t5(tmp_path / "umt5.safetensors", t5_encoder(), more=more)) as file:
        assert list(T5.find(file)) == []


def _changed(path: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**t5_state_dict(t5_encoder()), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return path


BIAS = "encoder__block__0__layer__0__SelfAttention__relative_attention_bias__weight"
GATE = "encoder__block__0__layer__1__DenseReluDense__wi_0__weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared__weight": torch.ones(1000, 32)}, "knows 1000 tokens; T5 has 32100"),
        ({BIAS: torch.ones(32, 5)}, "position bias of 32x5 with attention 24 wide"),
        ({BIAS: torch.ones(32)}, "relative_attention_bias.weight has the shape 32, but a T5 text encoder has a matrix there"),
        ({BIAS: torch.ones(0, 3)}, "has the shape 0x3"),
        ({GATE: None}, "lacks encoder.block.0.layer.1.DenseReluDense.wi_0.weight. The file is incomplete, or a T5 v1.0"),
        ({GATE.replace("wi_0", "wi_1"): torch.ones(7, 7)}, "shapes that do not fit together"),
        ({GATE.replace("wi_0", "wo"): None}, "lacks 1 of 21 tensors"),
    ],
)
def test_a_damaged_t5_is_refused_with_the_tensor(changes: dict[str, torch.Tensor | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="t5.safetensors: .*" + words.replace("(", r"\(")):
        load(_changed(tmp_path / "t5.safetensors", **changes))
