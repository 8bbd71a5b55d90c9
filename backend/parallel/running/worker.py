"""One long-lived thread per slot, which does all work on it. Knows no plan: it runs the functions it is given, in order of priority.

The thread owns the slot's device: tasks run with it as the current device and with the slot's number of CPU threads. On CUDA they run on the
device's default stream, so that they are ordered with weights that other threads placed there. Only when two slots share a card does each
worker use its own stream.
"""

from __future__ import annotations

import contextvars
import heapq
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch

from backend.devices.slot import Slot
from backend.memory.recovery import is_out_of_memory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Priority = tuple[float, ...]


class SlotLost(RuntimeError):
    """A slot's device or thread is gone for good. `slot` is the slot, `cause` what ended it."""

    def __init__(self, slot: Slot, cause: BaseException) -> None:
        self.slot, self.cause = slot, cause
        super().__init__(
            f"{slot} is lost: {type(cause).__name__}: {cause}. Work goes on without it; restart the program to use it again, "
            "and look at the driver's log (dmesg) and at the card's power and temperature if it happens again."
        )


@dataclass(order=True, slots=True)
class _Task:
    """Lower `priority` first, then in order of submission."""

    priority: Priority
    number: int
    run: Callable[[], Any] = field(compare=False)
    future: Future[Any] = field(compare=False)


class _Tasks:
    """Tasks by priority, from any thread to one. Locks and waits in C: with queue.PriorityQueue a task costs twenty calls more."""

    def __init__(self) -> None:
        self._heap: list[_Task] = []
        self._lock = threading.Lock()
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()
        """One for each task in the heap."""

    def put(self, task: _Task) -> None:
        with self._lock:
            heapq.heappush(self._heap, task)
        self._signals.put(None)

    def get(self) -> _Task:
        """The first task; waits for one."""
        while True:
            self._signals.get()
            with self._lock:
                if self._heap:
                    return heapq.heappop(self._heap)

    def drain(self) -> list[_Task]:
        """All tasks, without waiting."""
        with self._lock:
            tasks, self._heap = sorted(self._heap), []
        return tasks

    def __len__(self) -> int:
        return len(self._heap)


@dataclass(slots=True)
class _State:
    """What the thread and the worker share. The thread has no reference to the worker, so dropping the worker ends the thread."""

    slot: Slot
    own_stream: bool
    tasks: _Tasks = field(default_factory=_Tasks)
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: threading.Event = field(default_factory=threading.Event)
    lost: SlotLost | None = None
    closed: bool = False


class SlotWorker:
    """The worker of one slot. Its thread is a daemon: it never keeps the program from ending."""

    def __init__(self, slot: Slot, *, own_stream: bool = False) -> None:
        """`own_stream`: run tasks on a separate CUDA stream, for a card with more than one slot."""
        self.slot = slot
        self._numbers = count()
        self._state = _State(slot, own_stream and slot.torch_device.type == "cuda")
        self._thread = threading.Thread(target=_serve, args=(self._state,), name=f"slot-{slot.index}", daemon=True)
        num_threads = torch.get_num_threads()
        self._thread.start()
        self._state.started.wait()
        # The new thread's setting also becomes torch's default for later threads; restore this thread's number for them.
        torch.set_num_threads(num_threads)
        self._finalizer = weakref.finalize(self, _end, self._state)
        self._finalizer.atexit = False

    @property
    def lost(self) -> SlotLost | None:
        """Why the slot is lost; None while it works."""
        return self._state.lost

    @property
    def num_pending(self) -> int:
        """Tasks that have not started, including cancelled ones."""
        return len(self._state.tasks)

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is this worker's thread. Waiting there for another task of this worker would deadlock."""
        return threading.current_thread() is self._thread

    def submit(self, fn: Callable[..., Result], *args: Any, priority: Priority = ()) -> Future[Result]:
        """Run `fn(*args)` on the slot, after all pending tasks of lower or equal `priority`.

        A pending task can be cancelled through its future. `fn` runs without gradients, in inference mode if the submitting thread is in it,
        and sees that thread's context variables. Its exceptions go to the future. Raises: SlotLost; RuntimeError after `close`.
        """
        future: Future[Result] = Future()
        run = _with_state_of_this_thread(self._state, partial(fn, *args))
        task = _Task(priority, next(self._numbers), run, future)
        with self._state.lock:
            if self._state.lost is not None:
                raise self._state.lost
            if self._state.closed:
                raise RuntimeError(f"{self.slot} was given work after its worker was closed. Create a new SlotWorker.")
            self._state.tasks.put(task)
        return future

    def warm_up(self) -> Future[None]:
        """Create the device's context and load its libraries before the first real work."""
        return self.submit(_touch, self.slot.torch_device)

    def close(self, *, wait: bool = False) -> None:
        """Cancel tasks that have not started and let the thread end after the current one. With `wait`, return when it has ended."""
        _end(self._state)
        if wait and not self.is_own_thread:
            self._thread.join()


