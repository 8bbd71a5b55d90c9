from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from PIL import Image

from modules.jobs.live_preview import PreviewMaker, PreviewThread, apply_projection, fit_projection
from modules.jobs.state import State
from modules.settings.options import Options
from modules.settings.table import build_option_table

MATRIX = torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.2, 0.1], [-0.1, 0.0, 0.2], [0.05, -0.2, 0.1]])
CONSTANT = torch.tensor([0.5, 0.4, 0.6])


def decode(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """A linear VAE: 8 times larger, -1..1."""
    colors = torch.einsum("bchw,cd->bdhw", latents_BCHW, MATRIX) + CONSTANT[:, None, None]
    return colors.repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1


class Network(torch.nn.Module):
    pass


class Engine:
    def __init__(self) -> None:
        vae = type("Vae", (), {"first_stage_model": Network(), "latent_channels": 4})()
        self.forge_objects = type("Objects", (), {"vae": vae})()
        self.num_decodes = 0

    def decode_first_stage(self, x: torch.Tensor) -> torch.Tensor:
        self.num_decodes += 1
        return decode(x)


def settings(**changes: Any) -> Any:
    return Options(build_option_table({})).snapshot(changes)


def test_the_fit_finds_a_linear_vae() -> None:
    projection = fit_projection(decode, 4)
    assert torch.allclose(projection[:4], MATRIX, atol=1e-4)
    assert torch.allclose(projection[4], CONSTANT, atol=1e-4)


def test_the_projection_gives_the_decoded_colours() -> None:
    latent = torch.randn(4, 6, 5) * 0.3
    expected = torch.nn.functional.avg_pool2d(decode(latent[None]), 8)[0].add(1).div(2)
    assert torch.allclose(apply_projection(latent, torch.cat([MATRIX, CONSTANT[None]])), expected.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(("method", "size"), [("Approx cheap", (5, 6)), ("Approx NN", (5, 6)), ("TAESD", (5, 6)), ("Full", (40, 48))])
def test_every_method_gives_a_picture(method: str, size: tuple[int, int]) -> None:
    picture = PreviewMaker(Engine(), settings(show_progress_type=method))(torch.randn(1, 4, 6, 5))
    assert isinstance(picture, Image.Image)
    assert picture.size == size


def test_the_vae_is_asked_once_for_cheap_previews() -> None:
    engine = Engine()
    maker = PreviewMaker(engine, settings(show_progress_type="Approx cheap"))
    for _ in range(3):
        maker(torch.randn(1, 4, 6, 5))
    assert engine.num_decodes == 1


def test_a_batch_is_a_grid_or_its_first_picture() -> None:
    latents = torch.randn(4, 4, 6, 5)
    grid = PreviewMaker(Engine(), settings())(latents)
    first = PreviewMaker(Engine(), settings(show_progress_grid=False))(latents)
    assert grid is not None
    assert first is not None
    assert (grid.size, first.size) == ((10, 12), (5, 6))


def test_previews_are_made_at_the_cadence_of_the_settings() -> None:
    clock = [0.0]
    maker = PreviewMaker(Engine(), settings(show_progress_every_n_steps=3, live_preview_refresh_period=1000), now=lambda: clock[0])
    due = []
    for step in range(1, 13):
        clock[0] += 0.4
        due.append(maker.due(step))
    assert [step for step, is_due in enumerate(due, start=1) if is_due] == [3, 6, 9, 12]
    fast = PreviewMaker(Engine(), settings(show_progress_every_n_steps=1, live_preview_refresh_period=1000), now=lambda: clock[0])
    assert [fast.due(1), fast.due(2)] == [True, False]
    clock[0] += 1
    assert fast.due(3) is True
    assert fast.due(1) is False


@pytest.mark.parametrize("changes", [{"live_previews_enable": False}, {"show_progress_every_n_steps": -1}])
def test_previews_can_be_off(changes: dict[str, Any]) -> None:
    assert PreviewMaker(Engine(), settings(**changes)).due(30) is False


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("vgpu:0 out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")])
def test_a_preview_that_finds_no_room_is_left_out(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    engine, latents_BCHW = Engine(), torch.randn(1, 4, 6, 5)
    make = PreviewMaker(engine, settings(show_progress_type="Full"))

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(engine, "decode_first_stage", fail)
        assert make(latents_BCHW) is None
    assert make(latents_BCHW) is not None


def test_a_preview_that_fails_otherwise_is_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setattr(engine, "decode_first_stage", lambda x: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        PreviewMaker(engine, settings(show_progress_type="Full"))(torch.randn(1, 4, 6, 5))


class SlowMaker(PreviewMaker):
    """A maker that waits until it may go on."""

    def __init__(self) -> None:
        super().__init__(Engine(), settings())
        self.may_go_on, self.threads = threading.Event(), []

    @property
    def is_light(self) -> bool:
        return True

    def __call__(self, latents_BCHW: torch.Tensor) -> Image.Image:
        self.threads.append(threading.current_thread())
        assert self.may_go_on.wait(60)
        return Image.new("RGB", (latents_BCHW.shape[-1], 1))


def running_state(maker: PreviewMaker) -> State:
    state = State()
    state.begin("job")
    state.preview_maker, state.current_latent = maker, torch.zeros(1, 4, 2, 7)
    return state


def test_a_preview_never_delays_a_step_and_is_left_out_while_one_is_made() -> None:
    previews, maker = PreviewThread(), SlowMaker()
    state = running_state(maker)
    for step in range(1, 4):
        state.sampling_step = step
        previews.show(state, maker)  # returns while the first is still being made
    assert state.current_image is None
    maker.may_go_on.set()
    previews.wait()
    assert state.current_image is not None and state.current_image.size == (7, 1)
    assert (state.id_live_preview, state.current_image_sampling_step) == (1, 1)
    assert len(maker.threads) == 1 and maker.threads[0] is not threading.current_thread()


@pytest.mark.parametrize("what", ["a finished picture", "the end", "another pass"])
def test_a_late_preview_does_not_replace_what_came_meanwhile(what: str) -> None:
    previews, maker = PreviewThread(), SlowMaker()
    state, finished = running_state(maker), Image.new("RGB", (3, 3))
    previews.show(state, maker)
    if what == "a finished picture":
        state.assign_current_image(finished)
    elif what == "the end":
        state.end()
    else:
        state.preview_maker = PreviewMaker(Engine(), settings())
    maker.may_go_on.set()
    previews.wait()
    assert state.current_image is (finished if what == "a finished picture" else None)


def test_previews_that_take_the_vae_are_made_on_the_jobs_thread() -> None:
    engine, previews = Engine(), PreviewThread()
    full, cheap = (PreviewMaker(engine, settings(show_progress_type=name)) for name in ("Full", "Approx cheap"))
    assert not full.is_light
    assert not cheap.is_light, "its colors are not fitted yet"
    state = running_state(cheap)
    previews.show(state, cheap)
    assert state.id_live_preview == 1
    assert cheap.is_light


def test_a_preview_that_fails_beside_the_job_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    engine, previews = Engine(), PreviewThread()
    maker = PreviewMaker(engine, settings())
    assert maker(torch.zeros(1, 4, 6, 5)) is not None
    state = running_state(maker)
    state.current_latent = torch.zeros(1, 9, 6, 5)
    previews.show(state, maker)
    previews.wait()
    assert state.current_image is None
    assert "No preview at step" in caplog.text


def test_steps_or_parts_are_shown() -> None:
    assert not PreviewMaker(Engine(), settings()).shows_parts
    parts = PreviewMaker(Engine(), settings(show_progress_every_n_steps=-1))
    state = running_state(parts)
    state.nextjob()
    assert (parts.shows_parts, state.id_live_preview) == (True, 1)
    state = running_state(PreviewMaker(Engine(), settings()))
    state.nextjob()
    assert state.id_live_preview == 0
