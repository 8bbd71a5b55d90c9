from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from modules.cluster.dispatch import MISSED_BEATS, Dispatcher, PieceWork, Stopped
from modules.cluster.fleet import ClusterError, OutOfMemoryError, WorkerLostError
from modules.cluster.orders import FileName, Order
from modules.cluster.routing import Need
from modules.errors import RequestError
from tests.support.cluster import VERSIONS, ScriptedFleet, outcome_of, report_of


def dispatcher_of(fleet: ScriptedFleet, **arguments: Any) -> Dispatcher:
    dispatcher = Dispatcher(fleet, VERSIONS, **arguments)
    dispatcher.beat()
    return dispatcher


def fleet_of(*names: str, **fields: Any) -> ScriptedFleet:
    return ScriptedFleet({name: report_of(name) for name in names}, **fields)


def work(*, files: tuple[FileName, ...] = (), **fields: Any) -> PieceWork:
    def make_order(order_id: str) -> Order:
        return Order(order_id=order_id, kind="txt2img", model_key="x", fields={"seed": [7, 8]}, options={}, files=files)

    return PieceWork(
        **{"make_order": make_order, "need": Need(checkpoint="x"), "num_pictures": 2, "picture_work": 1.5, "task_id": "task(1)", **fields}
    )


def colors(outcome: Any) -> list[int]:
    return [picture.getpixel((0, 0))[0] for picture in outcome.pictures]


def test_a_piece_comes_back_from_a_worker() -> None:
    fleet = fleet_of("a")
    dispatcher = dispatcher_of(fleet)
    assert colors(dispatcher.run(work())) == [7, 8]
    assert dispatcher.num_idle() == 1
    assert dispatcher.views()[0].speed == pytest.approx(30)  # two pictures of 1.5 megapixel steps in 0.1 s


def test_a_lost_worker_loses_no_job_and_it_is_said() -> None:
    said: list[str] = []
    fleet = fleet_of("a", "b", "c")

    def behave(worker: str, order: Order, number: int) -> Mapping[str, Any]:
        if len(fleet.started) < 3:
            raise WorkerLostError("killed")
        return {"outcome": outcome_of(order)}

    fleet.behave = behave
    dispatcher = dispatcher_of(fleet)
    assert colors(dispatcher.run(work(on_comment=said.append))) == [7, 8]
    tried = [worker for worker, _ in fleet.started]
    assert len(set(tried)) == 3
    assert said == [f"Made again on {tried[2]} after {tried[0]}, {tried[1]} were lost."]
    assert len({order.order_id for _, order in fleet.started}) == 3
    assert dispatcher.num_tries_again == 2


def test_a_job_is_given_up_after_two_further_tries() -> None:
    fleet = fleet_of("a", "b", "c", "d", behave=raising(WorkerLostError("killed")))
    with pytest.raises(ClusterError, match="were lost one after another") as caught:
        dispatcher_of(fleet).run(work())
    assert len(fleet.started) == 3
    assert caught.value.status == 503


def raising(error: Exception) -> Callable[..., Mapping[str, Any]]:
    def behave(*_: object) -> Mapping[str, Any]:
        raise error

    return behave


def test_the_last_worker_is_tried_again_when_it_is_back() -> None:
    fleet = fleet_of("a")
    fleet.behave = lambda worker, order, number: raising(WorkerLostError("cut"))() if len(fleet.started) == 1 else {"outcome": outcome_of(order)}
    dispatcher = dispatcher_of(fleet)
    beats = threading.Timer(0.2, dispatcher.beat)
    beats.start()
    assert colors(dispatcher.run(work())) == [7, 8]
    beats.join()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"kind": "request", "text": "seed: wrong", "status": 422}, RequestError),
        ({"kind": "memory", "text": "out of memory on cuda:0"}, OutOfMemoryError),
        ({"kind": "error", "text": "KeyError: 'x'"}, RuntimeError),
        ("nonsense", RuntimeError),
    ],
)
def test_an_error_of_the_job_itself_is_not_tried_elsewhere(error: Any, kind: type[Exception]) -> None:
    fleet = fleet_of("a", "b", behave=lambda worker, order, number: {"error": error})
    with pytest.raises(kind):
        dispatcher_of(fleet).run(work())
    assert len(fleet.started) == 1


