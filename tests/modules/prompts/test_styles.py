from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import RequestError
from modules.prompts.styles import (
    PromptStyle,
    StyleDatabase,
    StylesFileError,
    apply_style,
    apply_styles_to_prompt,
    merge_prompts,
    read_styles,
    remove_style,
)
from modules.prompts.styles_file import StylesFile, parse_styles_file

CSV = '\ufeffname,prompt,negative_prompt\nphoto,"photo of {prompt}, sharp",blurry\nfilm,film grain,\n'


@pytest.fixture
def database(tmp_path: Path) -> StyleDatabase:
    (tmp_path / "styles.csv").write_text(CSV, encoding="utf-8")
    return StyleDatabase(tmp_path / "styles.csv")


# one style


@pytest.mark.parametrize(
    ("prompt", "style", "result"),
    [
        ("a cat", "film grain", "a cat, film grain"),
        (" a cat ", " film grain ", "a cat, film grain"),
        ("", "film grain", "film grain"),
        ("a cat", "", "a cat"),
        ("a cat", None, "a cat"),
        ("a cat", "photo of {prompt}, sharp", "photo of a cat, sharp"),
        ("a cat", "{prompt} and {prompt}", "a cat and a cat"),
    ],
)
def test_a_style_is_put_into_a_prompt(prompt: str, style: str | None, result: str) -> None:
    assert apply_style(prompt, style) == result
    assert style is None or merge_prompts(style, prompt) == result


@pytest.mark.parametrize(
    ("prompt", "style", "result"),
    [
        ("a cat, film grain", "film grain", "a cat"),
        ("film grain", "film grain", ""),
        ("a film grain", "film grain", None),
        ("photo of a cat, sharp", "photo of {prompt}, sharp", "a cat"),
        ("photo of, sharp", "photo of, {prompt}, sharp", None),
        ("a cat and a cat", "{prompt} and {prompt}", None),
        ("a cat", "", "a cat"),
    ],
)
def test_a_style_is_found_in_a_prompt(prompt: str, style: str, result: str | None) -> None:
    assert remove_style(prompt, style) == result


def words() -> st.SearchStrategy[str]:
    return st.text("abc ,é", min_size=1, max_size=10).map(str.strip).filter(bool)


@given(words(), st.one_of(words(), st.tuples(words(), words()).map("{prompt}".join)))
def test_what_was_put_in_is_taken_out_again(prompt: str, style: str) -> None:
    assert remove_style(apply_style(prompt, style), style) == prompt


def test_several_styles_are_put_in_their_order() -> None:
    assert apply_styles_to_prompt("a", ["b", "[{prompt}]", None, "c"]) == "[a, b], c"


# a file


def test_styles_are_read_and_applied(database: StyleDatabase) -> None:
    assert database.names() == ["photo", "film"]
    assert database.apply_styles_to_prompt("a cat", ["photo", "nobody", "film"]) == "photo of a cat, sharp, film grain"
    assert database.apply_negative_styles_to_prompt("bad", ["photo", "film"]) == "bad, blurry"
    assert database.get_style_prompts(["photo", "nobody"]) == ["photo of {prompt}, sharp", ""]
    assert database.get_negative_style_prompts(["photo"]) == ["blurry"]


def test_styles_are_taken_out_of_an_infotext_s_prompts(database: StyleDatabase) -> None:
    names = ["photo", "film"]
    prompt, negative = database.apply_styles_to_prompt("a cat", names), database.apply_negative_styles_to_prompt("bad", names)
    assert database.extract_styles_from_prompt(prompt, negative) == (names, "a cat", "bad")
    assert database.extract_styles_from_prompt("photo of a cat, sharp", "no match") == ([], "photo of a cat, sharp", "no match")


def test_a_style_that_leaves_no_trace_is_never_found(tmp_path: Path) -> None:
    (tmp_path / "styles.csv").write_text("name,prompt,negative_prompt\nsame,{prompt},\nnone,,\n")
    assert StyleDatabase(tmp_path / "styles.csv").extract_styles_from_prompt("a", "b") == ([], "a", "b")


def test_a_missing_file_holds_none(tmp_path: Path) -> None:
    assert StyleDatabase([tmp_path / "styles.csv"]).names() == []


