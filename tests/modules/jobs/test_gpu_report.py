from __future__ import annotations

from dataclasses import replace

import pytest

from backend.parallel.running.status import PlanStatus, SlotStatus
from modules.jobs.gpu_report import describe_idleness, slots_text
from tests.modules.jobs.test_profile_files import make_job

GIB = 2**30


def _slot(index: int, **fields: object) -> SlotStatus:
    slot = SlotStatus(
        index=index, name=f"Card {index}", torch_device=f"cuda:{index}", vram_state="NORMAL_VRAM", total_bytes=24 * GIB, free_bytes=18 * GIB,
        resident_bytes=0, peak_bytes=None, speed=1.0,
    )  # fmt: skip
    return replace(slot, **fields)  # type: ignore[arg-type]


BOTH = (_slot(0), _slot(1))
REPLICAS = PlanStatus(
    strategy="replicas", reason="2 replicas on slots 0 and 1", replicas=2, stages=((0,), (1,)), rows=(1, 1), predicted_ms=None, measured_ms=None,
    predicted_bytes={},
)  # fmt: skip
SINGLE = replace(REPLICAS, strategy="single", replicas=1, stages=((0,),), rows=(1,), reason="slot 0 alone: the link is slow")


def test_the_table_has_a_line_per_slot_in_columns_that_somebody_fills() -> None:
    head, first, second = slots_text([_slot(0), _slot(1, name="Long card", utilization=97, holders=(("KModel", 5 * GIB),))])
    assert head.split() == ["slot", "device", "name", "state", "used", "of", "models", "on", "it", "use"]
    assert first == "0     cuda:0  Card 0     normal  6.0 GiB  24.0 GiB"
    assert second.endswith("KModel 5.0 GiB  97 %")
    assert "temp." not in head


@pytest.mark.parametrize(
    ("plan", "slots", "uses_many", "said"),
    [
        (REPLICAS, BOTH, True, ""),
        (None, BOTH, True, ""),
        (SINGLE, BOTH[:1], True, ""),
        (None, BOTH, False, "Only slot 0 computes: start with --multi-gpu to use the others."),
        (SINGLE, BOTH, True, "Slot 1 is idle: slot 0 alone: the link is slow. Larger pictures or a larger Batch size would use it."),
        (
            replace(REPLICAS, rows=(1, 0)), BOTH, True,
            "Slot 1 is idle: 2 replicas on slots 0 and 1. A larger Batch size would use it.",
        ),
        (
            replace(SINGLE, reason="slot 0 alone; single was requested"), (*BOTH, _slot(2)), True,
            "Slots 1 and 2 are idle: slot 0 alone; single was requested. "
            "Set multi_gpu_strategy to auto, or remove --multi-gpu-strategy.",
        ),
        (
            REPLICAS, (BOTH[0], _slot(1, vram_state="LOST")), True,
            "Slot 1 is lost: restart the program to use it again, and check the driver's log.",
        ),
    ],
)  # fmt: skip
def test_an_idle_slot_is_said_with_its_reason_and_what_to_do(
    plan: PlanStatus | None, slots: tuple[SlotStatus, ...], uses_many: bool, said: str
) -> None:
    assert describe_idleness(plan, slots, uses_many=uses_many) == said


def test_a_slot_that_worked_little_is_said_with_what_it_waited_for() -> None:
    job = make_job()
    assert describe_idleness(REPLICAS, BOTH, uses_many=True, job=job) == ""
    lazy = job.slots[1].model_copy(update={"busy_share": 0.2, "wait_ms_by_cause": {"host": 5.0, "copy": 40.0}})
    said = describe_idleness(REPLICAS, BOTH, uses_many=True, job=job.model_copy(update={"slots": [job.slots[0], lazy]}))
    assert said.startswith("Slot 1 was busy for 20% of the last job. Most of the rest: it waits for copies; ")
