"""The page. Must not know how a picture is made or how HTTP is served.

Reading order: `tabs` (`create_ui` builds the tabs and connects them), then one tab: `txt2img` or `img2img` (its controls), `sections` and `toprow`
(the groups of controls in a tab), `requests` (turns control values into a request), `generation` (handles a click on Generate), `common` and
`components` (parts that several tabs share), `paste` (puts infotext into controls), `settings`, `extras`, `pnginfo`, `checkpoint_tools`,
`checkpoint_merger`,
`extra_networks*` (cards of model files), `file_routes` (files of extensions), `page` (style sheet, scripts, theme), `guard` and `page_files` (what
a browser may name). `history` and `history_routes`, `queue_routes` (with `said_errors`) are tabs that the page's scripts draw. Beside them:
`choices`, `extensions`, `gpus`, `img2img_pictures`, `load_save`,
`localization`, `paint_canvas`, `part_order`, `quicksettings`, `saving`, `scripts`, `shown_text`, `style_dialog`, `styles`,
`symbols`, `tokens`.

Example: a new slider of txt2img is built in `sections`, placed in `txt2img`, mapped to its request field in `requests`, and named for infotext in
modules/infotext/fields.py.

Extensions import the names below from `modules.ui`. They are looked up on first use because importing the page takes a while.
"""

from __future__ import annotations

from typing import Any

_ELSEWHERE = {
    "OutputPanel": "common",
    "create_output_panel": "common",
    "create_refresh_button": "common",
    "plaintext_to_html": "common",
    "create_ui": "tabs",
    "gr_show": "tabs",
    "random_symbol": "tabs",
    "reuse_symbol": "tabs",
    "save_style_symbol": "tabs",
    "versions_html": "tabs",
    "wrap_gradio_call": "tabs",
    "wrap_gradio_gpu_call": "tabs",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # only when one of these names is used

    return getattr(importlib.import_module(f"modules.ui.{_ELSEWHERE[name]}"), name)