# the thread


def _serve(state: _State) -> None:
    """The thread's main function: set up, then run tasks by priority until closed or lost."""
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
        del task  # otherwise its result would live until the next task arrives


def _set_up_thread(slot: Slot) -> None:
    torch.set_grad_enabled(False)  # of this thread
    torch.get_num_threads()  # torch sets a new thread's number at the first query, which must come before our own setting
    if slot.cpu_threads is not None:
        torch.set_num_threads(slot.cpu_threads)
    if slot.torch_device.type == "cuda":
        torch.cuda.set_device(slot.torch_device)


def _run(state: _State, task: _Task) -> None:
    try:
        result = task.run()
    except BaseException as error:  # noqa: BLE001 - the future passes it to the waiting thread
        _fail(state, task.future, error)
    else:
        task.future.set_result(result)


def _fail(state: _State, future: Future[Any], error: BaseException) -> None:
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error) and _is_gone(state.slot.torch_device):
        future.set_exception(_lose(state, error))
    else:
        future.set_exception(error)


def _is_gone(device: torch.device) -> bool:
    """Whether the device fails even a trivial computation, as a CUDA device does after an error that corrupted its context."""
    try:
        _touch(device)
    except torch.AcceleratorError:
        return True
    except RuntimeError:  # out of memory, or anything else that a live device reports
        return False
    return False


def _touch(device: torch.device) -> None:
    torch.ones(1, device=device).add(1).cpu()


def _lose(state: _State, cause: BaseException) -> SlotLost:
    """Mark the slot lost. From now on every task fails with the same error."""
    lost = SlotLost(state.slot, cause)
    with state.lock:
        state.lost = lost
        pending = state.tasks.drain()
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
        # Wake the thread if it is waiting for work.
        state.tasks.put(_Task((), -1, lambda: None, Future()))
    _cancel_pending(state)


def _cancel_pending(state: _State) -> None:
    with state.lock:
        pending = state.tasks.drain()
        # The thread may be about to wait, and draining removed the task that wakes it: add another.
        state.tasks.put(_Task((), -1, lambda: None, Future()))
    for task in pending:
        task.future.cancel()


# what surrounds a task


def _with_state_of_this_thread(state: _State, run: Callable[[], Result]) -> Callable[[], Result]:
    """`run` with the calling thread's context variables and inference mode, ordered after what that thread has enqueued so far."""
    context = contextvars.copy_context()
    inference = torch.is_inference_mode_enabled()
    ready = _mark_stream(state.slot.torch_device) if state.own_stream else None

    if state.slot.torch_device.type != "cuda":
        return partial(_run_in_mode, inference, context, run)

    def run_there() -> Result:
        with _on_device(state, ready):
            return _run_in_mode(inference, context, run)

    return run_there


def _run_in_mode(inference: bool, context: contextvars.Context, run: Callable[[], Result]) -> Result:
    """Without gradients, which the thread has off."""
    if not inference:
        return context.run(run)
    with torch.inference_mode():
        return context.run(run)


def _mark_stream(device: torch.device) -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def _on_device(state: _State, ready: Any) -> Iterator[None]:
    """Make the slot's device current. On a separate stream, the task also waits for `ready`, and the default stream then waits for the task."""
    device = state.slot.torch_device
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
