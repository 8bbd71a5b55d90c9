"""Requests and results as they travel: `Order` is one piece of a request, `Outcome` is what a worker made of it.

The front completes a request first (seeds, prompts with styles, settings), so that a worker adds nothing of its own and a second try makes the same
pictures. What comes back from a worker is checked field by field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from modules.cluster.sharing import Piece
from modules.cluster.values import MessageError, pack, unpack
from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingImg2Img, StableDiffusionProcessingTxt2Img
from modules.settings.options import Options, OptionsSnapshot

if TYPE_CHECKING:
    from modules.jobs.context import JobContext

KINDS: dict[str, type[StableDiffusionProcessing]] = {"txt2img": StableDiffusionProcessingTxt2Img, "img2img": StableDiffusionProcessingImg2Img}

# Fields that stay on the front: it saves the pictures, has applied styles and overrides, and tells the user.
_STAYS = frozenset({"outpath_samples", "outpath_grids", "styles", "override_settings", "override_settings_restore_afterwards", "comments"})
_SET_LATER = ("user", "is_api", "txt2img_upscale")
_SAVED_BY_FRONT = {"do_not_save_samples": True, "do_not_save_grid": True}
MAX_COMMENTS, MAX_TEXT = 200, 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FileName:
    """A model file that an order needs. `kind`: checkpoint, module or network. `sha256` is None where the front computes no hashes."""

    kind: str
    name: str
    size_bytes: int
    sha256: str | None

    def __post_init__(self) -> None:
        if self.kind not in ("checkpoint", "module", "network") or not is_plain_name(self.name) or self.size_bytes < 0:
            raise MessageError(f"order: {self.kind!r} {self.name[:80]!r} is not the name of a model file.")
        if self.sha256 is not None and not (len(self.sha256) == 64 and set(self.sha256) <= set("0123456789abcdef")):
            raise MessageError(f"order: {self.sha256[:80]!r} is not a SHA256.")


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file alone, without folders."""
    return isinstance(name, str) and 0 < len(name) <= 255 and not any(c in name for c in "/\\\0") and name not in (".", "..")


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One piece of a request. `fields` are the request's, `options` settings that differ from their defaults, `has_scripts` whether hooks run.
    `model_key` is equal for orders with the same checkpoint, additional modules and storage."""

    order_id: str
    kind: str
    model_key: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any]
    script_args: tuple[Any, ...] = ()
    has_scripts: bool = False
    files: tuple[FileName, ...] = ()

    def pack(self) -> bytes:
        """The order as a message. Raises MessageError naming what cannot be sent."""
        parts = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return pack({**parts, "files": [dataclasses.asdict(file) for file in self.files]})


def unpack_order(message: bytes) -> Order:
    """Raises MessageError."""
    parts = unpack(message)
    try:
        files = tuple(FileName(**entry) for entry in parts["files"])
        order = Order(**{**parts, "files": files})
        is_whole = isinstance(order.fields, dict) and isinstance(order.options, dict) and isinstance(order.script_args, tuple)
    except (TypeError, KeyError, AttributeError) as error:
        raise MessageError(f"order: a part is missing or unknown ({type(error).__name__}: {error}).") from None
    if not is_whole or order.kind not in KINDS or not isinstance(order.order_id, str) or not isinstance(order.model_key, str):
        raise MessageError("order: a part has the wrong type.")
    return order


# From the front


def describe_request(p: StableDiffusionProcessing) -> dict[str, Any]:
    """The fields of a request that are sent, as they are now."""
    fields = {entry.name: getattr(p, entry.name) for entry in dataclasses.fields(p) if entry.init and entry.name not in _STAYS}
    fields.update({name: getattr(p, name) for name in _SET_LATER if hasattr(p, name)})
    if isinstance(p, StableDiffusionProcessingImg2Img):
        fields["mask"] = p.image_mask
        fields.pop("mask_blur", None)  # stands for the two that follow it
    return fields


def options_to_send(options: OptionsSnapshot, table: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from their defaults, without those that name a place on this machine's disks."""
    found = {}
    for key, info in table.items():
        if not info.do_not_save and info.path_kind is None and options[key] != info.default:
            found[key] = options[key]
    return found


def make_order(
    p: StableDiffusionProcessing, order_id: str, piece: Piece, *, model_key: str, options: Mapping[str, Any], files: Sequence[FileName]
) -> Order:
    """The order for a piece of the request `p`, whose seeds and prompts are complete."""
    part = slice(piece.first, piece.first + piece.count)
    fields = {
        **describe_request(p),
        **_SAVED_BY_FRONT,
        "prompt": p.all_prompts[part],
        "negative_prompt": p.all_negative_prompts[part],
        "seed": p.all_seeds[part],
        "subseed": p.all_subseeds[part],
        "batch_size": piece.batch_size,
        "n_iter": piece.num_batches,
    }
    for name in ("hr_prompt", "hr_negative_prompt"):
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][part]
    kind = next(name for name, kind in KINDS.items() if isinstance(p, kind))
    arguments = tuple(p.script_args or ())
    return Order(
        order_id=order_id,
        kind=kind,
        model_key=model_key,
        fields=fields,
        options=dict(options),
        script_args=(0, *arguments[1:]) if arguments else (),  # the selected script, the first argument, runs on the front
        has_scripts=p.scripts is not None,
        files=tuple(files),
    )


# On the worker


