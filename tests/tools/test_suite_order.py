from __future__ import annotations

import pytest

from tests.support import suite_order


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("tests/parity/test_controlnet_parity.py::test_without_guidance[sd20]", True),
        ("tests/parity/test_controlnet_parity.py::test_without_guidance[sdxl]", False),
        ("tests/parity/test_controlnet_parity.py::test_one_controlnet[sd20-ldm]", False),
        ("tests/parity/test_pipeline_parity.py::test_pictures_are_the_pipelines[sdxl-1-DPM++ 2M]", True),
        ("tests/parity/test_pipeline_parity.py::test_pictures_are_the_pipelines[sdxl-2-DPM++ 2M]", False),
        ("tests/parity/test_split_parity.py::test_a_split_job_makes_the_whole_jobs_picture[layers on 3-txt2img]", False),
    ],
)
def test_some_variants_wait_for_the_night(nodeid: str, expected: bool) -> None:
    assert suite_order.is_nightly_variant(nodeid) is expected


def test_long_files_begin() -> None:
    names = ["tests/backend/test_args.py::a", "tests/browser/test_page.py::b", "tests/parity/test_x.py::c", "tests/backend/test_args.py::d"]
    assert [name[-1] for name in sorted(names, key=suite_order.place_of)] == ["c", "b", "a", "d"]


def test_a_pattern_of_a_renamed_test_is_found() -> None:
    here = ["tests/parity/test_controlnet_union_parity.py::test_one_hint_of_a_kind[3-6]"]
    assert suite_order.unmatched_patterns(here) == []
    assert suite_order.unmatched_patterns(["tests/parity/test_controlnet_union_parity.py::test_one_hint[3-6]"]) != []


def test_every_pattern_names_tests(request: pytest.FixtureRequest) -> None:
    """As far as this run has collected them: the whole suite has all."""
    collected: list[str] = request.config.stash[suite_order.COLLECTED]
    assert suite_order.unmatched_patterns(collected) == []