@pytest.mark.parametrize("answer", [[], {"outcome": b"broken"}, {"preview": b"broken"}, {"error": {"kind": "refused", "text": "disk full"}}])
def test_a_worker_that_cannot_do_it_or_answers_nonsense_is_passed_over(answer: Any) -> None:
    fleet = fleet_of("a", "b")
    fleet.behave = lambda worker, order, number: answer if worker == fleet.started[0][0] else {"outcome": outcome_of(order)}
    assert colors(dispatcher_of(fleet).run(work())) == [7, 8]
    assert len({worker for worker, _ in fleet.started}) == 2


def test_if_no_worker_can_do_it_the_reasons_are_told() -> None:
    fleet = fleet_of("a", "b", on_start=lambda worker, order: {"error": {"kind": "refused", "text": f"no room on {worker}."}})
    with pytest.raises(ClusterError) as caught:
        dispatcher_of(fleet).run(work())
    assert "no room on a." in str(caught.value)
    assert "no room on b." in str(caught.value)


def test_too_many_pictures_are_refused() -> None:
    fleet = fleet_of("a")
    with pytest.raises(ClusterError, match="2 pictures came for an order of 1"):
        dispatcher_of(fleet).run(work(num_pictures=1))


def test_what_the_user_asks_for_is_told_once() -> None:
    wanted: list[str] = []

    def behave(worker: str, order: Order, number: int) -> Mapping[str, Any]:
        if number == 2:
            wanted.append("interrupt")
        return {"outcome": outcome_of(order)} if number == 5 else {"job_no": number, "job_count": 9}

    fleet = fleet_of("a", behave=behave)
    seen: list[int] = []
    dispatcher_of(fleet).run(work(wanted_actions=lambda: list(wanted), on_progress=lambda progress: seen.append(progress.job_no)))
    assert fleet.controls == [("a", "interrupt")]
    assert seen == [1, 2, 3, 4]


def test_a_job_that_is_interrupted_while_it_waits_stops() -> None:
    with pytest.raises(Stopped):
        dispatcher_of(fleet_of()).run(work(wanted_actions=lambda: ["interrupt"]))


def test_without_any_worker_a_job_ends_with_what_to_do() -> None:
    times = iter(range(0, 10_000, 300))
    with pytest.raises(ClusterError, match=r"No worker has joined.*python -m modules\.cluster worker"):
        dispatcher_of(fleet_of(), clock=lambda: float(next(times))).run(work())


def test_a_model_that_fits_no_worker_is_said() -> None:
    with pytest.raises(ClusterError, match=r"No connected worker has a GPU with 9\.0 GiB"):
        dispatcher_of(fleet_of("a")).run(work(need=Need(checkpoint="x", need_bytes=9 << 30)))


def test_a_worker_of_another_version_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    fleet = fleet_of("a")
    fleet.workers["old"] = report_of("old", versions={"protocol": "0"})
    dispatcher = dispatcher_of(fleet)
    refused = {view.report.worker: view.refused for view in dispatcher.views()}
    assert refused["a"] == ""
    assert "Worker old on machine-old is refused: protocol 0 instead of 1" in refused["old"]
    assert "Worker old on machine-old is refused" in caplog.text
    assert dispatcher.num_idle() == 1


def test_a_worker_or_machine_that_is_drained_gets_no_new_jobs() -> None:
    fleet = fleet_of("a", "b")
    changes: list[int] = []
    dispatcher = dispatcher_of(fleet, on_change=changes.append)
    dispatcher.drain("machine-a")
    for _ in range(2):
        dispatcher.run(work())
    assert {worker for worker, _ in fleet.started} == {"b"}
    dispatcher.drain("a", is_draining=False)
    assert dispatcher.num_idle() == 2
    assert changes == [2, 1, 2]
    with pytest.raises(ClusterError, match=r"no worker or machine 'c'.*machine-a, machine-b"):
        dispatcher.drain("c")


