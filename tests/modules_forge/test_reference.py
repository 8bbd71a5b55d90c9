"""Reference attention, against diffusers' UNet with the test's own attention processors, which store and join hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.loader import load_checkpoint
from backend.parallel.running.session import find_bound_hook
from backend.patcher.unet import UnetPatcher
from backend.sampling.sampling_function import denoise_guided
from modules_forge.reference import Reference, add_reference, find_reference_attention
from tests.support.checkpoints import ReferenceModels, write_checkpoint

CFG = 4.0


class _Keeping:
    """The library's self-attention that records what it sees, or also attends to the record. The rows are negative, positive."""

    def __init__(self, *, is_self: bool, fidelity: float = 0.0) -> None:
        self.is_self, self.fidelity, self.mode = is_self, fidelity, "plain"
        self.seen = torch.empty(0)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        if self.is_self and self.mode == "keep":
            self.seen = hidden_states.clone()
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        plain = self._attend(attn, hidden_states, context)
        if not self.is_self or self.mode != "join":
            return plain
        joined = self._attend(attn, hidden_states, torch.cat([context, self.seen], dim=1))
        joined[:1] = joined[:1] * (1 - self.fidelity) + plain[:1] * self.fidelity
        return joined

    @staticmethod
    def _attend(attn: Any, query: Tensor, context: Tensor) -> Tensor:
        q, k, v = (attn.head_to_batch_dim(one) for one in (attn.to_q(query), attn.to_k(context), attn.to_v(context)))
        mixed = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k), v))
        result: Tensor = attn.to_out[0](mixed)
        return result


class _Case:
    def __init__(self, folder: Path) -> None:
        memory_management.configure(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
        self.models: ReferenceModels = write_checkpoint(folder / "model.safetensors", "sd15")
        self.unet: UnetPatcher = load_checkpoint(folder / "model.safetensors", config=BackendConfig()).forge_objects.unet
        draw = torch.Generator().manual_seed(1)
        self.x, self.latent, self.noise = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(3))
        width = self.models.unet.config.cross_attention_dim
        self.cond, self.uncond = (torch.randn(1, 7, width, generator=draw) for _ in range(2))
        self.sigma = torch.tensor([5.0])

    def reference(self, **fields: Any) -> Reference:
        return Reference(self.latent, self.noise, **fields)

    def denoise(self, unet: UnetPatcher, x: Tensor | None = None, scale: float = CFG) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x if x is None else x
        rows = x.shape[0]
        found = denoise_guided(
            unet,
            x * 5.0,
            self.sigma.expand(rows),
            text_cond=self.cond.expand(rows, -1, -1),
            text_uncond=self.uncond.expand(rows, -1, -1),
            cond_scale=scale,
        )
        return found[0], found[1], found[2]

    @torch.no_grad()
    def by_hand(self, fidelity: float) -> Tensor:
        """x0 from the library's UNet: negative + scale * (positive - negative)."""
        network, predictor = self.models.unet, self.unet.model.predictor
        before = network.attn_processors
        kept = {name: _Keeping(is_self=".attn1." in name, fidelity=fidelity) for name in before}
        network.set_attn_processor(dict(kept))
        both, sigma = torch.cat([self.uncond, self.cond]), self.sigma
        try:
            for mode, x in (("keep", self.latent + self.noise * 5.0), ("join", self.x * 5.0)):
                for one in kept.values():
                    one.mode = mode
                scaled = x / (25.0 + 1.0) ** 0.5
                eps = network(scaled.repeat(2, 1, 1, 1), predictor.timestep(sigma), encoder_hidden_states=both).sample
        finally:
            network.set_attn_processor(before)
        negative, positive = (self.x * 5.0 - 5.0 * eps).chunk(2)
        return negative + CFG * (positive - negative)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Case]:
    with torch.inference_mode(False):
        yield _Case(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0])
def test_a_step_is_that_of_the_library_with_joined_hidden_states(case: _Case, fidelity: float) -> None:
    ours, by_hand = case.denoise(add_reference(case.unet, case.reference(fidelity=fidelity)))[0], case.by_hand(fidelity)
    assert (ours - case.denoise(case.unet)[0]).abs().max() > 0.05
    assert (ours - by_hand).abs().max() < 2e-3


def test_off_again_and_out_of_range_are_bit_equal(case: _Case) -> None:
    plain = case.denoise(case.unet)[0]
    hooked = add_reference(case.unet, case.reference(weight=0.0))
    assert torch.allclose(case.denoise(hooked)[0], plain, atol=1e-4)
    assert not torch.equal(case.denoise(add_reference(case.unet, case.reference()))[0], plain)
    assert torch.equal(case.denoise(case.unet)[0], plain)
    late = add_reference(case.unet, case.reference(sigma_range=(0.0, 4.9)))
    assert torch.equal(case.denoise(late)[0], case.denoise(hooked)[0])


def test_the_weight_lies_between_nothing_and_all(case: _Case) -> None:
    predictions = [case.denoise(add_reference(case.unet, case.reference(weight=weight)))[1] for weight in (0.0, 0.3, 1.0)]
    shifts = [(one - predictions[0]).abs().mean() for one in predictions]
    assert shifts[0] == 0 and 0 < shifts[1] < shifts[2]


def test_full_fidelity_leaves_the_negative_branch_alone(case: _Case) -> None:
    assert torch.allclose(
        case.denoise(add_reference(case.unet, case.reference(fidelity=1.0)))[2], case.denoise(case.unet)[2], atol=1e-4
    )  # fmt: skip


def test_without_guidance_only_the_positive_branch_is_written(case: _Case) -> None:
    patched = add_reference(case.unet, case.reference())
    case.denoise(patched, scale=1.0)
    hook = find_reference_attention(patched.model_options)
    assert hook is not None and {tuple(kinds) for kinds in hook.references[0].bank.values()} == {(0,)}


def test_every_picture_of_a_batch_is_the_picture_alone(case: _Case) -> None:
    batch = torch.cat([case.x, -case.x])
    together = case.denoise(add_reference(case.unet, case.reference()), batch)[0]
    alone = case.denoise(add_reference(case.unet, case.reference()), batch[1:])[0]
    assert (together[1:] - alone).abs().max() < 1e-4


def test_two_references_both_act_and_clearing_lets_go(case: _Case) -> None:
    one = add_reference(case.unet, case.reference())
    two = add_reference(one, Reference(-case.latent, case.noise))
    assert not torch.equal(case.denoise(one)[0], case.denoise(two)[0])
    hook = find_reference_attention(two.model_options)
    assert hook is not None and [bool(reference.bank) for reference in hook.references] == [True, True]
    hook.clear()
    assert not any(reference.bank for reference in hook.references)


def test_what_a_step_keeps_is_foreseen_and_binds_the_network_to_its_slot(case: _Case) -> None:
    patched = add_reference(case.unet, case.reference())
    case.denoise(patched)
    hook = find_reference_attention(patched.model_options)
    assert hook is not None
    kept = sum(tensor.nbytes for kinds in hook.references[0].bank.values() for pair in kinds.values() for tensor in pair)
    assert kept <= patched.extra_preserved_memory_during_sampling <= 4 * kept
    assert find_bound_hook(patched.model_options["transformer_options"]) == "ReferenceAttention holds tensors of its own"
    assert find_bound_hook(case.unet.model_options["transformer_options"]) is None
