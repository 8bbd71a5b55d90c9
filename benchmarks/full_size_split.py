"""Full-size SDXL cut over fake cards: are the bytes where the plan says? Counted with fake tensors and the product's executor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from backend.parallel.planning.cut_costs import Partition, PartitionJob
from backend.parallel.planning.partition import partition
from backend.parallel.planning.pipeline import StepRows
from backend.parallel.planning.simulation import card_links, card_slots, component_costs, model_config, profile_model
from benchmarks._fake_slots import FakeModel, fake_device
from tools.measure import Bench, Metrics, Variant

SIDE_PX, LATENT_SIDE = 1024, 128
GB, MB = 1e9, 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Cards, and the goal of the cut. A ControlNet is on slot 0, where the product runs it."""

    cards: tuple[str, ...]
    has_controlnet: bool = False
    max_crossing_mb: float | None = None
    images: int = 1


CASES: Mapping[str, Case] = {
    "2x24 GB": Case(cards=("RTX3090",) * 2),
    "2x24 GB, at most 12 MB": Case(cards=("RTX3090",) * 2, max_crossing_mb=12),
    "2x24 GB, ControlNet": Case(cards=("RTX3090",) * 2, has_controlnet=True),
    "2x24 GB, ControlNet, at most 25 MB": Case(cards=("RTX3090",) * 2, has_controlnet=True, max_crossing_mb=25),
    "2x24 GB, 2 images": Case(cards=("RTX3090",) * 2, images=2),
    "3x24 GB": Case(cards=("RTX3090",) * 3),
    "3x24 GB, ControlNet": Case(cards=("RTX3090",) * 3, has_controlnet=True),
    "4x24 GB": Case(cards=("RTX3090",) * 4),
    "4x24 GB, ControlNet": Case(cards=("RTX3090",) * 4, has_controlnet=True),
    "24 + 12 GB": Case(cards=("RTX3090", "RTX3060")),
    "24 + 12 GB, ControlNet": Case(cards=("RTX3090", "RTX3060"), has_controlnet=True),
}


def cut_case(case: Case) -> Partition:
    """The cut over all cards of the case, with text encoders and VAE placed too."""
    found = partition(
        profile_model("sdxl", SIDE_PX, SIDE_PX),
        card_slots(case.cards),
        card_links(case.cards, "host"),
        PartitionJob(
            step_rows=StepRows(images=case.images),
            movable=component_costs("sdxl", SIDE_PX, SIDE_PX, has_controlnet=case.has_controlnet),
            control_slot=0,
            max_crossing_bytes=None if case.max_crossing_mb is None else int(case.max_crossing_mb * MB),
            least_slots=len(case.cards),
        ),
    )
    assert found is not None
    return found


def count_case(case: Case) -> Metrics:
    """Run two steps of the cut network; returns measured and predicted bytes."""
    found = cut_case(case)
    other_bytes: Counter[int] = Counter()
    for component in component_costs("sdxl", SIDE_PX, SIDE_PX, has_controlnet=False):
        other_bytes[found.component_slots[component.name]] += component.weight_bytes
    unet_config = model_config("sdxl")["unet"]
    model = FakeModel(unet_config, found.replica, controlnet_slot=0 if case.has_controlnet else None, other_bytes=other_bytes)
    crossed_bytes = model.step(num_rows=2 * case.images, latent_side=LATENT_SIDE)
    model.fleet.close()
    peaks = [model.fleet.bytes.peak[fake_device(slot)] for slot in range(len(case.cards))]
    return {
        **{f"slot {slot} GB": peak / GB for slot, peak in enumerate(peaks)},
        "between cards %": 100 * (max(peaks) - min(peaks)) / max(peaks),
        "most of the UNet %": 100 * max(model.weight_bytes.values()) / sum(model.weight_bytes.values()),
        "crossing MB": crossed_bytes / MB,
        "predicted crossing MB": found.crossing_bytes / MB,
        "of it ControlNet MB": found.control_bytes / MB,
        "peak prediction off by %": max((100 * (found.peak_bytes[slot] / peak - 1) for slot, peak in enumerate(peaks)), key=abs),
        "predicted ms": found.step_ms,
    }


def _make_variants() -> Mapping[str, Variant]:
    return {name: partial(count_case, case) for name, case in CASES.items()}


BENCH = Bench(
    question="Full-size SDXL (16 bit, 1024x1024, CFG, one row at a time) cut over cards that are not here: how many bytes does each hold at most, "
    "and what crosses a step? Weights and activations are torch's fake tensors, run by the product's program and executor; text encoders and VAE "
    "count as weights. Times are of the counting and mean nothing.",
    make_variants=_make_variants,
    baseline="2x24 GB",
    num_rounds=1,
    num_warmups=0,
    packages=("torch", "diffusers"),
)
