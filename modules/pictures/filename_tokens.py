"""File names made of tokens, such as `[seed]-[prompt_spaces]`, and the characters a name may not contain.

Reads a processing object and settings by attribute. Must not know how either is built, nor write files.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import re
import zoneinfo
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

log = logging.getLogger(__name__)

MAX_PART_CHARS = 128
MAX_NAME_BYTES = 255
"""The limit of common file systems; non-ASCII characters take several bytes."""

_INVALID_CHARS = '#<>:"/\\|?*\x7f' + "".join(map(chr, range(32)))
_TO_UNDERSCORE = str.maketrans(dict.fromkeys(_INVALID_CHARS, "_"))
_RESERVED_ON_WINDOWS = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_TOKEN = re.compile(r"\[([^\[\]]+)\]")
MAX_PATTERN_CHARS = 4096
"""Far more than a path can hold; the rest of a longer pattern is ignored."""
_WORDS = re.compile(r"[\s,.!?;:()\[\]{}\"'<>|\\/]+")
_DEFAULT_TIME_FORMAT = "%Y%m%d%H%M%S"
_DEFAULT_HASH_CHARS = 8
_DEFAULT_PROMPT_WORDS = 8


class _SkipText:
    """An empty token that also removes the text before it."""

    def __repr__(self) -> str:
        return "NOTHING_AND_SKIP_PREVIOUS_TEXT"


NOTHING_AND_SKIP_PREVIOUS_TEXT = _SkipText()

TokenValue = str | int | float | _SkipText | None


def sanitize_filename_part(text: str | None, replace_spaces: bool = True, max_chars: int = MAX_PART_CHARS) -> str | None:
    """`text` without characters forbidden in file names, cut to `max_chars`. None stays None."""
    if text is None:
        return None
    text = text.encode("utf-8", "replace").decode("utf-8")
    if replace_spaces:
        text = text.replace(" ", "_")
    return text.translate(_TO_UNDERSCORE).lstrip(" ")[:max_chars].rstrip(" .")


def fit_filename(stem: str, ending: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    """`stem + ending` with the stem shortened so that the whole is at most `max_bytes` in UTF-8. Names reserved by Windows get an underscore."""
    stem = stem.encode("utf-8", "replace").decode("utf-8")
    if _RESERVED_ON_WINDOWS.fullmatch(stem):
        stem = f"_{stem}"
    room = max(1, max_bytes - len(ending.encode("utf-8")))
    return stem.encode("utf-8")[:room].decode("utf-8", "ignore") + ending


def sanitize_folder(text: str) -> str:
    """`text` as a relative folder: each part made valid, empty and parent parts dropped. May be empty."""
    parts = [part.translate(_TO_UNDERSCORE).strip(" ").rstrip(" .") for part in re.split(r"[/\\]", text)]
    return str(PurePosixPath(*[fit_filename(part, "") for part in parts if part.strip(".")])) if any(part.strip(".") for part in parts) else ""


def _sha256(data: bytes, length: str | None) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return digest[: int(length) if length and length.isdecimal() else _DEFAULT_HASH_CHARS]


def split_arguments(token: str) -> tuple[str, list[str]]:
    """("datetime", ["%Y", "UTC"]) for the token `datetime<%Y><UTC>`."""
    arguments: list[str] = []
    while token.endswith(">"):
        start, other_end = token.rfind("<", 0, -1), token.rfind(">", 0, -1)
        if start <= other_end:
            break
        arguments.append(token[start + 1 : -1])
        token = token[:start]
    return token, arguments[::-1]


class FilenameGenerator:
    """The values of all tokens for one picture. `p` may be None or any object with some of a processing object's attributes."""

    def __init__(
        self,
        p: Any,
        seed: int | str | None,
        prompt: str | None,
        image: Image.Image,
        zip: bool = False,
        basename: str = "",
        *,
        options: Any = None,
        now: datetime.datetime | None = None,
        max_part_chars: int = MAX_PART_CHARS,
        style_prompts: Sequence[str | None] = (),
    ) -> None:
        self.p = p
        self.seed = seed
        self.prompt = prompt
        self.image = image
        self.zip = zip
        self.basename = basename
        self.options = options
        self.now = now
        self.max_part_chars = max_part_chars
        self.style_prompts = [prompt for prompt in style_prompts if prompt]

    def apply(self, x: str) -> str:
        """`x` with its tokens replaced. A token that is unknown or has no value stays as written."""
        if len(x) > MAX_PATTERN_CHARS:
            log.warning("file name pattern %r...: only the first %d of %d characters are used.", x[:40], MAX_PATTERN_CHARS, len(x))
            x = x[:MAX_PATTERN_CHARS]
        result, position = "", 0
        for match in _TOKEN.finditer(x):
            text, token = x[position : match.start()], match[1]
            position = match.end()
            value = self._value(token)
            if isinstance(value, _SkipText):
                continue
            result += text + (f"[{token}]" if value is None else str(value))
        return result + x[position:]

    def _value(self, token: str) -> TokenValue:
        token, arguments = split_arguments(token)
        replace = self.replacements.get(token.lower())
        if replace is None:
            return None
        try:
            return replace(self, *arguments)
        except (TypeError, ValueError, OverflowError) as error:
            log.warning("file name token [%s]: %s; it stays as written.", token, error)
            return None

    # Values used by the tokens

    def _of_p(self, name: str) -> Any:
        return None if self.p is None else getattr(self.p, name, None)

    def _option(self, name: str, default: Any) -> Any:
        value = getattr(self.options, name, None) if self.options is not None else None
        return default if value is None else value

    def _part(self, text: object, *, replace_spaces: bool = True) -> str | None:
        return None if text is None else sanitize_filename_part(str(text), replace_spaces, self.max_part_chars)

    def _prompt_part(self, *, replace_spaces: bool = True) -> str | None:
        return self._part(self.prompt, replace_spaces=replace_spaces)

    def _seed_first(self) -> TokenValue:
        seeds = self._of_p("all_seeds")
        return seeds[0] if seeds else self.seed

    def _seed_last(self) -> TokenValue:
        seeds = self._of_p("all_seeds")
        return seeds[-1] if seeds and len(seeds) > 1 else NOTHING_AND_SKIP_PREVIOUS_TEXT

    def _styles(self) -> str | None:
        if self.p is None:
            return None
        names = [name for name in self._of_p("styles") or [] if name != "None"]
        return self._part(", ".join(names) or "None", replace_spaces=False)

    def _sampler_scheduler(self) -> str | None:
        sampler, scheduler = self._of_p("sampler_name"), self._of_p("scheduler")
        if sampler is None:
            return None
        automatic = scheduler is None or str(scheduler).lower() == "automatic"
        return self._part(sampler if automatic else f"{sampler} {scheduler}", replace_spaces=False)

    def _datetime(self, time_format: str = "", zone_name: str | None = None) -> str:
        zone = None
        if zone_name:
            try:
                zone = zoneinfo.ZoneInfo(zone_name)
            except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
                log.warning("file name token [datetime]: there is no time zone %r; local time is used.", zone_name)
        now = self.now or datetime.datetime.now()
        return self._part((now.astimezone(zone) if zone else now).strftime(time_format or _DEFAULT_TIME_FORMAT), replace_spaces=False) or ""

    def _prompt_no_styles(self) -> str | None:
        if self.p is None or self.prompt is None:
            return None
        text = self.prompt
        for template in self.style_prompts:
            for fragment in template.split("{prompt}"):
                text = text.replace(fragment, "").replace(", ,", ",")
        return self._part(text.strip().strip(",").strip(), replace_spaces=False)

    def _prompt_words(self) -> str:
        words = [word for word in _WORDS.split(self.prompt or "") if word] or ["empty"]
        limit = int(self._option("directories_max_prompt_words", _DEFAULT_PROMPT_WORDS))
        return self._part(" ".join(words[:limit]), replace_spaces=False) or ""

    def _single(self) -> bool:
        return (self._of_p("n_iter") or 1) == 1 and (self._of_p("batch_size") or 1) == 1

    def _batch_number(self) -> TokenValue:
        if self.p is None or self.zip or (self._of_p("batch_size") or 1) == 1:
            return NOTHING_AND_SKIP_PREVIOUS_TEXT
        return (self._of_p("batch_index") or 0) + 1

    def _generation_number(self) -> TokenValue:
        if self.p is None or self.zip or self._single():
            return NOTHING_AND_SKIP_PREVIOUS_TEXT
        return (self._of_p("iteration") or 0) * (self._of_p("batch_size") or 1) + (self._of_p("batch_index") or 0) + 1

    def _hasprompt(self, *words: str) -> str | None:
        if self.p is None or self.prompt is None:
            return None
        prompt, result = self.prompt.lower(), ""
        for word in words:
            expected, _, otherwise = word.partition("|")
            result += expected if expected.lower() in prompt else otherwise
        return self._part(result)

    def _denoising(self) -> TokenValue:
        return self._of_p("denoising_strength") or NOTHING_AND_SKIP_PREVIOUS_TEXT

    def _prompt_hash(self, name: str, length: str | None) -> str:
        text = {"prompt": self.prompt, "negative_prompt": self._of_p("negative_prompt")}.get(name) or ""
        return _sha256(text.encode("utf-8", "replace"), length)

    def _full_prompt_hash(self, length: str | None) -> str:
        return _sha256(f"{self.prompt or ''} {self._of_p('negative_prompt') or ''}".encode("utf-8", "replace"), length)

    def _vae(self) -> str | None:
        return self._part(self._of_p("sd_vae_name") or "None", replace_spaces=False)

    replacements: dict[str, Callable[..., TokenValue]] = {
        "basename": lambda self: self.basename or "img",
        "seed": lambda self: self.seed if self.seed is not None else "",
        "seed_first": lambda self: self._seed_first(),
        "seed_last": lambda self: self._seed_last(),
        "steps": lambda self: self._of_p("steps"),
        "cfg": lambda self: self._of_p("cfg_scale"),
        "width": lambda self: self.image.width,
        "height": lambda self: self.image.height,
        "styles": lambda self: self._styles(),
        "sampler": lambda self: self._part(self._of_p("sampler_name"), replace_spaces=False),
        "sampler_scheduler": lambda self: self._sampler_scheduler(),
        "scheduler": lambda self: self._part(self._of_p("scheduler"), replace_spaces=False),
        "model_hash": lambda self: self._of_p("sd_model_hash"),
        "model_name": lambda self: self._part(self._of_p("sd_model_name"), replace_spaces=False),
        "date": lambda self: (self.now or datetime.datetime.now()).strftime("%Y-%m-%d"),
        "datetime": lambda self, *arguments: self._datetime(*arguments),
        "job_timestamp": lambda self: self._of_p("job_timestamp"),
        "prompt_hash": lambda self, length=None: self._prompt_hash("prompt", length),
        "negative_prompt_hash": lambda self, length=None: self._prompt_hash("negative_prompt", length),
        "full_prompt_hash": lambda self, length=None: self._full_prompt_hash(length),
        "prompt": lambda self: self._prompt_part(),
        "prompt_no_styles": lambda self: self._prompt_no_styles(),
        "prompt_spaces": lambda self: self._prompt_part(replace_spaces=False),
        "prompt_words": lambda self: self._prompt_words(),
        "batch_number": lambda self: self._batch_number(),
        "batch_size": lambda self: self._of_p("batch_size"),
        "generation_number": lambda self: self._generation_number(),
        "hasprompt": lambda self, *words: self._hasprompt(*words),
        "clip_skip": lambda self: self._of_p("clip_skip") or self._option("CLIP_stop_at_last_layers", None),
        "denoising": lambda self: self._denoising(),
        "user": lambda self: self._part(self._of_p("user"), replace_spaces=False),
        "vae_filename": lambda self: self._vae(),
        "none": lambda self: "",
        "image_hash": lambda self, length=None: _sha256(self.image.tobytes(), length),
    }
