from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from modules.errors import RequestError
from modules.scripts.postprocessing import PostprocessedImage, ScriptPostprocessing, ScriptPostprocessingRunner

PICTURE = Image.new("RGB", (8, 6), "red")


class Marks(ScriptPostprocessing):
    """Records its calls with their values."""

    def __init__(self, name: str = "Marks", order: int = 1000) -> None:
        self.name, self.order = name, order

    def ui(self) -> dict[str, Any]:
        return {"strength": gr.Slider(0, 1, value=0.5), "kind": gr.Textbox("soft")}

    def process(self, pp: PostprocessedImage, strength: float = 0, kind: str = "") -> None:
        pp.info[str(self.name)] = f"{kind} {strength}"


def runner(*scripts: ScriptPostprocessing, **settings: Any) -> ScriptPostprocessingRunner:
    made = ScriptPostprocessingRunner(settings.get)
    made.register(scripts)
    return made


def names(made: ScriptPostprocessingRunner) -> list[str | None]:
    return [script.name for script in made.scripts_in_preferred_order()]


def shown_values(block: Any) -> list[Any]:
    """Values of all controls in the layout of a page."""
    return [getattr(block, "value", None), *(value for child in getattr(block, "children", ()) for value in shown_values(child))]


def test_order_is_the_settings_then_their_own() -> None:
    scripts = (Marks("c", 3000), Marks("b", 1000), Marks("a", 1000), Marks("d", 10))
    assert names(runner(*scripts)) == ["d", "a", "b", "c"]
    assert names(runner(*scripts, postprocessing_operation_order=["c", "gone", "b"])) == ["c", "b", "d", "a"]
    assert names(runner(*scripts, postprocessing_disable_in_extras=["a", "d"])) == ["b", "c"]


def test_values_reach_the_operation_they_belong_to() -> None:
    made = runner(Marks("one"), Marks("two"))
    with gr.Blocks(analytics_enabled=False):
        assert len(made.setup_ui()) == 4
    pp = PostprocessedImage(PICTURE)
    made.run(pp, [0.1, "hard", 0.9, "soft"])
    assert pp.info == {"one": "hard 0.1", "two": "soft 0.9"}
    pp = PostprocessedImage(PICTURE)
    made.run(pp, made.create_args_for_run({"two": {"kind": "x"}}))
    assert pp.info == {"one": "soft 0.5", "two": "x 0.5"}


def test_pictures_that_an_operation_adds_go_on_through_the_others() -> None:
    class Mirror(ScriptPostprocessing):
        name, order = "Mirror", 1

        def process(self, pp: PostprocessedImage, **args: Any) -> None:
            pp.extra_images = [pp.create_copy(pp.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), nametags=["mirrored"]), pp.image.resize((4, 3))]

    made = runner(Mirror(), Marks())
    pp = PostprocessedImage(PICTURE)
    pp.info["before"] = 1
    made.run(pp, [])
    assert [extra.image.size for extra in pp.extra_images] == [(8, 6), (4, 3)]
    assert all("Marks" in picture.info and "before" in picture.info for picture in (pp, *pp.extra_images))
    used: dict[str, int] = {}
    assert [picture.get_suffix(used) for picture in (pp, *pp.extra_images)] == ["", "-mirrored", "-1"]


def test_a_picture_may_be_left_alone_from_here_on() -> None:
    class Stops(ScriptPostprocessing):
        name, order = "Stops", 1

        def process(self, pp: PostprocessedImage, **args: Any) -> None:
            pp.disable_processing = True

    pp = PostprocessedImage(PICTURE)
    runner(Stops(), Marks()).run(pp, [])
    assert pp.info == {}


def test_an_extensions_operation_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Marks):
        def process(self, pp: PostprocessedImage, **args: Any) -> None:
            raise ZeroDivisionError("oh")

        def process_firstpass(self, pp: PostprocessedImage, **args: Any) -> None:
            raise ZeroDivisionError("oh at first")

    class NoControls(Marks):
        def __init__(self) -> None:
            super().__init__("NoControls")

        def ui(self) -> dict[str, Any]:
            gr.Textbox("left behind")
            raise ZeroDivisionError("no controls")

    class WrongControls(Marks):
        def __init__(self) -> None:
            super().__init__("WrongControls")

        def ui(self) -> Any:
            return [gr.Textbox()]

    class NotMade(Marks):
        def __init__(self) -> None:
            raise ZeroDivisionError("not made")

    class Refuses(Marks):
        def process(self, pp: PostprocessedImage, **args: Any) -> None:
            raise RequestError("this cannot be")

    made = ScriptPostprocessingRunner(lambda name: None)

    class Named(Broken):
        def __init__(self, name: str = "Named") -> None:
            super().__init__(name, 1)

    kinds = {Named: "broken", NoControls: "bare", WrongControls: "wrong", NotMade: "unmade"}
    made.initialize_scripts([SimpleNamespace(script_class=kind, path=f"ext/{name}.py") for kind, name in kinds.items()])
    made.register([Marks()])
    with gr.Blocks(analytics_enabled=False) as page:
        assert len(made.setup_ui()) == 4
    assert names(made) == ["Named", "Marks"]
    assert "left behind" not in shown_values(page)
    pp = PostprocessedImage(PICTURE)
    made.run(pp, [0.5, "y", 0.1, "x"])
    assert pp.info == {"Marks": "x 0.1"}
    for part in ("NotMade of ext/unmade.py could not be made", "(ext/broken.py) failed in process;", "(ext/broken.py) failed in process_firstpass;"):
        assert part in caplog.text
    for file in ("bare", "wrong"):
        assert f"(ext/{file}.py) could not build its controls" in caplog.text
    made.initialize_scripts([SimpleNamespace(script_class=Refuses, path="ext/refuses.py")])
    with pytest.raises(RequestError, match="this cannot be"):
        made.run(PostprocessedImage(PICTURE), [])
