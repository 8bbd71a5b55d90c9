"""The table of pictures, what fills it, and the trash. `tools/bench history` times 100,000 rows; here the plans of the queries are looked at."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from modules.errors import RequestError
from modules.history import scanning
from modules.history.browser import HistoryBrowser
from modules.history.index import HistoryIndex, PictureFacts, Question, match_expression
from modules.history.scanning import Scan
from modules.history.thumbnails import Thumbnails
from modules.history.trash import Trash, picture_below
from modules.pictures.metadata import user_comment_exif


def facts(path: str, infotext: str = "", *, second: int = 1) -> PictureFacts:
    return PictureFacts(path=path, mtime_ns=second * 10**9, num_bytes=10, width=8, height=6, infotext=infotext)


@pytest.fixture
def index(tmp_path: Path) -> HistoryIndex:
    index = HistoryIndex(tmp_path / "history.sqlite3")
    index.put([facts("txt2img/a.png", "red cat\nSteps: 20", second=1), facts("txt2img/b_dog.png", "Red dog", second=2), facts("c.png", "", second=3)])
    return index


def paths(index: HistoryIndex, **question: object) -> list[str]:
    found = Question(**question)  # type: ignore[arg-type]
    rows = [picture.path for picture in index.page(found, 0, 50)]
    assert index.count(found) == len(rows)
    return rows


def test_words_are_found_in_texts_and_names_newest_first(index: HistoryIndex) -> None:
    assert paths(index) == ["c.png", "txt2img/b_dog.png", "txt2img/a.png"]
    assert paths(index, oldest_first=True)[0] == "txt2img/a.png"
    assert paths(index, text="red") == ["txt2img/b_dog.png", "txt2img/a.png"]
    assert paths(index, text="re ca") == ["txt2img/a.png"]
    assert paths(index, text="red -cat") == ["txt2img/b_dog.png"]
    assert paths(index, text='"cat steps"') == ["txt2img/a.png"]
    assert paths(index, text='"steps cat"') == []
    assert paths(index, text="dog", folder="txt2img") == ["txt2img/b_dog.png"]
    assert paths(index, text="dog", folder="elsewhere") == []
    assert index.main_folders() == ["", "txt2img"]


@pytest.mark.parametrize("text", ['"', "'; DROP TABLE pictures; --", "a AND OR NOT", "NEAR(a b)", "*", "^x", "infotext:cat", "-", "--", "(((", "\0"])
def test_nothing_that_is_typed_is_an_operator_or_an_error(index: HistoryIndex, text: str) -> None:
    index.page(Question(text=text), 0, 5)
    assert index.count(Question()) == 3


def test_an_expression_is_made_of_quoted_words_only() -> None:
    assert match_expression("Red cat -dog") == '"Red"* AND "cat"* NOT "dog"*'
    assert match_expression("-dog") == ""
    assert match_expression('a_b "c d') == '"a b"* AND "c"* AND "d"*'


def test_a_star_outlives_the_row(index: HistoryIndex) -> None:
    number = index.page(Question(text="cat"), 0, 1)[0].id
    index.set_star(number, True)
    assert paths(index, only_stars=True) == paths(index, only_stars=True, text="cat") == ["txt2img/a.png"]
    index.forget(["txt2img/a.png"])
    assert paths(index, only_stars=True) == []
    index.put([facts("txt2img/a.png", "blue cat", second=9)])
    assert paths(index, only_stars=True, text="blue") == ["txt2img/a.png"]
    assert paths(index, text="red cat") == []  # the old words are gone
    index.set_star(index.page(Question(only_stars=True), 0, 1)[0].id, False)
    index.forget(["txt2img/a.png"])
    index.put([facts("txt2img/a.png")])
    assert paths(index, only_stars=True) == []


def test_pictures_of_the_same_time_all_stay(index: HistoryIndex) -> None:
    index.put([facts(f"same/{number}.png", second=5) for number in range(20)])
    assert index.count(Question(folder="same")) == 20


def test_no_search_sorts_the_whole_table(index: HistoryIndex) -> None:
    """Every page is a walk from one end of an index: no plan has a temporary B-tree for the order."""
    from modules.history.index import _source

    for question in (Question(), Question(text="red"), Question(folder="txt2img"), Question(only_stars=True)):
        source, values = _source(question)
        with index._open() as db:
            plan = db.execute(f"EXPLAIN QUERY PLAN SELECT number FROM ({source}) ORDER BY number DESC LIMIT 60", values).fetchall()
        assert not any("TEMP B-TREE" in row[3] for row in plan), (question, plan)


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_damaged_table_is_made_anew(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "history.sqlite3"
    file.write_bytes(content)
    index = HistoryIndex(file)
    index.put([facts("a.png")])
    assert paths(index) == ["a.png"]
    index.close()


def save(path: Path, infotext: str = "", size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = PngImagePlugin.PngInfo()
    if infotext:
        data.add_text("parameters", infotext)
    picture = Image.new("RGB", size)
    if path.suffix == ".png":
        picture.save(path, pnginfo=data)
    else:
        picture.save(path, exif=user_comment_exif(infotext))


def infotext_of(path: Path) -> str:
    with Image.open(path) as picture:
        return str(picture.info["parameters"])


def age(folder: Path) -> None:
    """As if the folder had last changed a minute ago."""
    stat = folder.stat()
    os.utime(folder, ns=(stat.st_atime_ns, stat.st_mtime_ns - 60 * 10**9))


def scan(index: HistoryIndex, root: Path) -> int:
    return Scan(index, root, threading.Event()).run()


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, index = tmp_path / "outputs", HistoryIndex(tmp_path / "h.sqlite3")
    save(root / "one" / "a.png", "a lake")
    save(root / "one" / "b.jpg", "a river")
    save(root / "two" / "c.webp", "the sea")
    (root / "one" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (root / "one" / "note.txt").write_text("no picture")
    save(root / ".hidden" / "d.png", "not seen")
    (root / "linked").symlink_to(tmp_path)
    for folder in (root / "one", root / "two", root):
        age(folder)
    assert scan(index, root) == 4
    assert paths(index, text="river") == ["one/b.jpg"]
    assert paths(index, text="sea") == ["two/c.webp"]
    assert [picture.width for picture in index.page(Question(text="broken"), 0, 5)] == [0]
    opened: list[str] = []
    read = scanning.read_facts
    monkeypatch.setattr(scanning, "read_facts", lambda root, path, stat: opened.append(path) or read(root, path, stat))
    listed: list[Path] = []
    scandir = os.scandir
    monkeypatch.setattr(scanning.os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    assert scan(index, root) == 0
    assert (opened, listed) == ([], [])
    save(root / "two" / "e.png", "a pond")
    (root / "two" / "c.webp").unlink()
    assert scan(index, root) == 2
    assert (opened, listed) == (["two/e.png"], [root / "two"])
    assert paths(index, text="sea") == []
    for file in (root / "two").iterdir():
        file.unlink()
    (root / "two").rmdir()
    assert scan(index, root) == 1
    assert paths(index, text="pond") == []


def test_a_folder_that_has_just_changed_is_listed_again(tmp_path: Path) -> None:
    root, index = tmp_path / "outputs", HistoryIndex(tmp_path / "h.sqlite3")
    save(root / "a.png", "a lake")
    scan(index, root)
    assert "" not in index.folders()


def test_deleted_pictures_come_back_with_their_texts_and_never_over_another(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    save(root / "one" / "a.png", "first")
    (root / "one" / "a.txt").write_text("text of it")
    trash = Trash(root)
    assert trash.delete("one/a.png") == "one/a.png"
    assert (list(root.glob("one/*")), trash.list()) == ([], ["one/a.png"])
    save(root / "one" / "a.png", "second")
    assert trash.delete("one/a.png") == "one/a-2.png"
    save(root / "one" / "a.png", "third")
    assert trash.restore("one/a.png") == "one/a-2.png"
    assert infotext_of(root / "one" / "a-2.png") == "first"
    assert (root / "one" / "a-2.txt").read_text() == "text of it"
    assert infotext_of(root / "one" / "a.png") == "third"
    trash.empty()
    assert trash.list() == []


def test_nothing_outside_and_nothing_but_pictures_is_moved(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    save(root / "a.png")
    save(tmp_path / "outside.png")
    (root / "config.json").write_text("{}")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "inner.png").symlink_to(root / "a.png")
    trash = Trash(root)
    for path in ("../outside.png", str(tmp_path / "outside.png"), "link.png", "inner.png", "config.json", "", ".", "missing.png", "a.png\0"):
        with pytest.raises(RequestError, match="no picture of this folder"):
            trash.delete(path)
        with pytest.raises(RequestError, match="no picture of this folder"):
            trash.restore(path)
    assert picture_below(root, "a.png") == (root / "a.png").resolve()
    assert (tmp_path / "outside.png").exists()


def test_a_trash_that_is_a_link_is_not_emptied(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    save(tmp_path / "mine" / "a.png")
    root.mkdir()
    (root / ".trash").symlink_to(tmp_path / "mine")
    trash = Trash(root)
    assert trash.list() == []
    with pytest.raises(RequestError, match="is a link"):
        trash.empty()
    assert (tmp_path / "mine" / "a.png").exists()


def test_thumbnails_are_small_made_once_and_only_of_pictures(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path / "cache")
    save(tmp_path / "wide.png", size=(1024, 100))
    small = thumbnails.of(tmp_path / "wide.png")
    assert small is not None
    with Image.open(small) as picture:
        assert picture.size == (256, 25)
    before = small.stat().st_mtime_ns
    assert thumbnails.of(tmp_path / "wide.png") == small
    assert small.stat().st_mtime_ns == before
    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert thumbnails.of(tmp_path / "broken.png") is None
    assert thumbnails.of(tmp_path / "missing.png") is None


def test_the_browser_finds_deletes_and_puts_back(tmp_path: Path) -> None:
    save(tmp_path / "outputs" / "a.png", "a lake")
    browser = HistoryBrowser(tmp_path / "outputs", tmp_path)
    try:
        assert browser.refresh(wait_s=30) is False
        (picture,) = browser.index.page(Question(text="lake"), 0, 5)
        assert browser.file_of(picture.id)[1].name == "a.png"
        place = browser.delete(picture.id)
        assert browser.index.count(Question()) == 0
        with pytest.raises(RequestError, match="not in the list"):
            browser.file_of(picture.id)
        browser.restore(place)
        browser.refresh(wait_s=30)
        assert paths(browser.index, text="lake") == ["a.png"]
    finally:
        browser.close()
