"""Part of the tables in docs/samplers.md, and what the document promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from backend.sampling.registry import SAMPLERS
from backend.sampling.schedules import SCHEDULES
from tools import sampler_grid, sampler_report
from tools.documents import END, write_measured
from tools.sampler_references import LIBRARY_REFERENCES, load_k_diffusion
from tools.sampler_report import measure_difference, measure_schedule, schedule_references

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore:Should have:UserWarning")

DOCS = Path(__file__).resolve().parents[2] / "docs"
BY_NAME = {spec.name: spec for spec in SAMPLERS}
SCHEDULE_NAMES = [spec.name for spec in SCHEDULES]
WORKS_IN_FP32 = {"DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "Euler", "Euler a"}
NO_REFERENCE = {"DPM fast", "DPM adaptive", "HeunPP2"}


@pytest.mark.parametrize("name", sorted(LIBRARY_REFERENCES))
def test_samplers_give_what_their_references_give(name: str) -> None:
    """Two schedules each, a different pair for every sampler, so that all are used; 21 steps, so that Restart restarts."""
    place = list(BY_NAME).index(name)
    for schedule in (SCHEDULE_NAMES[place % 16], SCHEDULE_NAMES[(place + 7) % 16]):
        difference = measure_difference(BY_NAME[name], LIBRARY_REFERENCES[name], schedule, step_counts=(5, 21))
        assert difference < (1e-4 if name in WORKS_IN_FP32 else 1e-8), schedule


@pytest.mark.parametrize("name", [name for name, reference in schedule_references().items() if reference is not None])
def test_schedules_give_what_their_references_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = schedule_references()[name]
    assert reference is not None
    monkeypatch.setattr(sampler_report, "SCHEDULE_STEP_COUNTS", (2, 7, 20))  # 32 steps: Turbo's ties, see the document
    assert measure_schedule(name, reference) < reference.tolerance * 1.1


def test_every_sampler_and_schedule_is_accounted_for() -> None:
    assert set(BY_NAME) == set(LIBRARY_REFERENCES) | NO_REFERENCE
    assert list(schedule_references()) == SCHEDULE_NAMES
    text = (DOCS / "samplers.md").read_text(encoding="utf-8")
    for spec in SAMPLERS:
        assert len(re.findall(rf"^\| {re.escape(spec.name)} \|", text, re.MULTILINE)) >= 4, spec.name
    for schedule in SCHEDULES:
        assert f"| {schedule.label} |" in text


def test_a_wrong_sampler_is_noticed() -> None:
    assert measure_difference(BY_NAME["Heun"], LIBRARY_REFERENCES["Euler"], "karras", step_counts=(8,)) > 1e-3


def test_the_grid_is_small_and_has_a_place_for_each() -> None:
    with Image.open(DOCS / "images" / "samplers.png") as grid:
        assert grid.size == (5 * sampler_grid.CELL_PX, 5 * (sampler_grid.CELL_PX + sampler_grid.LABEL_PX))
    assert (DOCS / "images" / "samplers.png").stat().st_size < 300_000
    colours = ["red", "green", "blue"]
    laid = sampler_grid.lay_labelled_grid([(colour, Image.new("RGB", (64, 64), colour)) for colour in colours], num_columns=2)
    middle = sampler_grid.LABEL_PX + sampler_grid.CELL_PX // 2
    assert laid.getpixel((64, middle)) == (255, 0, 0)
    assert laid.getpixel((192, middle)) == (0, 128, 0)
    assert laid.getpixel((64, middle + sampler_grid.CELL_PX + sampler_grid.LABEL_PX)) == (0, 0, 255)


def test_only_the_measured_part_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text(f"before\n<!-- measured by python -m tools.some -->\nold\n{END}\nafter\n")
    write_measured(path, ["new"], command="tools.some")
    assert path.read_text() == f"before\n<!-- measured by python -m tools.some -->\n\nnew\n\n{END}\nafter\n"


def test_a_published_module_is_loaded_by_itself(tmp_path: Path) -> None:
    """Only sampling.py is loaded; its imports other than torch are replaced."""
    (tmp_path / "k_diffusion").mkdir()
    (tmp_path / "k_diffusion" / "sampling.py").write_text(
        "from torchdiffeq import odeint\nfrom . import utils\n\n"
        "def sample_euler(model, x, sigmas, disable=None):\n"
        "    for sigma, following in zip(sigmas, sigmas[1:]):\n"
        "        level = utils.append_dims(sigma[None], x.ndim)\n"
        "        x = x + (x - model(x, sigma.expand(len(x)))) / level * (following - sigma)\n"
        "    return x\n"
    )
    reference = load_k_diffusion(tmp_path)["Euler"]
    assert measure_difference(BY_NAME["Euler"], reference, "karras", step_counts=(6,)) < 1e-12
    assert torch.get_default_dtype() == torch.float32
