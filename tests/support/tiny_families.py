"""What every family of transformers is held to with a tiny network: LoRA spellings by hand-merged weights, and plans over several slots.

A family's test gives a `TinyFamily` and calls these checks; only what is its own is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.checkpoint_file import open_tensor_file
from backend.checkpoint_layout import Layout, Part
from backend.families.family import Family, FoundDenoiser
from backend.modules.k_model import KModel
from backend.modules.k_prediction import FlowPrediction
from backend.nn.padded_text import TEXT_LENGTHS
from backend.parallel.placing.fleet import Fleet
from backend.parallel.running.session import SamplingRequest, begin_session, end_session
from backend.patcher.lora_files import match_lora, parse_lora
from backend.patcher.unet import UnetPatcher
from backend.state_dict import assign_tensors, check_plan, plan_denoiser
from tests.support.fleets import virtual_fleet

CPU = torch.device("cpu")
RANK, ALPHA, STRENGTH = 4, 2.0, 0.75
ATOL = 2e-5


def padded_text_inputs(lengths: Sequence[int], width: int, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """Inputs of two rows of 8x6 latents whose texts have these lengths, `width` numbers per token; `more`: the shapes of further random tensors."""
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, 16, 8, 6, generator=generator),
        "t": torch.tensor([0.75, 0.75]),
        "c_crossattn": torch.randn(2, max(lengths), width, generator=generator),
        TEXT_LENGTHS: torch.tensor(lengths),
        **{name: torch.randn(shape, generator=generator) for name, shape in more.items()},
    }


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """`config` builds our network; `make` the library's; `original` writes its weights in the original layout (with a prefix). `inputs`: of two rows,
    as `apply_model` takes them."""

    family: Family
    config: Mapping[str, Any]
    make: Callable[[], Any]
    original: Callable[..., dict[str, Tensor]]
    inputs: Callable[[], dict[str, Tensor]]

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """Our network with the library's weights."""
        network = self.family.build_denoiser(FoundDenoiser(part=Part("", Layout.DIFFUSERS), config=self.config))
        state = self.library_state(network)
        network.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
        return network.requires_grad_(False)

    def library_state(self, network: Any) -> dict[str, Tensor]:
        """The library's weights under our network's names, which are the original ones where they are not the library's."""
        state, key_map = self.make().state_dict(), self.family.key_map(network)
        return {key: state[key if key in state else key_map.original(key).key] for key in network.state_dict()}

    def patcher(self, fleet: Fleet | None = None, dtype: torch.dtype = torch.float32) -> UnetPatcher:
        network = self.build()
        model = KModel(
            network, FlowPrediction(multiplier=1.0), storage_dtype=dtype, computation_dtype=torch.float32, build_program=self.family.build_program,
            key_map=self.family.key_map(network),
        )  # fmt: skip
        return UnetPatcher(model, CPU if fleet is None else fleet.primary.torch_device, CPU)


# files


def identify(tiny: TinyFamily, folder: Path, tensors: Mapping[str, Tensor]) -> FoundDenoiser | None:
    save_file(dict(tensors), folder / "model.safetensors")
    with open_tensor_file(folder / "model.safetensors") as file:
        return tiny.family.identify(file)


