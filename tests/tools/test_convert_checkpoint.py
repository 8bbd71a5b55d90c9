"""The converter's command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools.convert_checkpoint import main


def test_the_command_writes_a_file_and_says_its_size_or_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.ones(128, 128), "a.bias": torch.ones(4)}, tmp_path / "a.safetensors")
    assert main([str(tmp_path / "a.safetensors"), "--to", "q8_0", "--out", str(tmp_path / "a.gguf")]) == 0
    assert "a.gguf: 0.00 GB" in capsys.readouterr().out
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    for arguments, words in (
        (["--to", "q8_0", "--out", str(tmp_path / "a.gguf")], "exists already"),
        (["--to", "q99", "--out", str(tmp_path / "b.gguf")], "'q99' is unknown"),
        (["--lora", f"{tmp_path}/gone.safetensors:0.5", "--to", "fp16", "--out", str(tmp_path / "b.safetensors")], "has no denoiser"),
    ):
        assert main([str(tmp_path / "a.safetensors"), *arguments]) == 2
        assert words in capsys.readouterr().err
