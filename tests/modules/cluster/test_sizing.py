from __future__ import annotations

import pytest

from modules.cluster.commands import build_parser, main
from modules.cluster.joining import check_reachable, complete_address, head_command, worker_command, worker_environment
from modules.cluster.sizing import Size, Sizing
from modules.launch.errors import SetupError


def test_without_limits_there_is_a_worker_per_place() -> None:
    sizing = Sizing(Size(least=0))
    assert [sizing.choose(num_jobs=9, num_places=places, now_s=0) for places in (3, 5, 2)] == [3, 5, 2]


def test_it_grows_at_once_and_shrinks_after_a_quiet_time() -> None:
    sizing = Sizing(Size(least=0, most=4), quiet_s=60)
    jobs_at = [(0, 0), (9, 1), (2, 2), (2, 60), (2, 61.5), (0, 62), (0, 122)]
    assert [sizing.choose(num_jobs=jobs, num_places=1, now_s=now_s) for jobs, now_s in jobs_at] == [0, 4, 4, 4, 2, 2, 0]


def test_the_least_stay() -> None:
    assert Sizing(Size(least=2, most=4)).choose(num_jobs=0, num_places=0, now_s=0) == 2


def test_a_clock_that_was_set_back_keeps_no_workers_for_ever() -> None:
    sizing = Sizing(Size(least=0, most=4), quiet_s=60)
    sizing.choose(num_jobs=4, num_places=1, now_s=1e9)
    assert sizing.choose(num_jobs=0, num_places=1, now_s=0) == 0


@pytest.mark.parametrize(("given", "whole"), [("gpu-1", "gpu-1:6379"), ("10.0.0.1:7000", "10.0.0.1:7000")])
def test_an_address_is_completed(given: str, whole: str) -> None:
    assert complete_address(given) == whole


@pytest.mark.parametrize("address", ["", ":6379", "a:b", "a:0", "a:70000", "a b", "user@a:1", "ray://a/b"])
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(SetupError, match="not the address of a head"):
        complete_address(address)


def test_a_worker_runs_with_this_program_and_its_own_flags() -> None:
    environ = worker_environment({"PATH": "/bin", "PYTHONPATH": "/mine"}, ["--models-dir", "/a b"])
    assert environ["WEBUI_WORKER_FLAGS"] == "--models-dir '/a b'"
    assert environ["PYTHONPATH"].endswith(":/mine")
    assert environ["PATH"] == "/bin"
    assert "--address=gpu-1:6379" in worker_command("gpu-1:6379", 2)
    assert "--num-gpus=2" in worker_command("gpu-1:6379", 2)
    assert not any(word.startswith("--num-gpus") for word in worker_command("gpu-1:6379", None))
    assert {"--num-cpus=0", "--dashboard-host=127.0.0.1"} < set(head_command(6379, computes=False))


def test_a_wrong_flag_after_the_dashes_is_told_before_anything_starts(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["worker", "--address", "gpu-1", "--", "--modles-dir", "x"]) == 1
    assert "did you mean --models-dir" in caplog.text


def test_the_address_is_needed() -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["worker"])


def test_a_head_that_is_not_there_is_said() -> None:
    with pytest.raises(SetupError, match=r"127\.0\.0\.1:9: the head of the cluster cannot be reached"):
        check_reachable("127.0.0.1:9")
    with pytest.raises(SetupError, match="cannot be reached"):
        check_reachable("ray://no-such-host.invalid:10001")
