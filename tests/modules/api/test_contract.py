"""Bodies and answers against the fields, types and defaults of A1111 1.10.1's published OpenAPI document (tests/contract/data/a1111_api.json)
and of the fields added by Forge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.modules.api.conftest import Server

CONTRACT = json.loads((Path(__file__).parents[2] / "contract" / "data" / "a1111_api.json").read_text(encoding="utf-8"))

# names defined in two modules of the original; the document distinguishes them by module
OUR_NAMES = {"modules__api__models__ProgressResponse": "ProgressResponse", "modules__progress__ProgressResponse": "TaskProgressResponse"}
OUR_NAMES |= {"ProgressRequest": "TaskProgressRequest", "SDVaeItem": "SDModuleItem"}

# Forge's own fields: (name, type, default)
FORGE_FIELDS = {
    "StableDiffusionProcessingTxt2Img": [
        ("distilled_cfg_scale", "number", 3.5),
        ("hr_additional_modules", "array", None),
        ("hr_cfg", "number", 1.0),
        ("hr_distilled_cfg", "number", 3.5),
    ],
    "StableDiffusionProcessingImg2Img": [("distilled_cfg_scale", "number", 3.5), ("hr_distilled_cfg", "number", 3.5)],
}


@pytest.fixture
def document(server: Server) -> Any:
    return server.get("/openapi.json")


def type_of(schema: dict[str, Any]) -> str:
    """The JSON type of a field; if null is allowed, the other type."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    return str(kinds[0].get("type", "any")) if len(kinds) == 1 else "any"


@pytest.mark.parametrize("name", CONTRACT["schemas"])
def test_every_field_of_the_contract_is_there_with_its_type_and_default(document: Any, name: str) -> None:
    ours = document["components"]["schemas"][OUR_NAMES.get(name, name)]
    wanted = CONTRACT["schemas"][name]
    missing = [field for field in wanted["fields"] if field not in ours["properties"]]
    assert missing == []
    for field, facts in wanted["fields"].items():
        schema = ours["properties"][field]
        assert schema.get("default") == facts.get("default"), field
        assert facts["type"] in (type_of(schema), "any") or type_of(schema) == "any", field
    assert set(ours.get("required", [])) <= set(wanted["required"]) or name.endswith(("Response", "Item", "Info", "List"))


@pytest.mark.parametrize(("name", "field", "kind", "default"), [(name, *facts) for name, fields in FORGE_FIELDS.items() for facts in fields])
def test_forges_own_fields(document: Any, name: str, field: str, kind: str, default: Any) -> None:
    schema = document["components"]["schemas"][name]["properties"][field]
    assert (type_of(schema), schema.get("default")) == (kind, default)


def test_fields_that_a_client_may_not_set_are_not_in_the_bodies(document: Any) -> None:
    hidden = {"sd_model", "outpath_samples", "outpath_grids", "extra_generation_params", "overlay_images", "do_not_reload_embeddings"}
    for name in FORGE_FIELDS:
        assert not hidden & set(document["components"]["schemas"][name]["properties"])


def _reference(schema: dict[str, Any]) -> str:
    return str(schema.get("$ref") or schema.get("items", {}).get("$ref", "")).rsplit("/", 1)[-1]


@pytest.mark.parametrize("path", CONTRACT["paths"])
def test_every_route_of_the_contract_takes_and_gives_what_it_says(document: Any, path: str) -> None:
    facts = CONTRACT["paths"][path]
    operation = document["paths"][path][facts["method"]]
    if facts["body"]:
        body = _reference(operation["requestBody"]["content"]["application/json"]["schema"])
        assert body == OUR_NAMES.get(facts["body"], facts["body"])
    if facts["answer"] and facts["answer"] not in ("Options", "Flags"):
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert _reference(answer) == OUR_NAMES.get(facts["answer"], facts["answer"])
        assert (answer.get("type") == "array") == facts["list"]


def test_every_get_route_answers(server: Server) -> None:
    for path, facts in CONTRACT["paths"].items():
        if facts["method"] == "get":
            assert server.client.get(path).status_code == 200, path
