"""Pictures are encoded while the job goes on, and every one of them is on disk, in order, when the job's result is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.application import Application
from modules.pictures import images
from modules.scripts import callbacks
from tests.support.fleets import configured_slots
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

LIMIT_S = 60


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with configured_slots("cpu"), narrow_application(tmp_path_factory.mktemp("saving"), "sd15", is_shallow=True) as (made, _):
        made.options.set("stealth_pnginfo_option", "None")
        yield made


@pytest.fixture
def folder(app: Application, tmp_path: Path) -> Path:
    app.options.data["outdir_txt2img_samples"] = str(tmp_path)
    app.options.data["save_to_dirs"] = False
    return tmp_path


def _job(**fields: Any) -> Any:
    return run(txt2img(steps=2, width=32, height=32, do_not_save_grid=True, **fields))


def test_a_batch_is_encoded_while_the_next_one_is_sampled(app: Application, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, overlapped, encode, batches = threading.Event(), [], images.write_image, []
    ensure_loaded = app.models.ensure_loaded

    def next_batch(*args: Any, **kwargs: Any) -> Any:
        batches.append(1)
        if len(batches) == 3:  # once for the job, and once for each batch
            began.set()
        return ensure_loaded(*args, **kwargs)

    def slow(*args: Any, **kwargs: Any) -> Any:
        overlapped.append(began.wait(LIMIT_S))
        return encode(*args, **kwargs)

    monkeypatch.setattr(app.models, "ensure_loaded", next_batch)
    monkeypatch.setattr(images, "write_image", slow)
    done = _job(n_iter=2)
    assert overlapped == [True, True], "the first picture was not written before the second batch began"
    assert len(list(folder.iterdir())) == len(done.images) == 2


def test_all_pictures_are_there_in_order_with_their_own_names_and_texts(folder: Path) -> None:
    done = _job(n_iter=2, batch_size=2, seed=5)
    files = sorted(folder.iterdir())
    assert [path.name[:7] for path in files] == [f"0000{number}-{5 + number}" for number in range(4)]
    for path, picture, text in zip(files, done.images, done.infotexts, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(pixels(image), pixels(picture))
            assert image.info["parameters"] == text


def test_names_are_made_from_the_picture_s_own_batch(app: Application, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.options.data, "samples_filename_pattern", "[batch_number]-[seed]")
    _job(n_iter=2, batch_size=2, seed=5)
    assert [path.stem.partition("-")[2] for path in sorted(folder.iterdir())] == ["1-5", "2-6", "1-7", "2-8"]


def test_a_picture_that_cannot_be_written_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise images.ImageSaveError("the disk is full")

    monkeypatch.setattr(images, "write_image", fail)
    done = _job(n_iter=2)
    assert len(done.images) == 2
    assert "the disk is full" in done.comments


def test_pictures_of_a_job_that_fails_later_are_kept(app: Application, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_loaded, calls = app.models.ensure_loaded, []

    def fail_at_the_second_batch(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("made up")
        return ensure_loaded(*args, **kwargs)

    monkeypatch.setattr(app.models, "ensure_loaded", fail_at_the_second_batch)
    with pytest.raises(RuntimeError, match="made up"):
        _job(n_iter=2)
    assert len(list(folder.iterdir())) == 1


def test_who_listens_to_saving_is_called_on_the_jobs_thread(folder: Path) -> None:
    threads = []

    def note(params: Any) -> None:
        threads.append(threading.current_thread())

    callbacks.on_image_saved(note)
    try:
        _job()
    finally:
        callbacks.remove_callbacks_for_function(note)
    assert threads == [threading.current_thread()]