def test_the_old_column_name_and_missing_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "styles.csv").write_text('name,text\nold,"two\nlines"\n,nameless\nshort\n')
    assert read_styles(tmp_path / "styles.csv") == [
        PromptStyle("old", "two\nlines", "", str(tmp_path / "styles.csv")),
        PromptStyle("short", "", "", str(tmp_path / "styles.csv")),
    ]


@pytest.mark.parametrize("content", [b"name,prompt\n\xff\xfe\xfa,x\n", b"name,prompt\na," + b"x" * 200_000 + b"\n"])
def test_a_file_that_cannot_be_read_is_reported_and_never_written_over(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "styles.csv").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        database = StyleDatabase(tmp_path / "styles.csv")
    assert "styles.csv" in caplog.text and database.names() == []
    with pytest.raises(StylesFileError, match=r"move (it|the file) away"):
        database.save_style(PromptStyle("new", "a", ""))
    assert (tmp_path / "styles.csv").read_bytes() == content
    assert database.names() == []


# writing


def test_a_saved_style_is_there_for_the_next_start(database: StyleDatabase) -> None:
    path = database.paths[0]
    database.save_style(PromptStyle("new", 'with "quotes", and\ntwo lines', "é"))
    database.save_style(PromptStyle("film", "grain", ""))
    again = StyleDatabase(path)
    assert again.styles == database.styles
    assert again.styles["new"] == PromptStyle("new", 'with "quotes", and\ntwo lines', "é", str(path))
    assert again.names() == ["photo", "film", "new"]
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # so that spreadsheets read it as UTF-8


