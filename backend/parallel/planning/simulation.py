"""Predicts plan, time and bytes for cards this machine does not have, from the facts in cards.json and costs counted on the meta device.

Knows no command line (simulate.py does) and touches no device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.costs import ComponentCost, ModelProfile
from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan
from backend.parallel.planning.planner import Link, SlotFacts, WantedStrategy, make_plan
from backend.parallel.planning.slot_facts import HOST_BYTES_PER_MS

DATA_DIR = Path(__file__).resolve().parent
GIB = 2**30
RESERVED_BYTES = GIB
"""Reserved on each card for the driver's context and other programs."""
RESERVED_GIB = RESERVED_BYTES / GIB
WEIGHT_READ_SHARE = 0.5
"""Share of a card's bandwidth at which a forward of one row reads weights. Fitted to published times of one row versus two."""
KERNEL_MS = 0.014
"""Time to launch one operation from Python. Fitted to the report that two RTX 4090s are slower than one for SD 1.5 at 512x512. Worker threads
share one interpreter, so launches of all slots add up."""
PLAIN_BYTES = {"half": 2.0, "fp8": 1.0}
"""Bytes per weight of types that are cast while a layer runs. Others are packed: `weights_names`."""
_LATENT_PX = 8
USUAL_CFG = 7.0
WORTH_GIVING_WAY = 0.9
"""Text encoders and VAE leave a slot for replicas whose step takes less than this share of the time. A job's own plan never waits for them."""
_VAE_CONFIG = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


class SimulationError(ValueError):
    """An unknown card, model or link was requested. The message lists the known ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A card's public figures. `effective_tflops` is what a UNet achieves on it."""

    name: str
    memory_gib: float
    effective_tflops: float
    bandwidth_gb_s: float
    link: str
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedJob:
    """What to predict. `strategy` is as in --multi-gpu-strategy. `link` is host, pcie or nvlink; None means what the cards have.

    `weights`: how denoiser and text encoders are stored, one of `weights_names`.
    """

    cards: tuple[str, ...]
    model: str = "sdxl"
    width_px: int = 1024
    height_px: int = 1024
    images: int = 1
    branches: int = 2
    strategy: WantedStrategy = "auto"
    link: str | None = None
    has_controlnet: bool = False
    weights: str = "half"


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """A prediction and what it was made from."""

    job: SimulatedJob
    plan: Plan
    profile: ModelProfile
    slots: tuple[SlotFacts, ...]
    vae_ms: float


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA_DIR / "cards.json").read_text(encoding="utf-8"))
    return loaded


@lru_cache(maxsize=1)
def _models() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA_DIR / "models.json").read_text(encoding="utf-8"))
    return loaded


def card_names() -> tuple[str, ...]:
    return tuple(_data()["cards"])


def model_names() -> tuple[str, ...]:
    return tuple(_models())


def link_names() -> tuple[str, ...]:
    return tuple(_data()["links"])


def find_card(name: str) -> Card:
    """The card with that name, ignoring case, spaces, dashes, underscores and the words GeForce, NVIDIA and Tesla.

    "RTX3060:10" is an RTX 3060 of which 10 GiB may be used. Raises: SimulationError.
    """
    wanted, colon, memory_gib = _plain(name).partition(":")
    for known, facts in _data()["cards"].items():
        if _plain(known) == wanted:
            card = Card(name=known, **{key: facts[key] for key in ("memory_gib", "effective_tflops", "bandwidth_gb_s", "link", "basis")})
            return _with_memory(card, memory_gib) if colon else card
    raise SimulationError(f"--gpus names the card {name!r}, which is not in cards.json. Known cards: {', '.join(card_names())}.")


