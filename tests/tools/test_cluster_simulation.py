from __future__ import annotations

from pathlib import Path

import pytest

from tools.cluster_simulation import DAY_S, Day, Job, OurRouting, RoundRobin, main, make_jobs, simulate

SMALL = Day(num_workers=20, num_jobs=4000, num_checkpoints=12, job_s=250, load_s=60)


def test_the_router_avoids_most_loads_and_shortens_waits() -> None:
    jobs = list(make_jobs(SMALL))
    ours, other = simulate(SMALL, jobs, OurRouting(SMALL)), simulate(SMALL, jobs, RoundRobin(SMALL))
    assert ours.num_loads < 0.7 * other.num_loads
    assert ours.percentile(0.5) <= other.percentile(0.5)
    assert ours.percentile(0.99) <= other.percentile(0.99)
    assert ours.busy_s < other.busy_s


def test_jobs_follow_the_days_rhythm_and_times_their_mean() -> None:
    jobs = list(make_jobs(SMALL))
    assert [job.number for job in jobs] == list(range(4000))
    assert sum(job.at_s < DAY_S / 2 for job in jobs) / 4000 == pytest.approx(0.5 + 0.6 / 3.1416, abs=0.03)  # the mean of 1 + 0.6 sin over half a day
    assert sum(job.run_s for job in jobs) / 4000 == pytest.approx(250, rel=0.08)


def test_an_idle_cluster_starts_every_job_at_once() -> None:
    jobs = [Job(number, number * 1000.0, "x", 10.0) for number in range(5)]
    outcome = simulate(Day(num_workers=2, num_jobs=5), jobs, OurRouting(Day(num_workers=2)))
    assert outcome.waits_s == [0.0] * 5
    assert outcome.num_loads == 1


def test_a_job_that_runs_twice_is_found() -> None:
    class Twice(RoundRobin):
        def arrive(self, job: Job) -> None:
            super().arrive(job)
            super().arrive(job)

    with pytest.raises(RuntimeError, match="1 ran more than once"):
        simulate(Day(num_workers=2), [Job(0, 0.0, "x", 1.0)], Twice(Day(num_workers=2)))


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.md"
    assert main(["--workers", "5", "--jobs", "200", "--report", str(report)]) == 0
    assert "Loads avoided against round-robin" in report.read_text()
    assert "wait p99" in capsys.readouterr().out