def check_loading(tiny: TinyFamily, folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FoundDenoiser:
    """The file's tensors reach our network bit for bit, and all of them are used."""
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    with open_tensor_file(folder / "model.safetensors") as file:
        found = tiny.family.identify(file)
        assert found is not None and {name: tiny.config.get(name, value) for name, value in found.config.items()} == dict(found.config)
        network = tiny.family.build_denoiser(found)
        plan = plan_denoiser(network, file, found.part, tiny.family.key_map(network).places)
        check_plan(plan, file, "transformer")
        assert plan.unexpected == ()
        assign_tensors(network, plan, file, storage_dtype=dtype, computation_dtype=dtype)
    own, loaded = tiny.library_state(network), network.state_dict()
    assert len(own) == len(tiny.make().state_dict())
    assert all(torch.equal(loaded[key].view(torch.uint8), own[key].to(dtype).contiguous().view(torch.uint8)) for key in own)
    return found


# LoRA


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


Spellings = Mapping[str, tuple[Callable[[str], str], str, str]]
"""By name: what makes a layer's name in the file, and the endings of up and down."""
ORIGINAL_SPELLINGS: Spellings = {
    "kohya": (kohya, ".lora_up.weight", ".lora_down.weight"),
    "LyCORIS": (lambda name: f"lycoris_{name.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight"),
    "diffusion_model.": (lambda name: f"diffusion_model.{name}", ".lora_B.weight", ".lora_A.weight"),
}
LIBRARY_SPELLINGS: Spellings = {
    "transformer.": (lambda name: f"transformer.{name}", ".lora_B.weight", ".lora_A.weight"),
    "PEFT with an adapter's name": (lambda name: f"base_model.model.{name}", ".lora_B.default.weight", ".lora_A.default.weight"),
    "OneTrainer": (lambda name: f"lora_transformer_{name.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight"),
}


def check_lora_spelling(tiny: TinyFamily, spelling: str, originals: Spellings = ORIGINAL_SPELLINGS, libraries: Spellings = LIBRARY_SPELLINGS) -> None:
    """Every matrix changed by a file in this spelling has W + strength * alpha / rank * up @ down, merged by hand in the spelling's layout."""
    is_original = spelling in originals
    name_of, up_ending, down_ending = (originals if is_original else libraries)[spelling]
    before = tiny.original(tiny.make()) if is_original else tiny.make().state_dict()
    numbers = Numbers()
    file: dict[str, Tensor] = {}
    wanted = dict(before)
    for name, weight in matrices(before).items():
        up, down = numbers(weight.shape[0], RANK), numbers(RANK, weight.shape[1])
        file |= {name_of(name) + up_ending: up, name_of(name) + down_ending: down, f"{name_of(name)}.alpha": torch.tensor(ALPHA)}
        wanted[f"{name}.weight"] = weight + STRENGTH * ALPHA / RANK * up @ down
    network = apply_file(tiny, file)
    check_weights(tiny.original(network) if is_original else _library_names(tiny, network), wanted)


class Numbers:
    """Small random numbers, other ones at each call."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * 0.1


def matrices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with two dims, by their layers' names."""
    return {key.removesuffix(".weight"): tensor for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 2}


def apply_file(tiny: TinyFamily, file: Mapping[str, Tensor], strength: float = STRENGTH) -> Any:
    """Our network with a LoRA file merged, of which every layer must have been found."""
    unet = tiny.patcher()
    patches = match_lora(parse_lora("test", dict(file)), unet, None, model_family=tiny.family.title)
    assert file and patches.unmatched == ()
    unet.add_patches(filename="test", patches=dict(patches.unet), strength_patch=strength)
    unet.refresh_loras()
    return unet.model.diffusion_model


def check_weights(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor, atol=5e-6, rtol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


# LyCORIS


Change = Callable[[Tensor, Numbers], tuple[dict[str, Tensor], Tensor]]
"""(weight (O, I), random numbers) -> (a file's parts for its layer, the weight that they make at strength 1)."""


def loha(weight: Tensor, numbers: Numbers) -> tuple[dict[str, Tensor], Tensor]:
    """Hyeon-Woo et al. 2022, "FedPara", section 2: (w1_a w1_b) * (w2_a w2_b), times alpha / rank."""
    outputs, inputs = weight.shape
    parts = {f"hada_w{number}_{side}": numbers(*shape) * 3 for number in (1, 2) for side, shape in (("a", (outputs, RANK)), ("b", (RANK, inputs)))}
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return {**parts, "alpha": torch.tensor(ALPHA)}, weight + ALPHA / RANK * product


def lokr(weight: Tensor, numbers: Numbers) -> tuple[dict[str, Tensor], Tensor]:
    """Edalati et al. 2022, "KronA": the Kronecker product of a small matrix and one of low rank, times alpha / rank."""
    outputs, inputs = weight.shape
    parts = {"lokr_w1": numbers(2, 2), "lokr_w2_a": numbers(outputs // 2, RANK), "lokr_w2_b": numbers(RANK, inputs // 2)}
    return {**parts, "alpha": torch.tensor(ALPHA)}, weight + ALPHA / RANK * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])


def whole_lokr(weight: Tensor, numbers: Numbers) -> tuple[dict[str, Tensor], Tensor]:
    """Both factors whole: alpha counts for nothing."""
    parts = {"lokr_w1": numbers(2, 2), "lokr_w2": numbers(weight.shape[0] // 2, weight.shape[1] // 2)}
    return {**parts, "alpha": torch.tensor(ALPHA)}, weight + torch.kron(parts["lokr_w1"], parts["lokr_w2"])


def dora(weight: Tensor, numbers: Numbers) -> tuple[dict[str, Tensor], Tensor]:
    """Liu et al. 2024, equation 5, with lengths of outputs as PEFT and LyCORIS write them: each row's direction, and the trained length."""
    up, down = numbers(weight.shape[0], RANK), numbers(RANK, weight.shape[1])
    lengths = numbers(weight.shape[0], 1).abs() + 0.5
    total = weight + up @ down
    return {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": lengths}, total / total.norm(dim=1, keepdim=True) * lengths


def oft(weight: Tensor, numbers: Numbers) -> tuple[dict[str, Tensor], Tensor]:
    """Qiu et al. 2023, section 3: groups of outputs turned by Cayley's transform of a skew matrix."""
    size = 2
    blocks = numbers(weight.shape[0] // size, size, size)
    skew = blocks - blocks.transpose(1, 2)
    rotations = (torch.eye(size) + skew) @ torch.linalg.inv(torch.eye(size) - skew)
    turned = torch.einsum("gnm,gni->gmi", rotations, weight.reshape(-1, size, weight.shape[1])).reshape(weight.shape)
    return {"oft_blocks": blocks}, turned


ADAPTERS: dict[str, Change] = {"LoHa": loha, "LoKr": lokr, "LoKr of whole factors": whole_lokr, "DoRA": dora, "OFT": oft}


def check_adapter(tiny: TinyFamily, kind: str) -> None:
    """Every matrix of an original file, fused ones included, changed by a file of this kind, as the paper's formula changes it by hand."""
    before = tiny.original(tiny.make())
    numbers, wanted = Numbers(), dict(before)
    file: dict[str, Tensor] = {}
    for name, weight in matrices(before).items():
        if len(weight) % 2:
            continue  # their factors and groups have two rows
        parts, wanted[f"{name}.weight"] = ADAPTERS[kind](weight, numbers)
        file |= {f"diffusion_model.{name}.{part}": tensor for part, tensor in parts.items()}
    check_weights(tiny.original(apply_file(tiny, file, strength=1.0)), wanted)


def _library_names(tiny: TinyFamily, network: Any) -> dict[str, Tensor]:
    state, key_map = tiny.make().state_dict(), tiny.family.key_map(network)
    return {key if key in state else key_map.original(key).key: tensor for key, tensor in network.state_dict().items()}


# several slots


def one_by_one(tiny: TinyFamily, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows run alone on one slot."""
    unet, inputs = tiny.patcher(dtype=dtype), tiny.inputs()
    num_rows = inputs["x"].shape[0]
    return torch.cat([unet.model.apply_model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}) for row in range(num_rows)])


def check_slots(tiny: TinyFamily, strategy: Any, count: int, dtype: torch.dtype = torch.float32) -> None:
    """By layers the very bits of one slot; by replicas the same up to rounding."""
    inputs = tiny.inputs()
    expected = one_by_one(tiny, dtype)
    with virtual_fleet(count) as fleet:
        unet = tiny.patcher(fleet, dtype)
        request = SamplingRequest(images=inputs["x"].shape[0], branches=1, strategy=strategy)
        session = begin_session(unet, tuple(inputs["x"].shape), request)
        assert session is not None and session.plan.strategy == strategy and len(session.plan.used_slots) > 1
        for _ in range(2):  # the second time with the cut made from measured times
            result = unet.model.apply_model(**{name: tensor.to(unet.load_device) for name, tensor in inputs.items()}).cpu()
            if strategy == "layers":
                assert torch.equal(result, expected)
            else:
                torch.testing.assert_close(result, expected, atol=ATOL, rtol=0)
        end_session(unet)