def _with_memory(card: Card, memory_gib: str) -> Card:
    if re.fullmatch(r"\d{1,3}(\.\d{1,2})?", memory_gib) is None or not RESERVED_GIB < float(memory_gib) <= card.memory_gib:
        raise SimulationError(
            f"--gpus gives {card.name} {memory_gib} GiB; give a number above {RESERVED_GIB:g} and up to its {card.memory_gib:g}, as in {card.name}:4."
        )
    return replace(card, name=f"{card.name}:{memory_gib}", memory_gib=float(memory_gib))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|geforce|nvidia|tesla", "", name.lower())


def parse_cards(text: str) -> tuple[str, ...]:
    """ "2xRTX3090,RTX4090" -> ("RTX3090", "RTX3090", "RTX4090"). Raises: SimulationError."""
    names: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(\S.*)", part.strip())
        if match is None or match[1] == "0":
            raise SimulationError(f"--gpus {text!r}: {part!r} does not name a card. Write it like 2xRTX3090,1xRTX4090.")
        names += [find_card(match[2]).name] * int(match[1] or 1)
    return tuple(names)


def parse_picture_size(text: str) -> tuple[int, int]:
    """ "2048x1024" -> (2048, 1024). Raises: SimulationError."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if match is None or min(int(match[1]), int(match[2])) < 64:
        raise SimulationError(f"--size {text!r} is not a picture size. Give width and height in pixels, at least 64 each, like 1024x1024.")
    return int(match[1]), int(match[2])


def weights_names() -> tuple[str, ...]:
    """The values of `weights`."""
    from backend.storage.choices import FORMATS  # imports torch

    return (*PLAIN_BYTES, *FORMATS)


def bytes_per_weight(weights: str) -> float:
    """Of a large weight that is stored so."""
    from backend.storage.choices import bits_per_weight  # imports torch

    return PLAIN_BYTES[weights] if weights in PLAIN_BYTES else bits_per_weight(weights) / 8


def model_config(name: str) -> dict[str, Any]:
    """Title, denoiser config and the text encoders' numbers of parameters. Raises: SimulationError."""
    if name not in _models():
        raise SimulationError(f"--model {name!r} is unknown. Known models: {', '.join(model_names())}.")
    found: dict[str, Any] = _models()[name]
    return found


def usual_cfg(name: str) -> float:
    """The CFG scale that the model is run with. Raises: SimulationError."""
    return float(model_config(name).get("cfg", USUAL_CFG))


