"""The option "Diffusion in Low Bits"."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.settings.low_bits import LOW_BITS, storage_of_low_bits
from tests.support.applications import installed_application

KINDS = ("Automatic", "bnb-nf4", "float8-e4m3fn", "bnb-fp4", "float8-e5m2")


def test_values_are_forges_in_forges_order() -> None:
    assert [value for kind in KINDS for value in (kind, f"{kind} (fp16 LoRA)")] == list(LOW_BITS)


def test_what_a_value_stores() -> None:
    found = {value: storage_of_low_bits(value) for value in LOW_BITS}
    assert list(found.values()) == [name for name in (None, "nf4", "float8_e4m3fn", "fp4", "float8_e5m2") for _ in range(2)]


def test_other_values_are_refused_by_name(tmp_path: Path) -> None:
    with installed_application(tmp_path) as app:
        for value in LOW_BITS:
            app.options.set("forge_unet_storage_dtype", value, is_api=True)
            assert app.options.forge_unet_storage_dtype == value
        for value in ("int4", "bnb-nf4 (fp8 LoRA)", "", "BNB-NF4"):
            with pytest.raises(OptionError, match=r"forge_unet_storage_dtype.* is not one of 'Automatic', "):
                app.options.set("forge_unet_storage_dtype", value, is_api=True)
        assert app.options.forge_unet_storage_dtype == LOW_BITS[-1]
