"""What holds for every test: one torch thread, no network, no telemetry, the same seeds."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

# Before any test module imports a library that reads them.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
for name in ("COMMANDLINE_ARGS", "TORCH_COMMAND", "REQS_FILE", "INDEX_URL", "TORCH_INDEX_URL", "IGNORE_CMD_ARGS_ERRORS", "SD_WEBUI_LOG_LEVEL"):
    os.environ.pop(name, None)

import pytest

try:
    from hypothesis import settings as hypothesis_settings
except ImportError:  # the launcher's own tests run without it
    pass
else:
    # No test asserts time, and every run tries the same cases.
    hypothesis_settings.register_profile("house", deadline=None, derandomize=True)
    hypothesis_settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip with their reason; torch is asked only when there is one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # heavy, and only wanted here

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    try:
        import torch
    except ImportError:  # the launcher's own tests run without it
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _look_at_each_object_once() -> Iterator[None]:
    """What outlives a file (libraries, pages of gradio) is not looked through at every later collection: models that leave a device ask for one,
    and by the middle of the suite they took most of its time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_seeds() -> Iterator[None]:
    """Every test starts from the same global seeds, and leaves no options for the next one."""
    random.seed(0)
    try:
        import numpy as np
        import torch
    except ImportError:
        yield
        return
    np.random.seed(0)
    torch.manual_seed(0)
    yield
