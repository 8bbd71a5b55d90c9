"""One long-lived thread per slot, which does all work on it. Knows no plan: it is given functions, and does them in order of priority.

The thread owns the slot's device: tasks run with it as the current device and with the slot's number of CPU threads. On CUDA they run on the
device's default stream, so that weights that other threads placed there are ordered with them; only of two slots on one card each has a
stream of its own.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch

from backend.devices.slot import Slot
from backend.memory.recovery import is_out_of_memory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Priority = tuple[float, ...]


class SlotLost(RuntimeError):
    """A slot's device or thread is gone for good. `slot` is it, `cause` what ended it."""

    def __init__(self, slot: Slot, cause: BaseException) -> None:
        self.slot, self.cause = slot, cause
        super().__init__(
            f"{slot} is lost: {type(cause).__name__}: {cause}. Work goes on without it; restart the program to use it again, "
            "and look at the driver's log (dmesg) and at the card's power and temperature if it happens again."
        )


@dataclass(order=True, slots=True)
class _Task:
    """Lower `priority` first, then in the order of submission."""

    priority: Priority
    number: int
    run: Callable[[], Any] = field(compare=False)
    future: Future[Any] = field(compare=False)


@dataclass(slots=True)
class _State:
    """What the thread and the worker share; the thread does not hold the worker, so a dropped worker ends its thread."""

    slot: Slot
    own_stream: bool
    tasks: queue.PriorityQueue[_Task] = field(default_factory=queue.PriorityQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: threading.Event = field(default_factory=threading.Event)
    lost: SlotLost | None = None
    closed: bool = False


class SlotWorker:
    """The worker of one slot. Its thread is a daemon: it never keeps the program from ending."""

    def __init__(self, slot: Slot, *, own_stream: bool = False) -> None:
        """`own_stream`: tasks run on a CUDA stream of this worker, for a card that has another slot too."""
        self.slot = slot
        self._numbers = count()
        self._state = _State(slot, own_stream and slot.torch_device.type == "cuda")
        self._thread = threading.Thread(target=_serve, args=(self._state,), name=f"slot-{slot.index}", daemon=True)
        num_threads = torch.get_num_threads()
        self._thread.start()
        self._state.started.wait()
        # torch also keeps the number for threads to come; they shall have what this thread has.
        torch.set_num_threads(num_threads)
        self._finalizer = weakref.finalize(self, _end, self._state)
        self._finalizer.atexit = False

    @property
    def lost(self) -> SlotLost | None:
        """Why the slot is lost; None while it works."""
        return self._state.lost

    @property
    def num_pending(self) -> int:
        """Tasks that have not begun, cancelled ones included."""
        return self._state.tasks.qsize()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is this worker's thread, where waiting for another of its tasks would wait forever."""
        return threading.current_thread() is self._thread

    def submit(self, fn: Callable[..., Result], *args: Any, priority: Priority = ()) -> Future[Result]:
        """`fn(*args)` on the slot, after all pending tasks of lower or equal `priority`.

        Pending tasks can be cancelled through their future. `fn` runs without gradients, in inference mode where the submitting thread is
        in it, and sees that thread's context variables. What it raises goes to the future. Raises: SlotLost; RuntimeError after `close`.
        """
        future: Future[Result] = Future()
        run = _with_state_of_this_thread(self._state, lambda: fn(*args))
        task = _Task(priority, next(self._numbers), run, future)
        with self._state.lock:
            if self._state.lost is not None:
                raise self._state.lost
            if self._state.closed:
                raise RuntimeError(f"{self.slot} was given work after its worker was closed. Make a new SlotWorker.")
            self._state.tasks.put(task)
        return future

    def warm_up(self) -> Future[None]:
        """Make the device's context and start its libraries before the first real work."""
        return self.submit(_touch, self.slot.torch_device)

    def close(self, *, wait: bool = False) -> None:
        """Cancel what has not begun and let the thread end after what runs now; with `wait`, until it has."""
        _end(self._state)
        if wait and not self.is_own_thread:
            self._thread.join()


# the thread


def _serve(state: _State) -> None:
    """The thread's life: set up, tasks by priority, until closed or lost."""
    try:
        _set_up_thread(state.slot)
    except RuntimeError as error:
        _lose(state, error)
        return
    finally:
        state.started.set()
    try:
        _do_tasks(state)
    except BaseException as error:
        _lose(state, error)
        raise


def _do_tasks(state: _State) -> None:
    while state.lost is None:
        task = state.tasks.get()
        if state.closed:
            task.future.cancel()
            _cancel_pending(state)
            return
        if task.future.set_running_or_notify_cancel():
            _run(state, task)
        del task  # or its result would live until the next one comes


def _set_up_thread(slot: Slot) -> None:
    torch.get_num_threads()  # torch sets a new thread's number on its first question, which must not come after ours
    if slot.cpu_threads is not None:
        torch.set_num_threads(slot.cpu_threads)
    if slot.torch_device.type == "cuda":
        torch.cuda.set_device(slot.torch_device)


def _run(state: _State, task: _Task) -> None:
    try:
        result = task.run()
    except BaseException as error:  # noqa: BLE001 - the future carries it to whoever waits
        _fail(state, task.future, error)
    else:
        task.future.set_result(result)


def _fail(state: _State, future: Future[Any], error: BaseException) -> None:
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error) and _is_gone(state.slot.torch_device):
        future.set_exception(_lose(state, error))
    else:
        future.set_exception(error)


