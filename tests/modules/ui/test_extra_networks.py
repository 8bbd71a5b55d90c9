from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import save_file

from modules.application import Application
from modules.ui import extra_networks, extra_networks_routes
from modules.ui.extra_networks import ExtraNetworksPage, quote_js
from modules.ui.extra_networks_tabs import register_default_pages
from tests.support.applications import installed_application
from tests.support.extensions import builtin_module, loaded_builtin

NASTY = 'a\'b "c" & <d>'


def put(path: Path, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, path, metadata={key: str(value) for key, value in metadata.items()})
    return path


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    models = tmp_path / "models"
    put(models / "Lora" / "people" / "cat.safetensors", ss_output_name="My cat", ss_base_model_version="sd_v1", ss_tag_frequency='{"a": {"fur": 3}}')
    put(models / "Lora" / f"{NASTY}.safetensors")
    put(models / "Lora" / ".old" / "gone.safetensors")
    put(models / "Stable-diffusion" / "sub" / "one.safetensors")
    put(tmp_path / "embeddings" / "word.safetensors")
    Image.new("RGB", (8, 8), "red").save(models / "Lora" / "people" / "cat.preview.png")
    (models / "Lora" / "people" / "cat.json").write_text(
        json.dumps({"description": "<b>soft</b>", "activation text": "fluffy", "preferred weight": 0.7, "negative text": "dog", "own": 1})
    )
    (tmp_path / "secret.png").write_bytes(b"no")
    with installed_application(tmp_path) as app, loaded_builtin(app, "sd_forge_lora"):
        register_default_pages(app)
        extra_networks.register_page(builtin_module("ui_extra_networks_lora").ExtraNetworksPageLora())
        yield app
        extra_networks.initialize()
        extra_networks.ask_for_key("")


def page(title: str) -> ExtraNetworksPage:
    return next(one for one in extra_networks.extra_pages if one.title == title)


def client_of(app: Application) -> TestClient:
    server = FastAPI()
    extra_networks_routes.add_routes(app, server)
    return TestClient(server)


def test_cards_say_what_files_and_users_say(app: Application) -> None:
    html = page("Lora").create_html("txt2img")
    for part in ("pane", "controls", "tree", "cards", "extra_search", "extra_sort_path", "extra_sort_dir", "extra_tree_view", "extra_refresh"):
        assert f"id='txt2img_lora_{part}'" in html
    assert "&lt;b&gt;soft&lt;/b&gt;" in html and "<b>soft" not in html
    assert "data-folder='people'" in html and "/sd_extra_networks/thumb?filename=" in html
    item = page("Lora").items["cat"]
    assert item["prompt"] == '"<lora:My cat:" + "0.7" + ">" + " fluffy"' and item["negative_prompt"] == '"dog"'
    assert item["sd_version_str"] == "SdVersion.SD1"
    assert page("Lora").items[NASTY]["prompt"] == f'{quote_js(f"<lora:{NASTY}:")} + opts.extra_networks_default_multiplier + ">"'
    assert NASTY not in html and "<d>" not in html
    assert page("Lora").create_html("img2img", empty=True).count("class='card") == 0


def test_settings_of_cards(app: Application) -> None:
    options, lora = app.options, page("Lora")
    options.extra_networks_card_description_is_html = True
    assert "<b>soft</b>" in lora.create_html("txt2img")
    options.extra_networks_card_show_desc = False
    assert "soft" not in lora.create_html("txt2img")
    assert "card hidden-part" in lora.create_html("txt2img") and "data-folder='.old'" in lora.create_html("txt2img")
    options.extra_networks_hidden_models, options.extra_networks_show_hidden_directories = "Never", False
    assert ".old" not in lora.create_html("txt2img")
    options.lora_preferred_name = "Filename"
    lora.load_items()
    assert lora.items["cat"]["prompt"].startswith('"<lora:cat:"')
    options.extra_networks_card_order, options.extra_networks_card_order_field = "Descending", "Name"
    options.extra_networks_card_width, options.extra_networks_card_text_scale = 99, 2.0
    html = lora.create_html("txt2img")
    assert html.index("data-name='cat'") < html.index("data-name='a") and "width: 99px; font-size: 200%" in html
    options.ui_extra_networks_tab_reorder = "lora, checkpoints"
    assert [one.title for one in extra_networks.pages_in_order()] == ["Lora", "Checkpoints", "Textual Inversion"]


def test_files_of_other_families_may_be_hidden(app: Application) -> None:
    app.models.engine = SimpleNamespace(family="sdxl", embeddings=None, current_lora_hash="[]")  # type: ignore[assignment]
    lora = page("Lora")
    lora.load_items()
    assert "cat" in lora.items
    app.options.lora_filter_disabled = False
    lora.load_items()
    assert "cat" not in lora.items and NASTY in lora.items
    app.models.engine = None


def test_checkpoints_and_embeddings(app: Application) -> None:
    html = page("Checkpoints").create_html("txt2img")
    assert "selectCheckpoint(&quot;sub/one.safetensors&quot;)" in html and "cardClicked" not in html
    html = page("Textual Inversion").create_html("txt2img")
    assert "cardClicked(&#x27;txt2img&#x27;, &quot;word&quot;, &quot;&quot;, true)" in html


def test_pictures_come_from_the_folders_of_the_pages_alone(app: Application, tmp_path: Path) -> None:
    client, lora = client_of(app), tmp_path / "models" / "Lora"
    (lora / "text.txt").write_text("no")

    def status(filename: Path | str, **more: str) -> int:
        return client.get("/sd_extra_networks/thumb", params={"filename": str(filename), **more}).status_code

    assert status(lora / "people" / "cat.preview.png") == 200
    assert status(f"{lora}/people/../people/cat.preview.png") == 200
    for wrong in (tmp_path / "secret.png", f"{lora}/../../secret.png", lora / "text.txt", lora / "people" / "cat.safetensors", "", "a\0.png", lora):
        assert status(wrong) == 404
    address = page("Lora").find_preview(str(lora / "people" / "cat"))
    assert address is not None and client.get(address.removeprefix(".")).content == (lora / "people" / "cat.preview.png").read_bytes()