def test_a_worker_that_stops_reporting_leaves_after_some_beats(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fleet = fleet_of("a")
    dispatcher = dispatcher_of(fleet)
    report = fleet.workers.pop("a")
    for _ in range(MISSED_BEATS - 1):
        dispatcher.beat()
    assert len(dispatcher.views()) == 1
    dispatcher.beat()
    assert dispatcher.views() == []
    assert dispatcher.num_idle() == 0
    fleet.workers["a"] = {**report, "running": "task(old)"}  # cut off, and still busy with what it had
    dispatcher.beat()
    assert dispatcher.num_idle() == 0
    fleet.workers["a"] = report
    dispatcher.beat()
    assert dispatcher.num_idle() == 1


def test_a_broken_report_harms_no_other_worker() -> None:
    fleet = fleet_of("a")
    fleet.workers["b"] = {"worker": 3}
    assert dispatcher_of(fleet).num_idle() == 1


def test_files_that_a_worker_lacks_are_sent_from_where_they_ended(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"0123456789")
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    file = FileName(kind="checkpoint", name=source.name, size_bytes=10, sha256=sha256)
    fleet = fleet_of("a")
    fleet.on_start = lambda worker, order: {} if fleet.parts else {"missing": [{"sha256": sha256, "have_bytes": 4}]}
    dispatcher_of(fleet).run(work(files=(file,), sources={sha256: source}))
    assert fleet.parts == [("a", 4, b"456789")]


@pytest.mark.parametrize("missing", [[{"sha256": "0" * 64, "have_bytes": 0}], [{"sha256": None}], [{"sha256": "f" * 64, "have_bytes": "x"}]])
def test_a_worker_gets_no_file_that_is_not_the_jobs(tmp_path: Path, missing: list[Any]) -> None:
    source = tmp_path / "secret"
    source.write_bytes(b"secret")
    file = FileName(kind="checkpoint", name="secret", size_bytes=6, sha256="f" * 64)
    fleet = fleet_of("a", on_start=lambda worker, order: {"missing": missing})
    with pytest.raises(ClusterError, match="asks for a file that does not belong to the job"):
        dispatcher_of(fleet).run(work(files=(file,), sources={"f" * 64: source}))
    assert fleet.parts == []


def test_many_pieces_at_once_are_each_made_once() -> None:
    fleet = fleet_of("a", "b", "c")
    dispatcher = dispatcher_of(fleet)
    threads = [threading.Thread(target=dispatcher.run, args=(work(task_id=f"task({number})"),)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(fleet.started) == len({order.order_id for _, order in fleet.started}) == 30
    assert dispatcher.num_idle() == 3
    assert dispatcher.num_waiting() == 0


def test_further_workers_load_the_model_only_if_that_pays() -> None:
    fleet = fleet_of("a", "b")
    dispatcher = dispatcher_of(fleet)
    first = dispatcher.reserve(Need(checkpoint="x"))
    more = dispatcher.reserve_more(Need(checkpoint="x"), 1, first=first, work=8)
    assert [speed for _, speed in more] == [1.0]  # nothing is known about the speed yet, and all have to load
    for name in (first, more[0][0]):
        dispatcher.release(name)
    dispatcher.run(work(first_worker=dispatcher.reserve(Need(checkpoint="y"))))
    (fast,) = (view.report.worker for view in dispatcher.views() if view.speed)
    assert dispatcher.reserve(Need(checkpoint="y")) == fast
    assert dispatcher.reserve_more(Need(checkpoint="y"), 1, first=fast, work=600) == []  # 20 s of work are worth no load of 10 s
    assert len(dispatcher.reserve_more(Need(checkpoint="y"), 1, first=fast, work=1e6)) == 1