def test_the_last_state_is_kept_beside_it(database: StyleDatabase) -> None:
    database.save_style(PromptStyle("new", "a", ""))
    backup = database.paths[0].with_name("styles.csv.bak")
    with backup.open(encoding="utf-8-sig", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["photo", "film"]


def test_a_deleted_style_is_gone(database: StyleDatabase) -> None:
    database.delete_style("photo")
    database.delete_style("nobody")
    assert database.names() == StyleDatabase(database.paths[0]).names() == ["film"]


def test_a_failing_write_changes_nothing(database: StyleDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("modules.prompts.styles.write_text_atomically", fail)
    for change in (lambda: database.save_style(PromptStyle("new", "a", "")), lambda: database.delete_style("film")):
        with pytest.raises(OSError, match="disk full"):
            change()
    assert database.names() == ["photo", "film"]


def test_each_style_goes_back_to_its_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"name,prompt,negative_prompt\n{name},from {name},\nboth,from {name},\n")
    database = StyleDatabase([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert database.styles["both"].prompt == "from b"
    database.save_style(PromptStyle("b", "changed", ""))
    database.save_style(PromptStyle("new", "x", ""))
    assert [style.name for style in read_styles(tmp_path / "a.csv")] == ["a", "both", "new"]
    assert [style.prompt for style in read_styles(tmp_path / "a.csv")] == ["from a", "from a", "x"]
    assert [style.prompt for style in read_styles(tmp_path / "b.csv")] == ["changed", "from b"]


def test_a_star_stands_for_all_files_of_a_folder(tmp_path: Path) -> None:
    database = StyleDatabase([tmp_path / "*.csv", tmp_path / "mine.csv"])
    database.save_style(PromptStyle("new", "x", ""))
    (tmp_path / "more.csv").write_text("name,prompt,negative_prompt\nmore,y,\n")
    database.reload()
    assert (database.names(), database.default_path) == (["new", "more"], tmp_path / "mine.csv")


def test_extensions_may_change_the_styles_and_have_them_saved(database: StyleDatabase) -> None:
    database.styles["made"] = PromptStyle("made", "x", "y")
    database.save_styles()
    assert StyleDatabase(database.paths[0]).styles["made"].negative_prompt == "y"
    database.styles["apart"] = PromptStyle("apart", "x", "y")
    database.save_styles(database.paths[0].with_name("other.csv"))
    assert [style.name for style in read_styles(database.paths[0].with_name("other.csv"))] == ["apart"]


# hand-written files

BY_HAND = '''# mine
name, prompt, negative_prompt
fox, "a fox, red", "blurry"
# cats
cat, a cat,
"#1", "said ""so""", "two
lines"
'''


def by_hand(folder: Path, text: str = BY_HAND) -> Path:
    path = folder / "styles.csv"
    path.write_text(text, encoding="utf-8")
    return path


def as_tuples(path: Path) -> list[tuple[str, ...]]:
    return [(style.name, style.prompt or "", style.negative_prompt or "") for style in read_styles(path)]


def test_blanks_behind_commas_and_comments(tmp_path: Path) -> None:
    path = by_hand(tmp_path)
    expected = [("fox", "a fox, red", "blurry"), ("cat", "a cat", ""), ("#1", 'said "so"', "two\nlines")]
    assert as_tuples(path) == expected
    StyleDatabase(path).save_style(PromptStyle("new", " wide", "#x"))
    assert as_tuples(path) == [*expected, ("new", " wide", "#x")]
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    assert (lines[0], lines[3]) == ("# mine", "# cats")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_columns_stay_theirs(tmp_path: Path, delimiter: str) -> None:
    rows = (["Name", "Text", "Notes"], ["fox", "a fox, red", "best"], ["cat", "a cat", ""])
    path = by_hand(tmp_path, "".join(f"{delimiter.join(row)}\n" for row in rows))
    assert as_tuples(path) == [("fox", "a fox, red", ""), ("cat", "a cat", "")]
    StyleDatabase(path).save_style(PromptStyle("cat", "two cats", f"a{delimiter}b"))
    assert as_tuples(path) == [("fox", "a fox, red", ""), ("cat", "two cats", f"a{delimiter}b")]
    assert delimiter.join(["fox", "a fox, red", "best"]) in path.read_text(encoding="utf-8-sig")


@pytest.mark.parametrize(
    "text",
    [
        "fox,a fox,blurry\n",  # no header
        "title,words\nfox,a fox\n",
        "name,prompt,negative_prompt\nfox,a fox, red, blurry\n",
        'name,prompt,negative_prompt\nfox,"a fox,blurry\ncat,a cat,\n',
        "name|prompt|negative_prompt\nfox|a fox|\n",
        '{"fox": "a fox"}',
    ],
)
def test_what_is_not_understood_is_said_and_never_written_over(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = by_hand(tmp_path, text)
    database = StyleDatabase(path)
    assert "styles.csv" in caplog.text
    for style in (PromptStyle("new", "x", "", str(path)), PromptStyle("other", "", "")):
        with pytest.raises(StylesFileError, match=r"styles\.csv"):
            database.save_style(style)
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["styles.csv"]


def test_a_style_added_by_hand_meanwhile_stays(tmp_path: Path) -> None:
    path = by_hand(tmp_path)
    database = StyleDatabase(path)
    with path.open("a", encoding="utf-8") as file:
        file.write("dog, a dog,\n,nameless,\n")
    database.delete_style("cat")
    assert [name for name, *_ in as_tuples(path)] == ["fox", "#1", "dog"]
    assert ",nameless," in path.read_text(encoding="utf-8-sig")


@given(st.lists(st.tuples(st.text(min_size=1), st.text(), st.text()), max_size=5, unique_by=lambda style: style[0]), st.sampled_from(",;\t"))
def test_what_is_written_is_read_again(styles: list[tuple[str, str, str]], delimiter: str) -> None:
    file = StylesFile(Path("styles.csv"), delimiter)
    file.update({name: (prompt, negative) for name, prompt, negative in styles}, ())
    assert list(parse_styles_file(Path("styles.csv"), file.text()).styles()) == styles


def test_styles_that_double_the_prompt_end_in_time(tmp_path: Path) -> None:
    (tmp_path / "styles.csv").write_text('name,prompt\ntwice,"{prompt}, {prompt}"\n', encoding="utf-8")
    database = StyleDatabase(tmp_path / "styles.csv")
    assert database.apply_styles_to_prompt("a", ["twice"] * 2) == "a, a, a, a"
    with pytest.raises(RequestError, match="styles"):
        database.apply_styles_to_prompt("a", ["twice"] * 60)