def test_behind_a_password_only_the_page_knows_the_addresses(app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "config", dataclasses.replace(app.config, gradio_auth=(("me", "secret"),)))
    client = client_of(app)
    file = tmp_path / "models" / "Lora" / "people" / "cat.preview.png"
    for route in (f"thumb?filename={file}", "metadata?page=lora&item=cat", "get-single-card?page=lora&tabname=txt2img&name=cat"):
        assert client.get(f"/sd_extra_networks/{route}").status_code == 401
        assert client.get(f"/sd_extra_networks/{route}&key=wrong").status_code == 401
    address = page("Lora").find_preview(str(file.with_name("cat")))
    assert address is not None and client.get(address.removeprefix(".")).status_code == 200
    assert f"data-key='{extra_networks.key_parameter().removeprefix('&key=')}'" in page("Lora").create_html("txt2img")


def test_metadata_and_single_cards(app: Application) -> None:
    client, lora = client_of(app), page("Lora")
    lora.load_items()
    told = json.loads(client.get("/sd_extra_networks/metadata?page=lora&item=cat").json()["metadata"])
    assert told["ss_output_name"] == "My cat"
    assert client.get("/sd_extra_networks/metadata?page=lora&item=none").json() == {}
    card = client.get("/sd_extra_networks/get-single-card?page=lora&tabname=txt2img&name=cat").json()["html"]
    assert card.startswith("<div class='card'") and "data-name='cat'" in card
    for query in ("page=none&tabname=txt2img&name=cat", "page=lora&tabname=<x>&name=cat", "page=lora&tabname=txt2img&name=none"):
        assert client.get(f"/sd_extra_networks/get-single-card?{query}").json() == {}


def test_what_the_user_writes_is_kept_beside_the_file(app: Application, tmp_path: Path) -> None:
    lora = page("Lora")
    lora.load_items()
    with gr.Blocks():
        editor = lora.create_user_metadata_editor(SimpleNamespace(gallery=gr.Gallery()), "txt2img")
        editor.create_editor()
    values = editor.put_values_into_components("cat")
    assert len(values) == len(editor.components)
    assert [values[place] for place in (1, 3, 4, 6, 7)] == ["<b>soft</b>", "SD1", "fluffy", 0.7, "dog"]
    assert "fur" in values[5] and "cat.safetensors" in values[2] and "<img" in values[8]
    assert editor.save("cat", "new words", "a note", "SDXL", "striped", 1.2, "") == "Saved."
    kept = json.loads((tmp_path / "models" / "Lora" / "people" / "cat.json").read_text())
    assert kept["description"] == "new words" and kept["notes"] == "a note" and kept["sd version"] == "SDXL" and kept["own"] == 1
    assert lora.create_item("cat")["prompt"].endswith('"1.2" + ">" + " striped"')  # type: ignore[index]
    assert editor.save("gone for good", "x", "", "", "", 0, "") == "Saved." and not list(tmp_path.rglob("gone for good*"))


def test_a_picture_of_the_gallery_becomes_the_preview(app: Application, tmp_path: Path) -> None:
    lora = page("Lora")
    lora.load_items()
    with gr.Blocks():
        editor = lora.create_user_metadata_editor(SimpleNamespace(gallery=gr.Gallery()), "txt2img")
        editor.create_editor()
    picture, private = app.config.outputs_dir / "made.png", tmp_path / "private.png"
    picture.parent.mkdir(parents=True)
    for file in (picture, private):
        Image.new("RGB", (8, 8), "blue").save(file)
    assert "not a picture of this page" in editor.save_preview("cat", 0, [(str(private), None)])[1]
    assert not (tmp_path / "models" / "Lora" / "people" / "cat.png").exists()
    assert "Make a picture first" in editor.save_preview("cat", 0, [])[1]
    html, said = editor.save_preview("cat", 0, [(str(picture), None)])
    assert said == "Saved." and "cat.png" in html
    with Image.open(tmp_path / "models" / "Lora" / "people" / "cat.png") as image:
        assert np.asarray(image)[0, 0].tolist() == [0, 0, 255]
    assert editor.save_preview("none", 0, [(str(picture), None)])[0] == ""


class ExtensionPage(ExtraNetworksPage):
    """As extensions write them."""

    def __init__(self) -> None:
        super().__init__("Wild Cards")

    def list_items(self) -> Any:
        yield {"name": "flower", "filename": __file__, "prompt": quote_js("__flower__"), "search_terms": ["rose"], "preview": None}


def test_extensions_bring_pages(app: Application) -> None:
    extra_networks.register_page(ExtensionPage())
    extra_networks.register_page(ExtensionPage())
    assert [one.title for one in extra_networks.extra_pages].count("Wild Cards") == 1
    html = page("Wild Cards").create_html("img2img")
    assert "cardClicked(&#x27;img2img&#x27;, &quot;__flower__&quot;" in html and "id='img2img_wild_cards_cards'" in html


def test_a_card_without_a_picture_shows_the_beginning_of_its_name(app: Application) -> None:
    cards = page("Lora").create_html("txt2img")
    assert ">a&#x27;</div>" in cards  # the file with the nasty name
    assert cards.count("class='blank'") + cards.count("class='preview'") == cards.count("data-name=")
    assert page("Checkpoints").create_html("txt2img").count("aria-hidden='true'>on</div>") == 1
