from __future__ import annotations

from pathlib import Path

from tools.house_numbers import Longest, count_house, report

FILES = {
    "modules/a.py": '"""A."""\nimport modules.b\nfrom modules.application import current_application\n\n\ndef long():\n    a = 1\n    return a\n',
    "modules/b.py": '"""B."""\n\n\ndef short():\n    import modules.a\n',
    "backend/c.py": '"""current_application is no word for the engine."""\n',
    "tests/test_a.py": "assert True\n",
}


def test_what_is_counted(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    house = count_house(tmp_path)
    assert (house.num_files, house.num_lines, house.num_test_lines) == (3, 14, 1)
    assert house.folders == {"modules": 2, "backend": 1}
    assert house.largest_file == Longest(8, "modules/a.py")
    assert house.largest_function == Longest(3, "modules/a.py: long")
    assert (house.cycles, house.num_mentions, house.num_mentioning) == ((2,), 1, 1)
    lines = report([house, house])
    assert lines[0] == "| | before | after |"
    assert "| import cycles, those inside functions too | 1, the largest of 2 files | 1, the largest of 2 files |" in lines
    assert "| lines that mention current_application | 1 in 1 files | 1 in 1 files |" in lines
