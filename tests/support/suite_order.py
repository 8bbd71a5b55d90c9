"""Which test variants only run at night, and which files start first: keeps the suite fast without losing a case.

Every test has variants that always run; the others wait for `--nightly`, of which CI runs a seventh per day.
"""

from __future__ import annotations

import re

import pytest

COLLECTED = pytest.StashKey[list[str]]()
"""All collected tests, before any was deselected."""

NIGHTLY_VARIANTS = (
    # ControlNets: a family with another text encoder goes through the same code; of ranges, layouts and adapters one of each kind runs every time
    r"parity/test_controlnet_parity\.py::(?!test_one_controlnet|.*refused).*\[sd20",
    r"parity/test_controlnet_parity\.py::test_one_controlnet\[(sd15|sd20)-diffusers\]",
    r"parity/test_controlnet_parity\.py::test_from_one_step_to_another\[(sdxl-.*|sd15-0\.34-0\.67)\]",
    r"parity/test_controlnet_parity\.py::test_a_t2i_adapter\[(sd15-full_adapter-ldm-1|sd15-light_adapter-ldm-3|sdxl-full_adapter-ldm-1)\]",
    r"parity/test_controlnet_split_parity\.py::.*\[(layers on 3-sd15|replicas on 3-sd15|layers on 2-sdxl|replicas on 2-sd15)\]",
    r"parity/test_controlnet_split_parity\.py::.*\[(one virtual GPU-sdxl|layers on CPU slots-sd15)\]",
    r"parity/test_controlnet_union_parity\.py::test_one_hint_of_a_kind\[3-6\]",
    r"parity/test_ip_adapter_parity\.py::test_(a_range_of_steps\[sdxl\]|two_adapters.*\[sd15\]|each_kind\[sdxl-plain\])",
    # LoRA: each family and each strategy run every time, not each pair
    r"parity/test_lora_parity\.py::.*\[(layers on 3-sd15|single on 1-sdxl|layers on 2-sdxl|replicas on 2-sd15)\]",
    # built-in extensions: each on two slots every time, not each under both plans
    r"extensions_builtin/test_guidance_guests\.py::test_two_slots.*\[layers-(freeu|sag|views|latent modifier|stylealign)\]",
    r"extensions_builtin/test_guidance_guests\.py::test_two_slots.*\[replicas-(freeu, last steps|pag|hrfix|dynamic thresholding|token merging)\]",
    # kinds of extensions: one of those that go the same way runs every time
    r"tools/test_trial_kinds\.py::test_a_kind.*\[(pre-cfg|cfg-function|cfg-function-of-three|unet-wrapper|attn1-patch|attn2-replace|attn-output)\]",
    r"tools/test_trial_kinds\.py::test_a_kind.*\[(input-block|input-block-after-skip|block-inner-modifier|group-norm|cfg-denoised|after-cfg)\]",
    r"tools/test_trial_kinds\.py::test_a_kind.*\[(token-merging|batch-prompts|noise|latents|pictures|selectable|conditioning-modifier)\]",
    # whole pictures: a sampler with history in batches, one without it alone
    r"parity/test_pipeline_parity\.py::test_pictures_are_the_pipelines\[.*-(1-DPM\+\+ 2M|2-Euler)\]",
    r"parity/test_pipeline_parity\.py::test_without_guidance\[(sd15-inpaint|sd20|sd21_v)\]",
    # searching the cut over four slots, or over three for a second size, takes as long as ten other jobs
    r"parity/test_split_parity\.py::.*\[layers on 4",
    r"parity/test_split_parity\.py::.*\[layers on 3-hires\]",
    r"parity/test_split_parity\.py::test_(a_picture_decoded_in_strips|copies_in_the_foreground).*\[(layers on 2|replicas on 3|layers on CPU slots)\]",
    r"parity/test_split_parity\.py::test_units_of_several_rows.*-hires\]",
    r"parity/test_split_parity\.py::test_one_slot_with_both_branches.*\[inpaint\]",
    # the newer families share samplers, conditions and executor: each strategy runs every time with one or two of them
    r"parity/test_flow_families_application\.py::test_two_slots.*\[(chroma-layers|sd3-layers|sd3-replicas|flux2-replicas|zimage-replicas|lumina2-layers|qwenimage-replicas|krea2-replicas|anima-layers)\]",
    # faults during a job: each plan, each slot and each moment every time, not each combination
    r"processing/test_processing_slots\.py::test_out_of_memory_in_the_middle.*-(40-1|150-0)\]",
    r"processing/test_processing_slots\.py::test_a_lost_slot_ends.*\[(0\.0-replicas|replicas-0\.0|0\.4-layers|layers-0\.4)\]",
    r"processing/test_processing_memory\.py::test_a_shortage_anywhere_in_a_job.*\[0\.3\]",
    r"processing/test_processing_memory\.py::test_a_device_lost_in_a_job.*\[0\.02\]",
    # float16, which a CPU has no fast kernels for; the other half type runs every time
    r"vae/test_split\.py::test_the_split_is_as_exact_as_the_full_decode\[dtype2\]",
    # each family in one layout every time, each layout with two families; each estimate for one size
    r"backend/test_loader\.py::test_loaded_networks_equal.*\[(sd20|sd21_v)-diffusers\]",
    r"devices/test_engine_on_virtual_gpus\.py::test_estimates_of_working_memory.*\[(sd20-24|sdxl-16)\]",
    # each mode with one kind of masked content, each size with one kind of region
    r"processing/test_img2img\.py::test_a_picture_of_another_size_is_inpainted_in_every_mode\[(0-[123]|1-[023]|2-[013]|3-[012])\]",
    r"processing/test_img2img\.py::test_a_latent_mask_may_have_any_size\[(size0-False|size1-True|size2-False)\]",
)

FIRST = ("tests/parity/", "tests/browser/", "tests/tools/", "tests/backend/parallel/", "tests/extensions_builtin/", "tests/modules/processing/")
"""Folders with slow files: if started last, one of them would keep a process busy after the others are done."""

_nightly = re.compile("|".join(f"(?:{pattern})" for pattern in NIGHTLY_VARIANTS))


def is_nightly_variant(nodeid: str) -> bool:
    """Whether this test variant only runs at night."""
    return _nightly.search(nodeid) is not None


def place_of(nodeid: str) -> int:
    """Position of a test's file in the order: the entries of FIRST, then all others."""
    return next((place for place, folder in enumerate(FIRST) if nodeid.startswith(folder)), len(FIRST))


def unmatched_patterns(nodeids: list[str]) -> list[str]:
    """Patterns that match no test although their file has tests: the test was renamed."""
    files = {nodeid.partition("::")[0] for nodeid in nodeids}
    found = []
    for pattern in NIGHTLY_VARIANTS:
        file = pattern.partition("::")[0].replace("\\", "")
        if any(name.endswith(file) for name in files) and not any(re.search(pattern, nodeid) for nodeid in nodeids):
            found.append(pattern)
    return found
