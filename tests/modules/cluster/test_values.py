from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modules.cluster import values
from modules.cluster.values import MessageError, find_type, pack, unpack

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab$", max_size=2) | st.integers(0, 3), inner, max_size=3) | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_what_is_packed_comes_back_the_same(value: Any) -> None:
    assert unpack(pack(value)) == value


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "LA", "F", "I", "I;16"])
def test_pictures_come_back_to_the_pixel(mode: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (5, 11, 4), dtype=np.uint8)
    whole = Image.fromarray(noise[..., 0]) if mode == "I;16" else Image.fromarray(noise)
    picture = whole.convert("I;16") if mode == "I;16" else whole.convert(mode)
    back = unpack(pack([picture]))[0]
    assert (back.mode, back.size, back.tobytes()) == (picture.mode, picture.size, picture.tobytes())


def test_a_picture_with_a_palette_arrives_with_its_colors() -> None:
    picture = Image.new("RGB", (4, 4), (200, 30, 40)).convert("P")
    assert unpack(pack(picture)).getpixel((0, 0)) == picture.convert("RGB").getpixel((0, 0))


def test_arrays_and_special_numbers_come_back() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    back = unpack(pack({"a": array, "inf": math.inf, "nan": math.nan, "set": {2, 1}, "number": np.float32(0.5)}))
    assert np.array_equal(back["a"], array)
    assert back["a"].dtype == np.float32
    assert (back["inf"], math.isnan(back["nan"]), back["set"], back["number"]) == (math.inf, True, {1, 2}, 0.5)


def test_what_cannot_travel_is_named_by_its_place() -> None:
    with pytest.raises(MessageError, match=r"request\.script_args\[1\]: a function cannot be sent to a worker"):
        pack({"script_args": (1, lambda: 0)})
    deep: list[Any] = []
    for _ in range(99):
        deep = [deep]
    with pytest.raises(MessageError, match="nested too deeply"):
        pack(deep)


class Mode(Enum):
    FIRST = 1


@dataclass
class Unit:
    weight: float
    mode: Mode = Mode.FIRST


def test_arguments_of_extensions_keep_their_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("made_up_extension")
    module.__file__ = str(tmp_path / "extensions" / "made-up" / "scripts" / "made_up_extension.py")
    for kind in (Unit, Mode):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert unpack(pack((Unit(0.5),))) == (Unit(0.5, Mode.FIRST),)


@pytest.mark.parametrize("name", ["subprocess:Popen", "modules.cluster.orders:Order", "os:system", "no.such:Thing", "", ":"])
def test_a_message_can_name_only_classes_of_extensions(name: str) -> None:
    assert find_type(name) is None
    tree = {"$": "object", "type": name, "fields": {}}
    with pytest.raises(MessageError, match="does not have"):
        unpack(message_of(tree))


def message_of(tree: Any, *blobs: bytes, lengths: list[Any] | None = None) -> bytes:
    header = json.dumps({"tree": tree, "blobs": [len(blob) for blob in blobs] if lengths is None else lengths}).encode()
    return b"".join([values.MAGIC, len(header).to_bytes(8, "little"), header, *blobs])


BROKEN = {
    "no message": b"PK\x03\x04 something else",
    "short": values.MAGIC,
    "header beyond the end": values.MAGIC + (1 << 40).to_bytes(8, "little"),
    "no JSON": values.MAGIC + (3).to_bytes(8, "little") + b"{{{",
    "no mapping": values.MAGIC + (2).to_bytes(8, "little") + b"[]",
    "NaN": values.MAGIC + (12).to_bytes(8, "little") + b'{"tree":NaN}',
    "lengths": message_of(None, lengths=[-1]),
    "length of text": message_of(None, lengths=["9"]),
    "data missing": message_of(None, b"123")[:-1],
    "data left over": message_of(None) + b"x",
    "unknown tag": message_of({"$": "pickle", "blob": 0}, b"cos\nsystem\n"),
    "huge picture": message_of({"$": "picture", "mode": "RGB", "size": [1 << 30, 1 << 30], "blob": 0}, b"123"),
    "negative side": message_of({"$": "picture", "mode": "RGB", "size": [-1, -1], "blob": 0}, b"123"),
    "unknown mode": message_of({"$": "picture", "mode": "YCbCr", "size": [1, 1], "blob": 0}, b"123"),
    "object array": message_of({"$": "array", "dtype": "O", "shape": [1], "blob": 0}, b"12345678"),
    "array of another size": message_of({"$": "array", "dtype": "<f4", "shape": [3], "blob": 0}, b"1234"),
    "blob that is not there": message_of({"$": "bytes", "blob": 4}),
    "blob by truth": message_of({"$": "bytes", "blob": False}, b"1"),
    "unhashable key": message_of({"$": "dict", "items": [[[], 1]]}),
    "items missing": message_of({"$": "tuple"}),
    "deep": message_of(json.loads("[" * 60 + "]" * 60)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_message_is_refused(name: str) -> None:
    with pytest.raises(MessageError):
        unpack(BROKEN[name])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_raises_anything_else(data: st.DataObject) -> None:
    message = bytearray(pack({"a": [1, "x", Image.new("RGB", (2, 2))], "b": (np.zeros(3), {1: b"q"})}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MessageError):
        unpack(bytes(message[: data.draw(st.integers(0, len(message)))]))
