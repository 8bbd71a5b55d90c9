"""Applies to every test: one torch thread, no network, no telemetry, fixed seeds."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

# Before any test module imports a library that reads these.
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

from tests.support.cpu_times import CpuTimes
from tests.support.suite_order import COLLECTED, is_nightly_variant, place_of

try:
    from hypothesis import settings as hypothesis_settings
except ImportError:  # the launcher's tests run without it
    pass
else:
    # No test asserts time, and every run uses the same cases.
    hypothesis_settings.register_profile("house", deadline=None, derandomize=True)
    hypothesis_settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly",
        default="none",
        metavar="none|all|K/N",
        help='tests marked "nightly" that run too: none of them, all, or every N-th from the K-th on',
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("xmlpath", None):
        config.pluginmanager.register(CpuTimes())


def pytest_report_header(config: pytest.Config) -> str:
    return f"nightly tests: {config.getoption('--nightly')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nightly tests run where asked for, long files first. GPU tests skip with their reason; torch is asked only when there is one."""
    config.stash[COLLECTED] = [item.nodeid for item in items]
    for item in items:
        if is_nightly_variant(item.nodeid):
            item.add_marker(pytest.mark.nightly)
    _leave_out_nightly(config, items)
    items.sort(key=lambda item: place_of(item.nodeid))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # heavy, and only needed here

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


def _leave_out_nightly(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = choose_nightly(config.getoption("--nightly"), sorted(item.nodeid for item in items if item.get_closest_marker("nightly")))
    left_out = [item for item in items if item.get_closest_marker("nightly") and item.nodeid not in wanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def choose_nightly(choice: str, names: list[str]) -> set[str]:
    """Which nightly tests run: "none", "all", or for "2/7" the second of every seven."""
    if choice in ("none", "all"):
        return set(names) if choice == "all" else set()
    part, _, count = choice.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise pytest.UsageError(f"--nightly {choice}: give none, all, or a part such as 2/7")
    return set(names[int(part) - 1 :: int(count)])


def pytest_collection_finish() -> None:
    """All libraries are imported by now; freeze them, so that collections triggered by models leaving a device need not scan them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    try:
        import torch
    except ImportError:  # the launcher's tests run without it
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _look_at_each_object_once() -> Iterator[None]:
    """Freeze what outlives a file (libraries, gradio pages), so that later collections skip it. Models leaving a device trigger collections,
    which took most of their time by the middle of the suite."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_seeds() -> Iterator[None]:
    """Every test starts with the same global seeds, and leaves no options behind."""
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
