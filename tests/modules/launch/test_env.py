"""The variables set before torch is imported."""

from __future__ import annotations

import pytest

from modules.launch.cmd_args import parse_config
from modules.launch.env import library_environment


def variables_of(*words: str, **environ: str) -> dict[str, str]:
    return library_environment(parse_config(words, environ), environ)


def test_without_flags_no_device_is_hidden_and_no_allocator_chosen() -> None:
    assert set(variables_of()) == {
        *("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "CUDA_DEVICE_ORDER", "PYTORCH_ENABLE_MPS_FALLBACK", "TOKENIZERS_PARALLELISM"),
    }


def test_what_the_user_has_set_stays() -> None:
    variables = variables_of("--pytorch-deterministic", CUDA_DEVICE_ORDER="FASTEST_FIRST", CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert not {"CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG"} & set(variables)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "backend:cudaMallocAsync"),
        ("backend:native,garbage_collection_threshold:0.8", "garbage_collection_threshold:0.8,backend:cudaMallocAsync"),
    ],
)
def test_cuda_malloc_keeps_the_other_settings_of_the_allocator(before: str, after: str) -> None:
    assert variables_of("--cuda-malloc", PYTORCH_CUDA_ALLOC_CONF=before)["PYTORCH_CUDA_ALLOC_CONF"] == after


def test_gpu_device_id_hides_the_others_and_device_id_does_not() -> None:
    assert variables_of("--gpu-device-id", "1", CUDA_VISIBLE_DEVICES="0,1")["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in variables_of("--device-id", "1")


def test_deterministic_prepares_cublas() -> None:
    assert variables_of("--pytorch-deterministic")["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
