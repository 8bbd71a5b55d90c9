"""What every family of transformers is held to with a tiny network: LoRA spellings by hand-merged weights, and plans over several slots.

A family's test gives a `TinyFamily` and calls these checks; only what is its own is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from backend.parallel.placing.fleet import Fleet
from backend.parallel.running.session import SamplingRequest, begin_session, end_session
from backend.patcher.lora_files import match_lora, parse_lora
from backend.patcher.unet import UnetPatcher
from backend.state_dict import assign_tensors, check_plan, plan_denoiser
from tests.support.fleets import virtual_fleet

CPU = torch.device("cpu")
RANK, ALPHA, STRENGTH = 4, 2.0, 0.75
ATOL = 2e-5


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


ORIGINAL_SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (kohya, ".lora_up.weight", ".lora_down.weight"),
    "LyCORIS": (lambda name: f"lycoris_{name.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight"),
    "diffusion_model.": (lambda name: f"diffusion_model.{name}", ".lora_B.weight", ".lora_A.weight"),
}
LIBRARY_SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "transformer.": (lambda name: f"transformer.{name}", ".lora_B.weight", ".lora_A.weight"),
    "PEFT with an adapter's name": (lambda name: f"base_model.model.{name}", ".lora_B.default.weight", ".lora_A.default.weight"),
    "OneTrainer": (lambda name: f"lora_transformer_{name.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight"),
}


def check_lora_spelling(tiny: TinyFamily, spelling: str) -> None:
    """Every matrix changed by a file in this spelling has W + strength * alpha / rank * up @ down, merged by hand in the spelling's layout."""
    is_original = spelling in ORIGINAL_SPELLINGS
    name_of, up_ending, down_ending = (ORIGINAL_SPELLINGS if is_original else LIBRARY_SPELLINGS)[spelling]
    before = tiny.original(tiny.make()) if is_original else tiny.make().state_dict()
    generator = torch.Generator().manual_seed(3)
    file: dict[str, Tensor] = {}
    wanted = dict(before)
    for key, tensor in before.items():
        if not key.endswith(".weight") or tensor.ndim != 2:
            continue
        name = key.removesuffix(".weight")
        up, down = torch.randn(tensor.shape[0], RANK, generator=generator) * 0.1, torch.randn(RANK, tensor.shape[1], generator=generator) * 0.1
        file |= {name_of(name) + up_ending: up, name_of(name) + down_ending: down, f"{name_of(name)}.alpha": torch.tensor(ALPHA)}
        wanted[key] = tensor + STRENGTH * ALPHA / RANK * up @ down
    unet = tiny.patcher()
    patches = match_lora(parse_lora("test", file), unet, None, model_family=tiny.family.title)
    assert file and patches.unmatched == ()
    unet.add_patches(filename="test", patches=dict(patches.unet), strength_patch=STRENGTH)
    unet.refresh_loras()
    network = unet.model.diffusion_model
    made = tiny.original(network) if is_original else _library_names(tiny, network)
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


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
