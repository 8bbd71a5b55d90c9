"""All checks, most valuable first."""

from __future__ import annotations

from collections.abc import Sequence

from tools.cuda_checks import memory_checks, patch_checks, picture_checks, profile_checks, slot_checks, speed_checks, tile_checks
from tools.cuda_checks.runner import Check

CHECKS: tuple[Check, ...] = (
    Check("machine", 5, "What runs here?", picture_checks.check_machine, 40),
    Check("free_memory", 5, "Is get_free_memory what the driver says?", memory_checks.check_free_memory, 20),
    Check("demo_picture", 5, "Is the demo checkpoint's picture on the card the CPU's?", picture_checks.check_demo_picture, 40),
    Check("checkpoints", 5, "Full-size checkpoints of random weights for the checks below.", speed_checks.check_checkpoints, 70),
    Check("sdxl", 6, "SDXL 1024x1024: peak memory and step time against diffusers' pipeline?", speed_checks.check_sdxl, 75),
    Check("split", 6, "One card as two slots: are replicas and layers bit-equal, every time?", slot_checks.check_split, 60),
    Check("sd15", 6, "SD1.5 512x512: peak memory and step time against diffusers' pipeline?", speed_checks.check_sd15, 50),
    Check("segments", 6, "What does each piece of the network take, and what do its FLOPs say?", speed_checks.check_segments, 40),
    Check("profile", 8, "Are --profile's figures torch's and the driver's?", profile_checks.check_profile, 60),
    Check("jobs_on_two_slots", 6, "Are whole jobs on two slots the picture of one slot, every time?", slot_checks.check_jobs_on_two_slots, 50),
    Check("out_of_memory", 5, "What does a real shortage of memory do to a job?", memory_checks.check_out_of_memory, 50),
    Check(
        "tiles", 17, "One card as two slots: is a row in tiles the whole row, every time, and what do exchanges cost?", tile_checks.check_tiles, 90
    ),
    Check("flux_tiles", 17, "The same for blocks of Flux.1's width.", tile_checks.check_flux_tiles, 40),
    Check("lora", 7, "What do applying and removing a LoRA cost at full width?", patch_checks.check_lora, 40),
    Check("storage", 5, "fp8, offloading and streaming: peak, time and the picture?", memory_checks.check_storage, 75),
    Check("controlnet", 7, "What does a step of SDXL take with ControlNets?", patch_checks.check_controlnet, 50),
    Check("profile_cost", 8, "What does --profile cost per step?", profile_checks.check_profile_cost, 40),
    Check("soak", 5, "Do bytes stay the same while jobs switch checkpoints, sizes and LoRAs?", memory_checks.check_soak, 50),
    Check("marked_tests", 5, "Do the tests marked gpu pass?", picture_checks.check_marked_tests, 50),
    Check("links", 5, "What does the link test say with one card?", slot_checks.check_links, 30),
    Check("sanitizer", 6, "Does compute-sanitizer find anything in a divided step?", slot_checks.check_sanitizer, 130),
)


def choose_checks(only: Sequence[str] | None, skip: Sequence[str]) -> tuple[Check, ...]:
    """The checks with these names, in catalog order. Raises: SystemExit for an unknown name."""
    names = {check.name for check in CHECKS}
    unknown = sorted(({*(only or ()), *skip}) - names)
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: no such check. There are: {', '.join(sorted(names))}.")
    return tuple(check for check in CHECKS if (only is None or check.name in only) and check.name not in skip)