def _is_gone(device: torch.device) -> bool:
    """Whether the device fails even at the least work. A CUDA device does so after an error that spoiled its context."""
    try:
        _touch(device)
    except torch.AcceleratorError:
        return True
    except RuntimeError:  # no room, or anything else that a living device says
        return False
    return False


def _touch(device: torch.device) -> None:
    torch.ones(1, device=device).add(1).cpu()


def _lose(state: _State, cause: BaseException) -> SlotLost:
    """From here on everything fails with the same error."""
    lost = SlotLost(state.slot, cause)
    with state.lock:
        state.lost = lost
        pending = _drain(state)
    logger.error("%s", lost)
    for task in pending:
        if task.future.set_running_or_notify_cancel():
            task.future.set_exception(lost)
    return lost


def _end(state: _State) -> None:
    with state.lock:
        if state.closed:
            return
        state.closed = True
        # Wakes the thread if it waits for work.
        state.tasks.put(_Task((), -1, lambda: None, Future()))
    _cancel_pending(state)


def _cancel_pending(state: _State) -> None:
    with state.lock:
        pending = _drain(state)
        # The thread may have been about to wait: what wakes it must not be taken away with the rest.
        state.tasks.put(_Task((), -1, lambda: None, Future()))
    for task in pending:
        task.future.cancel()


def _drain(state: _State) -> list[_Task]:
    tasks: list[_Task] = []
    while True:
        try:
            tasks.append(state.tasks.get_nowait())
        except queue.Empty:
            return tasks


# what surrounds a task


def _with_state_of_this_thread(state: _State, run: Callable[[], Result]) -> Callable[[], Result]:
    """`run` with the calling thread's context variables and inference mode, and ordered after what it enqueued so far."""
    context = contextvars.copy_context()
    inference = torch.is_inference_mode_enabled()
    ready = _mark_stream(state.slot.torch_device) if state.own_stream else None

    def run_there() -> Result:
        with torch.inference_mode() if inference else torch.no_grad(), _on_device(state, ready):
            return context.run(run)

    return run_there


def _mark_stream(device: torch.device) -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def _on_device(state: _State, ready: Any) -> Iterator[None]:
    """The slot's device as the current one. On a stream of its own, the task waits for `ready`, and later work of others for the task."""
    device = state.slot.torch_device
    if device.type != "cuda":
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.cuda.device(device))
        if not state.own_stream:
            yield
            return
        stream = _stream_of_this_thread(device)
        stack.enter_context(torch.cuda.stream(stream))
        stream.wait_event(ready)
        yield
        torch.cuda.default_stream(device).wait_stream(stream)


_thread = threading.local()


def _stream_of_this_thread(device: torch.device) -> Any:
    if not hasattr(_thread, "stream"):
        _thread.stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
    return _thread.stream