def profile_model(name: str, width_px: int, height_px: int, weights: str = "half") -> ModelProfile:
    """Costs of a published model's denoiser, computed in half precision. Raises: SimulationError."""
    from backend.parallel.planning.profiling import profile_unet  # imports the network libraries

    config = model_config(name)
    if "family" in config:
        return _profile_of_family(config, width_px, height_px, weights)
    if weights != "half":
        raise SimulationError(f"--weights {weights} is counted for {', '.join(_names_of_families())}; leave it out for {name}.")
    return profile_unet(config["unet"], latent_height=height_px // _LATENT_PX, latent_width=width_px // _LATENT_PX, name=f"{config['title']} UNet")


def _names_of_families() -> list[str]:
    return [name for name, config in _models().items() if "family" in config]


def _profile_of_family(config: Mapping[str, Any], width_px: int, height_px: int, weights: str) -> ModelProfile:
    import torch

    from backend.families.registry import find_family
    from backend.parallel.planning.profiling import profile_network, with_stored_bytes
    from backend.storage.choices import pack_empty
    from backend.storage.running import set_types

    family = find_family(config["family"])
    denoiser = _build_denoiser(config)
    if weights not in PLAIN_BYTES:
        pack_empty(denoiser, weights)
    set_types(denoiser, torch.float8_e4m3fn if weights == "fp8" else torch.bfloat16, torch.bfloat16)
    factor = family.latent.factor
    profile = profile_network(
        denoiser, family.build_program, latent_height=height_px // factor, latent_width=width_px // factor, dtype=torch.bfloat16
    )  # fmt: skip
    return replace(with_stored_bytes(profile, family.build_program(denoiser)), name=f"{config['title']} {family.denoiser_title}")


def _build_denoiser(config: Mapping[str, Any]) -> Any:
    """The denoiser of a model with a family, without memory."""
    from backend.checkpoint_layout import Layout, Part
    from backend.families.family import FoundDenoiser
    from backend.families.registry import find_family

    return find_family(config["family"]).build_denoiser(FoundDenoiser(part=Part("", Layout.DIFFUSERS), config=config["denoiser"]))


def component_costs(name: str, width_px: int, height_px: int, *, has_controlnet: bool, weights: str = "half") -> tuple[ComponentCost, ...]:
    """Text encoders, VAE in half precision and, if wanted, a ControlNet. Raises: SimulationError for a ControlNet of a family that has none."""
    from backend.parallel.planning.profiling import profile_vae_decoder  # imports the network libraries

    config = model_config(name)
    height, width = height_px // _LATENT_PX, width_px // _LATENT_PX  # of the VAE's latents
    text_bytes = int(sum(config["text_encoder_parameters"]) * bytes_per_weight(weights))
    vae_config = config.get("vae") or {**_VAE_CONFIG, "latent_channels": _latent_channels(config)}
    costs = [ComponentCost(name="text encoders", weight_bytes=text_bytes), profile_vae_decoder(vae_config, latent_height=height, latent_width=width)]
    return (*costs, _control_cost(name, height, width)) if has_controlnet else tuple(costs)


def _latent_channels(config: Mapping[str, Any]) -> int:
    """Of the VAE."""
    from backend.families.registry import find_family

    return find_family(config.get("family", "sdxl")).latent.vae_channels


def _control_cost(name: str, latent_height: int, latent_width: int) -> ComponentCost:
    from backend.families.registry import find_family
    from backend.nn.unet_program import build_program
    from backend.parallel.planning.profiling import empty_unet, profile_control_network

    config = model_config(name)
    network = _build_denoiser(config) if "family" in config else empty_unet(config["unet"])
    program = find_family(config["family"]).build_program(network) if "family" in config else build_program(network)
    cost = profile_control_network(network, program, latent_height=latent_height, latent_width=latent_width)
    if cost is None:
        raise SimulationError(f"--controlnet: there are no ControlNets for {name} here. Leave it out.")
    return cost


def card_slots(names: Sequence[str]) -> tuple[SlotFacts, ...]:
    """One slot per card."""
    slots = []
    for index, card in enumerate(map(find_card, names)):
        total_bytes = int(card.memory_gib * GIB)
        slots.append(
            SlotFacts(
                index=index, name=card.name, kind="cuda", speed=card.effective_tflops * 1e9, budget_bytes=total_bytes - RESERVED_BYTES,
                total_bytes=total_bytes, memory_bytes_per_ms=card.bandwidth_gb_s * 1e6 * WEIGHT_READ_SHARE, kernel_ms=KERNEL_MS,
                host_bytes_per_ms=HOST_BYTES_PER_MS,
            )
        )  # fmt: skip
    return tuple(slots)


def card_links(names: Sequence[str], link: str | None = None) -> tuple[Link, ...]:
    """Links between all cards: of the given kind, else the better kind that both cards have. Raises: SimulationError."""
    kinds = _data()["links"]
    if link is not None and link not in kinds:
        raise SimulationError(f"--link {link!r} is unknown. Known links: {', '.join(kinds)}.")
    ends = [find_card(name) for name in names]
    links = []
    for source, one in enumerate(ends):
        for target, other in enumerate(ends):
            if source != target:
                facts = kinds[link or min(one.link, other.link, key=lambda kind: kinds[kind]["gb_per_s"])]
                links.append(Link(source=source, target=target, bytes_per_ms=facts["gb_per_s"] * 1e6, latency_ms=facts["latency_ms"]))
    return tuple(links)


def simulate(job: SimulatedJob) -> Simulation:
    """Plan, time and bytes. Raises: SimulationError for unknown names."""
    profile = profile_model(job.model, job.width_px, job.height_px, job.weights)
    slots, links = card_slots(job.cards), card_links(job.cards, job.link)
    components = component_costs(job.model, job.width_px, job.height_px, has_controlnet=job.has_controlnet, weights=job.weights)
    shape = JobShape(images=job.images, branches=job.branches, components=components)
    vae = next(component for component in components if component.name == "VAE")
    plan = make_plan(profile, slots, links, shape, strategy=job.strategy)
    if not plan.component_slots or (len(slots) > 1 and plan.strategy != "replicas"):
        # what is idle while the denoiser runs gives way where not all fits, or where whole copies that need its room are faster
        alone = replace(shape, components=tuple(component for component in components if component.runs_per_row))
        other = make_plan(profile, slots, links, alone, strategy=job.strategy)
        is_faster = other.strategy == "replicas" and other.predicted_ms < WORTH_GIVING_WAY * plan.predicted_ms
        plan = other if not plan.component_slots or is_faster else plan
    vae_ms = vae.flops_per_row / max(slot.speed for slot in slots)
    return Simulation(job=job, plan=plan, profile=profile, slots=slots, vae_ms=vae_ms)


def report(simulation: Simulation) -> str:
    """The prediction as text."""
    job, plan, profile = simulation.job, simulation.plan, simulation.profile
    speedup = "no single card holds it" if plan.predicted_speedup == float("inf") else f"{plan.predicted_speedup:.2f}x of the best single card"
    what = f"{job.images} image(s), {'CFG' if job.branches > 1 else 'no CFG'}{', ControlNet' if job.has_controlnet else ''}"
    costs = f"{profile.weight_bytes / 1e9:.2f} GB of weights, {profile.flops_per_row / 1e12:.2f} TFLOP a row"
    return "\n".join(
        [
            f"{profile.name}, {job.width_px}x{job.height_px}, {what}: {costs}",
            f"plan: {plan.strategy} - {plan.reason}",
            f"step: {plan.predicted_ms:.1f} ms predicted, {speedup}; {plan.crossing_bytes / 1e6:.1f} MB cross; lanes {plan.lanes}",
            f"VAE decode: about {simulation.vae_ms:.0f} ms per image on the fastest card",
            *(_slot_line(slot, plan) for slot in simulation.slots),
            *([] if plan.component_slots else ["text encoders and VAE rest in main memory while the denoiser runs, and take turns with it"]),
        ]
    )


def _slot_line(slot: SlotFacts, plan: Plan) -> str:
    held = f"{plan.predicted_bytes.get(slot.index, 0) / 1e9:.2f} of {slot.total_bytes / 1e9:.1f} GB"
    parts = [_replica_text(number, replica, slot.index) for number, replica in enumerate(plan.replicas) if slot.index in replica.used_slots]
    if slot.index in plan.streamed and (num_bytes := plan.streamed[slot.index].streamed_bytes):
        parts.append(f"{num_bytes / 1e9:.2f} GB of its weights stream from main memory")
    parts += [name for name, where in plan.component_slots.items() if where == slot.index]
    return f"slot {slot.index} {slot.name}: {held}; {'; '.join(parts) or 'idle'}"


def _replica_text(number: int, replica: ReplicaPlan, slot: int) -> str:
    pieces = replica.pieces_on(slot)
    return f"copy {number}, whole" if len(pieces) == len(replica.pieces) else f"copy {number}, pieces {', '.join(_ranges_of(pieces))}"


def _ranges_of(pieces: Sequence[Piece]) -> list[str]:
    """Neighboring whole segments as one range: 3, 4, 5, 6[0:2] -> 3-5, 6[0:2]."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        follows = runs and _is_whole(runs[-1][-1]) and _is_whole(piece) and piece.segment == runs[-1][-1].segment + 1
        runs[-1:] = [[*runs[-1], piece]] if follows else [*runs[-1:], [piece]]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _is_whole(piece: Piece) -> bool:
    return piece.first_block == 0 and piece.end_block is None
