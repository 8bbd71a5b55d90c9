"""Workers: order, cancellation, errors, threads, and a lost slot."""

from __future__ import annotations

import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest
import torch

from backend.devices import virtual_gpu
from backend.devices.slot import Slot
from backend.parallel.running.worker import SlotLost, SlotWorker

MIB = 2**20
ROOT_DIR = Path(__file__).parents[4]


def make_slot(device: torch.device | str = "cpu", index: int = 0, cpu_threads: int | None = None) -> Slot:
    return Slot(index, torch.device(device), "test slot", 64 * MIB, cpu_threads=cpu_threads)


@pytest.fixture
def worker() -> Iterator[SlotWorker]:
    worker = SlotWorker(make_slot())
    yield worker
    worker.close(wait=True)


class Gate:
    """A task that blocks a worker until it is opened."""

    def __init__(self, worker: SlotWorker) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.future = worker.submit(self._wait)
        assert self.entered.wait(10)

    def _wait(self) -> None:
        self.entered.set()
        assert self.opened.wait(10)

    def open(self) -> None:
        self.opened.set()
        self.future.result(10)


def test_tasks_run_in_one_thread_of_the_slot(worker: SlotWorker) -> None:
    threads = {worker.submit(threading.current_thread).result(10) for _ in range(3)}
    (thread,) = threads
    assert thread.name == "slot-0"
    assert thread.daemon
    assert worker.submit(lambda: worker.is_own_thread).result(10)
    assert not worker.is_own_thread


def test_arguments_go_in_and_the_result_comes_out(worker: SlotWorker) -> None:
    assert worker.submit(lambda a, b: a - b, 5, 3).result(10) == 2


def test_lower_priority_goes_first_and_equals_keep_their_order(worker: SlotWorker) -> None:
    gate, order = Gate(worker), []
    futures = [
        worker.submit(order.append, name, priority=priority)
        for name, priority in (("c", (1, 5)), ("a", (0, 9)), ("d", (1, 5)), ("e", (2,)), ("b", (1, 0)), ("first", ()))
    ]
    gate.open()
    for future in futures:
        future.result(10)
    assert order == ["first", "a", "b", "c", "d", "e"]


def test_a_pending_task_can_be_cancelled_and_never_runs(worker: SlotWorker) -> None:
    gate, ran = Gate(worker), []
    doomed, other = worker.submit(ran.append, "doomed"), worker.submit(ran.append, "other")
    assert doomed.cancel()
    gate.open()
    other.result(10)
    assert ran == ["other"]
    with pytest.raises(CancelledError):
        doomed.result(10)


