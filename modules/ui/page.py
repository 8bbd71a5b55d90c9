"""Everything around the page's controls: colors and fonts, style sheet, scripts, and gradio's launch arguments.

Nothing here makes the browser contact another host. Must not know any tab.
"""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from modules.app_config import SCRIPT_DIR, AppConfig

log = logging.getLogger(__name__)

TITLE = "Stable Diffusion"
_END_OF_SCRIPT = re.compile("</(script)", re.IGNORECASE)
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
SYSTEM_MONO_FONTS = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")
THEMES = {
    "Default": gr.themes.Default,
    "Base": gr.themes.Base,
    "Soft": gr.themes.Soft,
    "Monochrome": gr.themes.Monochrome,
    "Glass": gr.themes.Glass,
    "Origin": gr.themes.Origin,
    "Citrus": gr.themes.Citrus,
    "Ocean": gr.themes.Ocean,
}
FIRST_SCRIPT = "core.js"


def create_theme(name: str) -> gr.themes.Base:
    """gradio's theme `name` (the default for unknown names) with system fonts, so that no font is fetched."""
    theme_class = THEMES.get(name, gr.themes.Default)
    return theme_class(
        font=list(SYSTEM_FONTS), font_mono=list(SYSTEM_MONO_FONTS), text_size=gr.themes.sizes.text_md, spacing_size=gr.themes.sizes.spacing_md
    )


def script_files(script_dir: Path) -> list[Path]:
    """The page's scripts in run order: first the one that others depend on, then by name."""
    return sorted(script_dir.glob("*.js"), key=lambda path: (path.name != FIRST_SCRIPT, path.name))


def head_html(
    config: AppConfig, script_dir: Path | None = None, *, more_scripts: Sequence[Path] = (), localization: Mapping[str, str] | None = None
) -> str:
    """The scripts for the page's head. `more_scripts` (of extensions) come after the page's own. `localization`: English texts and translations."""
    table = json.dumps(dict(localization or {})).replace("<", "\\u003c")
    start = f"<script>window.webuiTheme = {json.dumps(config.theme)}; window.webuiLocalization = {table};</script>"
    folder = script_dir or SCRIPT_DIR / "javascript"
    return "\n".join([start, *(_inline_script(path) for path in script_files(folder)), *(_inline_script_of_guest(path) for path in more_scripts)])


def _inline_script(path: Path) -> str:
    text = path.read_text(encoding="utf8")
    if "</script" in text.lower():
        raise ValueError(f"{path.name}: a page script must not contain '</script'; split the string in two.")
    return f'<script data-file="{path.name}">\n{text}\n</script>'


def _inline_script_of_guest(path: Path) -> str:
    """An extension's script; one that cannot be read is logged and left out."""
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        log.error("%s cannot be read (%s); the page is built without it.", path, error)
        return ""
    kind = ' type="module"' if path.suffix == ".mjs" else ""
    text = _END_OF_SCRIPT.sub(r"<\\/\1", text)
    return f'<script data-file="{html.escape(path.name)}"{kind}>\n{text}\n</script>'


def notification_html(config: AppConfig) -> str:
    """The sound of a finished job: `notification.mp3` in the data folder; empty without it, and the page's script makes one."""
    file = _notification_file(config)
    return f"<audio src='gradio_api/file={html.escape(quote(file.as_posix()))}' preload='none'></audio>" if file.is_file() else ""


def _notification_file(config: AppConfig) -> Path:
    return config.data_dir / "notification.mp3"


def style_text(config: AppConfig, *, more_sheets: Sequence[Path] = ()) -> str:
    """The page's style sheet, then those of extensions, then the user's (`user.css` in the data folder)."""
    sheets = [SCRIPT_DIR / "style.css", *more_sheets, config.data_dir / "user.css"]
    return "\n".join(_sheet_text(sheet) for sheet in sheets)


def _sheet_text(sheet: Path) -> str:
    """The text of a style sheet. Bytes that are not UTF-8 are replaced; a sheet that cannot be read is logged and left out."""
    if not sheet.is_file():
        return ""
    try:
        text = sheet.read_bytes()
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        log.warning("%s is not UTF-8 (%s); invalid bytes are replaced. Save it as UTF-8.", sheet, error)
        return text.decode("utf-8", "replace")
    except OSError as error:
        log.warning("%s cannot be read (%s); the page is built without it.", sheet, error)
        return ""


def page_settings(
    config: AppConfig,
    theme_name: str = "Default",
    *,
    more_scripts: Sequence[Path] = (),
    more_sheets: Sequence[Path] = (),
    localization: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for both `gradio.Blocks.launch` and `gradio.mount_gradio_app`. The caller adds address, login and certificates.

    `more_scripts` and `more_sheets` come from extensions."""
    return {
        "theme": create_theme(theme_name),
        "css": style_text(config, more_sheets=more_sheets),
        "head": head_html(config, more_scripts=more_scripts, localization=localization),
        "footer_links": [],
        "run_history": False,
        "show_error": True,
        "ssr_mode": False,
        "pwa": False,
        "enable_monitoring": False,
        "allowed_paths": [str(config.outputs_dir), str(_notification_file(config)), *config.gradio_allowed_paths],
    }