def apply_options(options: Options, own: Mapping[str, Any], sent: Mapping[str, Any]) -> None:
    """Set a worker's settings to those of an order: `own` (folders of this machine) and `sent`, defaults for all others. Raises OptionError."""
    known = {key: info.cast(key, sent[key]) for key, info in options.data_labels.items() if key in sent and info.path_kind is None}
    defaults = {key: info.default for key, info in options.data_labels.items() if not info.do_not_save}
    options.data = {**defaults, **own, **known}


def build_request(order: Order, runner: Any, context: JobContext) -> StableDiffusionProcessing:
    """The request on the worker. `runner`: the script runner of its tab, whose hooks run if the front has one. Raises MessageError."""
    kind = KINDS[order.kind]
    allowed = {entry.name for entry in dataclasses.fields(kind) if entry.init} - _STAYS
    unknown = sorted(set(order.fields) - allowed - set(_SET_LATER))
    if unknown:
        raise MessageError(f"order: there is no field {unknown[0][:80]!r} in a {order.kind} request.")
    p = kind(**{name: value for name, value in order.fields.items() if name in allowed})
    for name in _SET_LATER:
        if name in order.fields:
            setattr(p, name, order.fields[name])
    p._context, p._options_when_made = context, context.options.snapshot()
    if order.has_scripts and runner is not None:
        p.scripts, p.script_args = runner, order.script_args
    return p


# Back


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a worker made of an order: pictures with their infotexts, in order; `incomplete` are those that were interrupted or skipped before
    their last step, `facts` fields of the request as it ran."""

    pictures: tuple[Image.Image, ...]
    infotexts: tuple[str, ...]
    extra_pictures: tuple[Image.Image, ...] = ()
    incomplete: frozenset[int] = frozenset()
    comments: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    run_s: float = 0.0
    load_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.infotexts):
            raise MessageError(f"outcome: {len(self.pictures)} pictures came with {len(self.infotexts)} infotexts.")


def pack_outcome(processed: Any, p: StableDiffusionProcessing, *, run_s: float, load_s: float) -> bytes:
    """The message of a finished order."""
    first = processed.index_of_first_image
    facts = {name: value for name, check in _FACTS.items() if check(value := getattr(p, name, None))}
    facts["extra_generation_params"] = {str(key): value for key, value in p.extra_generation_params.items() if _is_plain(value)}
    outcome = {
        "pictures": list(processed.images[first:]),
        "infotexts": list(processed.infotexts[first : len(processed.images)]),
        "extra_pictures": [picture for picture in processed.extra_images if isinstance(picture, Image.Image)],
        "incomplete": list(processed.incomplete),
        "comments": [str(comment) for comment in p.comments],
        "facts": facts,
        "run_s": run_s,
        "load_s": load_s,
    }
    return pack(outcome, what="outcome")


def unpack_outcome(message: bytes, *, most_pictures: int) -> Outcome:
    """Raises MessageError for anything but what `pack_outcome` writes."""
    parts = unpack(message, what="outcome", types={})
    if not isinstance(parts, dict):
        raise MessageError("outcome: the message is not an outcome.")
    pictures, extra = (_list_of(parts.get(name), Image.Image, name) for name in ("pictures", "extra_pictures"))
    infotexts, comments = (_list_of(parts.get(name), str, name) for name in ("infotexts", "comments"))
    if len(pictures) > most_pictures:
        raise MessageError(f"outcome: {len(pictures)} pictures came for an order of {most_pictures}.")
    facts = parts.get("facts")
    return Outcome(
        pictures=tuple(pictures),
        infotexts=tuple(text[:MAX_TEXT] for text in infotexts),
        extra_pictures=tuple(extra),
        incomplete=frozenset(index for index in _list_of(parts.get("incomplete", []), int, "incomplete")),
        comments=tuple(text[:MAX_TEXT] for text in comments[:MAX_COMMENTS]),
        facts=_checked_facts(facts if isinstance(facts, dict) else {}),
        run_s=_seconds(parts.get("run_s")),
        load_s=_seconds(parts.get("load_s")),
    )


def _list_of(value: Any, kind: type, name: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise MessageError(f"outcome: {name} is not a list of {kind.__name__}.")
    return value


def _seconds(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return min(float(value), 1e6) if is_number and math.isfinite(value) and value >= 0 else 0.0


def _is_text_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 16


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Text, a number, or a short list of such."""
    if isinstance(value, (list, tuple)):
        return depth < 2 and len(value) <= 10_000 and all(_is_plain(entry, depth + 1) for entry in value)
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= MAX_TEXT)


_FACTS: dict[str, Any] = {
    **dict.fromkeys(("width", "height"), _is_side),
    **dict.fromkeys(("sampler_name", "scheduler", "sd_model_name", "sd_model_hash", "sd_vae_name", "sd_vae_hash", "init_img_hash"), _is_text_or_none),
    **dict.fromkeys(("is_using_inpainting_conditioning", "uses_ensd"), lambda value: isinstance(value, bool)),
    "additional_module_names": lambda value: isinstance(value, list) and all(isinstance(name, str) and len(name) < 1024 for name in value),
    "sampler_noise_scheduler_override": lambda value: value is None,
}


def _checked_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    checked = {name: facts[name] for name, check in _FACTS.items() if name in facts and check(facts[name])}
    params = facts.get("extra_generation_params")
    if isinstance(params, dict):
        checked["extra_generation_params"] = {key: value for key, value in params.items() if isinstance(key, str) and _is_plain(value)}
    return checked
