from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from modules.api.script_args import build_script_args
from modules.errors import RequestError
from tests.modules.api.conftest import Server


class ScriptOfTest:
    """A script with three controls whose defaults are `values`."""

    def __init__(self, title: str, start: int, values: list[Any]) -> None:
        self._title = title
        self.args_from, self.args_to = start, start + len(values)
        self.controls = [SimpleNamespace(value=value) for value in values]
        self.api_info = SimpleNamespace(
            name=title.lower(),
            is_alwayson=title != "Matrix",
            is_img2img=False,
            args=[SimpleNamespace(label="Weight", value=1, minimum=0, maximum=2, step=0.1, choices=None)],
        )

    def title(self) -> str:
        return self._title


class RunnerOfTest:
    def __init__(self) -> None:
        self.selectable_scripts = [ScriptOfTest("Plot", 1, ["a", "b"]), ScriptOfTest("Matrix", 3, [1, 2])]
        self.alwayson_scripts = [ScriptOfTest("ControlNet", 5, [None, "fill", 0.5]), ScriptOfTest("Seeds", 8, [-1])]
        self.scripts = [*self.alwayson_scripts, *self.selectable_scripts]
        self.ran: list[Any] = []

    def run(self, p: Any, *args: Any) -> Any:
        self.ran.append(args)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def build(runner: Any = None, **request: Any) -> tuple[Any, list[Any]]:
    fields: dict[str, Any] = {"script_name": None, "script_args": [], "alwayson_scripts": {}}
    return build_script_args(runner, **fields | request)


def test_without_wishes_every_control_has_its_default() -> None:
    assert build(RunnerOfTest()) == (None, [0, "a", "b", 1, 2, None, "fill", 0.5, -1])
    assert build(None) == (None, [0])


def test_the_selected_script_gets_its_arguments_and_its_place_in_the_dropdown() -> None:
    selected, arguments = build(RunnerOfTest(), script_name="MATRIX", script_args=[7])
    assert selected.title() == "Matrix"
    assert arguments == [2, "a", "b", 7, 2, None, "fill", 0.5, -1]


def test_missing_trailing_arguments_of_always_on_scripts_keep_their_defaults() -> None:
    wishes = {"controlnet": {"args": [{"image": "x"}]}, "Seeds": {}}
    assert build(RunnerOfTest(), alwayson_scripts=wishes)[1] == [0, "a", "b", 1, 2, {"image": "x"}, "fill", 0.5, -1]


@pytest.mark.parametrize("name", ["Sampler", "Seed", "Refiner", "Extra options", "API payload"])
def test_always_on_names_of_forge_that_the_request_says_itself_are_taken(name: str) -> None:
    assert build(RunnerOfTest(), alwayson_scripts={name: {"args": [20, "Euler", "Karras"]}}) == build(RunnerOfTest())
    assert build(None, alwayson_scripts={name.upper(): {}}) == (None, [0])


def test_a_script_of_such_a_name_gets_its_arguments() -> None:
    runner = RunnerOfTest()
    runner.alwayson_scripts[1]._title = "API payload"
    assert build(runner, alwayson_scripts={"api payload": {"args": [4]}})[1][-1] == 4


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"script_name": "Nothing"}, r"Script 'Nothing' not found. Scripts here: Plot, Matrix"),
        ({"script_name": "ControlNet"}, "not found"),
        ({"script_name": "Plot", "script_args": [1, 2, 3]}, "3 values were sent; the script takes at most 2"),
        ({"alwayson_scripts": {"ADetailer": {"args": []}}}, "Always on script 'ADetailer' not found. Always on scripts here: ControlNet, Seeds"),
        ({"alwayson_scripts": {"Plot": {"args": []}}}, "selectable script in the always on"),
        ({"alwayson_scripts": {"Seeds": [1]}}, "expected"),
        ({"alwayson_scripts": {"Seeds": {"args": "x"}}}, "expected"),
        ({"alwayson_scripts": {"Seeds": {"args": [1, 2]}}}, "the script takes at most 1"),
    ],
)
def test_mistakes_name_what_there_is(request_: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        build(RunnerOfTest(), **request_)


def test_a_server_with_scripts_lists_and_runs_them(server: Server) -> None:
    runner = RunnerOfTest()
    server.app.script_runners = {"txt2img": runner}  # type: ignore[attr-defined]
    assert server.get("/sdapi/v1/scripts") == {"txt2img": ["controlnet", "seeds", "plot", "matrix"], "img2img": []}
    info = server.get("/sdapi/v1/script-info")
    assert info[0]["name"] == "controlnet"
    assert info[0]["args"] == [{"label": "Weight", "value": 1, "minimum": 0, "maximum": 2, "step": 0.1, "choices": None}]
    server.txt2img(script_name="plot", script_args=["x"], steps=1)
    assert runner.ran == [(1, "x", "b", 1, 2, None, "fill", 0.5, -1)]
    assert server.last_request.script_args[0] == 1
    folder = server.app.options.outdir_grids or server.app.options.outdir_txt2img_grids
    assert server.last_request.outpath_grids == folder, "where a script saves a grid of its own"