def test_an_exception_goes_to_the_future_and_the_worker_works_on(worker: SlotWorker) -> None:
    def fail() -> None:
        raise KeyError("inner")

    with pytest.raises(KeyError, match="inner"):
        worker.submit(fail).result(10)
    assert worker.submit(lambda: 1).result(10) == 1
    assert worker.lost is None


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_even_what_ends_programs_ends_only_the_task(worker: SlotWorker, error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert worker.submit(fail).exception(10) is error
    assert worker.submit(lambda: 1).result(10) == 1


def test_no_result_is_kept_alive_by_the_worker(worker: SlotWorker) -> None:
    future: Future[torch.Tensor] = worker.submit(torch.zeros, 3)
    alive = weakref.ref(future.result(10))
    worker.submit(lambda: None).result(10)
    del future
    gc.collect()
    assert alive() is None


def test_work_is_without_gradients_and_inherits_inference_mode(worker: SlotWorker) -> None:
    def state() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert worker.submit(state).result(10) == (False, False)
    with torch.inference_mode():
        inside = worker.submit(state)
    assert inside.result(10) == (False, True)
    assert worker.submit(state).result(10) == (False, False)


def test_a_task_sees_the_context_variables_of_its_submitter(worker: SlotWorker) -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("of the submitter")
    assert worker.submit(variable.get).result(10) == "of the submitter"


def test_each_cpu_slot_has_a_separate_number_of_threads() -> None:
    before = torch.get_num_threads()
    workers = [SlotWorker(make_slot(index=index, cpu_threads=num)) for index, num in enumerate((2, 1, 3))]
    try:
        assert [worker.submit(torch.get_num_threads).result(10) for worker in workers] == [2, 1, 3]
        assert torch.get_num_threads() == before
        reports = [worker.submit(torch.__config__.parallel_info).result(10) for worker in workers]
        assert [f"omp_get_max_threads() : {num}" in report for num, report in zip((2, 1, 3), reports)] == [True] * 3
        # Threads created later do not inherit a worker's settings.
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [before]
    finally:
        for worker in workers:
            worker.close(wait=True)


def test_two_workers_run_at_the_same_time() -> None:
    workers = [SlotWorker(make_slot(index=index)) for index in range(2)]
    meeting = threading.Barrier(2, timeout=10)
    futures = [worker.submit(meeting.wait) for worker in workers]
    assert sorted(future.result(10) for future in futures) == [0, 1]
    for worker in workers:
        worker.close(wait=True)


def test_closing_cancels_what_waits_and_refuses_more() -> None:
    worker = SlotWorker(make_slot())
    gate = Gate(worker)
    waiting = worker.submit(lambda: None)
    worker.close()
    worker.close()
    gate.open()
    with pytest.raises(CancelledError):
        waiting.result(10)
    with pytest.raises(RuntimeError, match="after its worker was closed"):
        worker.submit(lambda: None)
    worker.close(wait=True)


def test_a_dropped_worker_ends_its_thread() -> None:
    worker = SlotWorker(make_slot())
    thread = worker.submit(threading.current_thread).result(10)
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_the_program_ends_with_a_worker_in_the_middle_of_a_task() -> None:
    script = (
        "import threading, torch\n"
        "from backend.devices.slot import Slot\n"
        "from backend.parallel.running.worker import SlotWorker\n"
        "worker = SlotWorker(Slot(0, torch.device('cpu'), 'x', 1))\n"
        "begun = threading.Event()\n"
        "worker.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "worker.submit(lambda: None)\n"
        "begun.wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT_DIR, timeout=60, check=False)
    assert done.returncode == 0


# lost slots


@pytest.fixture
def device() -> Iterator[torch.device]:
    (device,) = virtual_gpu.install((64 * MIB,))
    yield device
    virtual_gpu.get_device(device).set_faults(None)


def test_a_lost_device_fails_running_waiting_and_later_tasks(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    worker = SlotWorker(make_slot(device, index=1))
    gate = Gate(worker)
    waiting, cancelled = (worker.submit(lambda: 1, priority=(1,)) for _ in range(2))
    cancelled.cancel()
    running = worker.submit(lambda: torch.zeros(3, device=device), priority=(0,))
    virtual_gpu.get_device(device).set_faults(virtual_gpu.Faults(lost_at_operation=1))
    gate.open()
    for future in (running, waiting):
        error = future.exception(10)
        assert isinstance(error, SlotLost)
        assert error.slot.index == 1
        assert isinstance(error.cause, torch.AcceleratorError)
    with pytest.raises(SlotLost, match="slot 1: vgpu:0 test slot, 64 MiB is lost: AcceleratorError"):
        worker.submit(lambda: None)
    assert worker.lost is running.exception()
    assert "is lost" in caplog.text
    worker.close(wait=True)


def test_out_of_memory_loses_no_slot(device: torch.device) -> None:
    worker = SlotWorker(make_slot(device))
    virtual_gpu.get_device(device).set_faults(virtual_gpu.Faults(out_of_memory_at=frozenset({1})))
    with pytest.raises(torch.OutOfMemoryError):
        worker.submit(lambda: torch.zeros(3, device=device)).result(10)
    assert worker.submit(lambda: torch.ones(3, device=device).sum().item()).result(10) == 3
    worker.close(wait=True)


def test_an_accelerator_error_that_the_device_survives_loses_no_slot(device: torch.device) -> None:
    worker = SlotWorker(make_slot(device))

    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: invalid configuration argument")

    with pytest.raises(torch.AcceleratorError):
        worker.submit(fail).result(10)
    assert worker.lost is None
    worker.warm_up().result(10)
    worker.close(wait=True)


def test_a_thread_that_cannot_begin_is_a_lost_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: object) -> None:
        raise RuntimeError("CUDA error: device unavailable")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    worker = SlotWorker(make_slot("cuda:0"))
    with pytest.raises(SlotLost, match="device unavailable"):
        worker.submit(lambda: None)


@pytest.mark.gpu
def test_two_workers_on_one_card_are_ordered_with_their_submitters() -> None:
    workers = [SlotWorker(make_slot("cuda:0", index=index), own_stream=True) for index in range(2)]
    x = torch.full((1024, 1024), 2.0, device="cuda:0")
    first = workers[0].submit(lambda: x @ x).result(60)
    second = workers[1].submit(lambda: first + x).result(60)
    assert torch.equal((second - x).cpu(), torch.full((1024, 1024), 4096.0))
    for worker in workers:
        worker.close(wait=True)
