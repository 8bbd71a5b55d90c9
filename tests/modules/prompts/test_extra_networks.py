from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.prompts import extra_networks
from modules.prompts.extra_networks import ExtraNetwork, ExtraNetworkParams


class Recorder(ExtraNetwork):
    def __init__(self, name: str, *, fails: bool = False) -> None:
        super().__init__(name)
        self.fails = fails
        self.calls: list[Any] = []

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        self.calls.append([params.items for params in params_list])
        if self.fails:
            raise ValueError("file is missing")

    def deactivate(self, p: Any) -> None:
        self.calls.append("deactivate")
        if self.fails:
            raise ValueError("cannot undo")


class Job:
    def __init__(self) -> None:
        self.comments: list[str] = []

    def comment(self, text: str) -> None:
        self.comments.append(text)


@pytest.fixture(autouse=True)
def _no_kinds() -> Iterator[None]:
    kinds, aliases = dict(extra_networks.extra_network_registry), dict(extra_networks.extra_network_aliases)
    extra_networks.initialize()
    yield
    extra_networks.initialize()
    extra_networks.extra_network_registry.update(kinds)
    extra_networks.extra_network_aliases.update(aliases)


def register(name: str, **kwargs: Any) -> Recorder:
    recorder = Recorder(name, **kwargs)
    extra_networks.register_extra_network(recorder)
    return recorder


# prompts


def test_networks_are_taken_out_of_the_prompt() -> None:
    text, data = extra_networks.parse_prompt("a <lora:cat:0.8> b<lora:dog:1:unet=0.5:te=2><hypernet:x>")
    assert text == "a  b"
    assert {kind: [params.items for params in entries] for kind, entries in data.items()} == {
        "lora": [["cat", "0.8"], ["dog", "1", "unet=0.5", "te=2"]],
        "hypernet": [["x"]],
    }
    assert data["lora"][1].positional == ["dog", "1"]
    assert data["lora"][1].named == {"unet": "0.5", "te": "2"}


@pytest.mark.parametrize("prompt", ["a < b > c", "<lora>", "<lora:>", "<:x>", "1 <2: 3", "<a b:c>", ""])
def test_other_angles_are_text(prompt: str) -> None:
    assert extra_networks.parse_prompt(prompt) == (prompt, {})


def test_params_are_equal_if_written_alike() -> None:
    first, second = ExtraNetworkParams(["a", "b=1"]), ExtraNetworkParams(["a", "b=1"])
    assert first == second and hash(first) == hash(second)
    assert first != ExtraNetworkParams(["a"]) and first != "a"
    assert ExtraNetworkParams().items == []
    assert ExtraNetworkParams(["a=b=c"]).named == {"a": "b=c"}


def test_a_batch_has_the_networks_of_the_first_prompt_that_names_any(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        texts, data = extra_networks.parse_prompts(["a", "b <lora:x:1>", "c <lora:x:1>"])
        assert (texts, [params.items for params in data["lora"]]) == (["a", "b ", "c "], [["x", "1"]])
        assert caplog.text == ""
        assert extra_networks.parse_prompts(["a <lora:x:1>", "a <lora:y:1>"])[1]["lora"][0].items == ["x", "1"]
    assert "different extra networks" in caplog.text
    assert extra_networks.parse_prompts(["a"]) == (["a"], {})


@given(st.text())
def test_any_text_is_read(prompt: str) -> None:
    text, data = extra_networks.parse_prompt(prompt)
    assert bool(data) == (text != prompt)


# applying


def test_every_kind_hears_of_every_batch() -> None:
    lora, other = register("lora"), register("other")
    job = Job()
    _, data = extra_networks.parse_prompt("<lora:a:1><lora:b:1>")
    extra_networks.activate(job, data)
    extra_networks.activate(job, {})
    extra_networks.deactivate(job, data)
    assert lora.calls == [[["a", "1"], ["b", "1"]], [], "deactivate"]
    assert other.calls == [[], [], "deactivate"]
    assert job.comments == []


def test_an_alias_leads_to_its_kind_once() -> None:
    lora = register("lora")
    extra_networks.register_extra_network_alias(lora, "lyco")
    extra_networks.activate(Job(), extra_networks.parse_prompt("<lora:a><lyco:b>")[1])
    assert lora.calls == [[["a"], ["b"]]]


def test_an_unknown_kind_is_reported_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    lora, job = register("lora"), Job()
    with caplog.at_level(logging.WARNING):
        extra_networks.activate(job, extra_networks.parse_prompt("<lora:a><magic:b>")[1])
    assert lora.calls == [[["a"]]]
    assert job.comments == ["The prompt names an extra network of kind <magic:...>, which is unknown and was ignored. Known kinds: lora."]
    assert "magic" in caplog.text
    extra_networks.activate(SimpleNamespace(), {"magic": []})  # a job without comments


def test_a_failing_kind_is_reported_and_the_others_go_on() -> None:
    broken, fine, job = register("lora", fails=True), register("other"), Job()
    extra_networks.activate(job, extra_networks.parse_prompt("<lora:a:1><other:b>")[1])
    extra_networks.deactivate(job, {})
    assert job.comments == ["<lora:a:1> could not be applied and was ignored: file is missing"]
    assert fine.calls == [[["b"]], "deactivate"]
    assert broken.calls[-1] == "deactivate"


def test_scripts_hear_of_it_after_all_kinds() -> None:
    heard: list[Any] = []
    lora = register("lora")

    def after(p: Any, **kwargs: Any) -> None:
        heard.append((len(lora.calls), kwargs))

    scripts = SimpleNamespace(after_extra_networks_activate=after)
    job = SimpleNamespace(scripts=scripts, iteration=2, prompts=["a"], seeds=[1], subseeds=[2])
    data = extra_networks.parse_prompt("<lora:x>")[1]
    extra_networks.activate(job, data)
    assert heard == [(1, {"batch_number": 2, "prompts": ["a"], "seeds": [1], "subseeds": [2], "extra_network_data": data})]


def test_the_base_class_asks_for_both_methods() -> None:
    kind = ExtraNetwork("x")
    with pytest.raises(NotImplementedError):
        kind.activate(None, [])
    with pytest.raises(NotImplementedError):
        kind.deactivate(None)


# descriptions


def test_user_metadata_is_read_from_beside_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.json").write_text('{"activation text": "cät"}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    assert extra_networks.get_user_metadata(tmp_path / "a.safetensors") == {"activation text": "cät"}
    assert extra_networks.get_user_metadata(str(tmp_path / "none.pt")) == {}
    assert extra_networks.get_user_metadata(tmp_path / "list.pt") == {}
    with caplog.at_level(logging.WARNING):
        assert extra_networks.get_user_metadata(tmp_path / "broken.pt") == {}
    assert "broken.json" in caplog.text
    absent = SimpleNamespace(exists=lambda path: False)
    assert extra_networks.get_user_metadata(tmp_path / "a.safetensors", lister=absent) == {}


@pytest.mark.parametrize("content", ["[1, 2]", "{broken", "7"])
def test_a_file_that_is_no_description_is_never_written_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(FileExistsError, match="Move it away"):
        extra_networks.read_description(tmp_path / "a.json")
    assert extra_networks.read_description(tmp_path / "b.json") == {}
