"""LoRA and ControlNet at full width on a GPU: their cost compared to memory speed and to a step, and that a LoRA leaves no trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backend.nn.controlnet import ControlNetwork
from backend.parallel.running.session import SamplingRequest
from backend.patcher.controlnet import ControlNet, apply_controlnet_advanced
from backend.patcher.lora_math import LoraPatch
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from tools.cuda_checks.machine import GB, Machine, difference
from tools.cuda_checks.networks import build_control_network, build_networks, build_patcher, side_px
from tools.cuda_checks.runner import Report

RANK = 16
CFG = 7.0


def check_lora(machine: Machine, report: Report) -> None:
    """Apply a rank 16 LoRA to all layers of the UNet, change its strength, remove it; compared with copying the same weights."""
    for family in ("sd15", "sdxl"):
        unet = build_patcher(machine, family)
        patches: dict[str, Any] = {}
        for key, weight in unet.model.named_parameters():
            if weight.ndim >= 2:
                patches[key] = LoraPatch(up=torch.randn(weight.shape[0], RANK) * 0.01, down=torch.randn(RANK, *weight.shape[1:]) * 0.01, alpha=8.0)
        weights = [weight for key, weight in unet.model.named_parameters() if key in patches]
        num_gb = sum(weight.nbytes for weight in weights) / GB
        before = [weight.detach().clone() for weight in weights]
        copy_s = machine.seconds(lambda weights=weights: [weight.clone() for weight in weights])  # type: ignore[misc]
        report.value(f"{family}, weights", gb=round(num_gb, 3), layers=len(patches), copy_s=copy_s)
        machine.settle()
        for turn in ("first time", "again"):
            times = {}
            for step, strength in (("apply", 0.8), ("other strength", 0.5), ("nothing new", 0.5), ("remove", 0.0)):
                patcher = unet.clone()
                if strength:
                    patcher.add_patches(filename="check", patches=patches, strength_patch=strength)
                times[f"{step} s"] = round(machine.seconds(patcher.refresh_loras), 4)
            report.value(f"{family}, {turn}", **times, apply_s_per_gb=round(times["apply s"] / num_gb, 4))
        report.expect(f"{family}: weights are bit-equal after removal", all(torch.equal(one, other) for one, other in zip(weights, before)))
        report.value(f"{family}, peak while patching", **machine.peak_gb())
        del unet, patcher, patches, weights, before
        machine.settle()


def check_controlnet(machine: Machine, report: Report) -> None:
    """A guided SDXL step with zero, one and two ControlNets, on one slot and on two slots of one GPU, compared with diffusers' own modules."""
    family = machine.pick("sdxl", "sd15")
    outputs = {num_slots: _control_steps(machine, report, family, num_slots) for num_slots in (1, 2)}
    for num_controls in (1, 2):
        report.expect(f"{num_controls} ControlNet(s) act", not torch.equal(outputs[1][num_controls], outputs[1][0]))
        diff = difference(outputs[2][num_controls], outputs[1][num_controls])
        report.expect(f"{num_controls} ControlNet(s): two slots as one", diff["max_of_spread"] < 0.05, **diff)
    _library_steps(machine, report, family)


def _control_steps(machine: Machine, report: Report, family: str, num_slots: int) -> list[Tensor]:
    """Denoised latents of a step with zero, one and two ControlNets; same weights and inputs at every call."""
    machine.use(num_slots)
    machine.settle()
    torch.manual_seed(7)
    side, unet = side_px(machine, family), build_patcher(machine, family)
    controls = [ControlNet(ControlNetwork(build_control_network(machine, family, seed)), load_device=machine.device) for seed in (1, 2)]
    generator = torch.Generator().manual_seed(7)
    hint_BCHW = torch.rand(1, 3, side, side, generator=generator)
    cond, uncond = _conditions(machine, unet, generator)
    x_BCHW = (torch.randn(1, 4, side // 8, side // 8, generator=generator) * 5).to(machine.device)
    sigma_B, outputs = torch.full((1,), 5.0).to(machine.device), []
    for num_controls in (0, 1, 2):
        patched = unet
        for control in controls[:num_controls]:
            patched = apply_controlnet_advanced(patched, control, hint_BCHW, 0.7, 0.0, 1.0)
        session = sampling_prepare(patched, x_BCHW, SamplingRequest(images=1, branches=2, strategy="auto"))

        def step(patched: Any = patched) -> Tensor:
            return denoise_guided(patched, x_BCHW, sigma_B, text_cond=cond, text_uncond=uncond, cond_scale=CFG)[0]

        outputs.append(step().cpu().clone())
        machine.settle()
        step_ms = machine.median_ms(step, times=machine.pick(7, 2))
        plan = session.plan.strategy if session is not None else "one slot"
        report.value(f"{num_slots} slot(s), {num_controls} ControlNet(s)", step_ms=round(step_ms, 2), plan=plan, **machine.peak_gb())
        sampling_cleanup(patched)
    return outputs


def _conditions(machine: Machine, unet: Any, generator: torch.Generator) -> list[Any]:
    """For both branches: (1, 77, D), with SDXL's vector if the network takes one."""
    config = unet.model.diffusion_model.config
    width = config.projection_class_embeddings_input_dim
    found: list[Any] = []
    for _ in range(2):
        text_BLD = torch.randn(1, 77, config.cross_attention_dim, generator=generator).to(machine.device)
        vector_BV = None if width is None else torch.randn(1, width, generator=generator).to(machine.device)
        found.append(text_BLD if vector_BV is None else {"crossattn": text_BLD, "vector": vector_BV})
    return found


def _library_steps(machine: Machine, report: Report, family: str) -> None:
    """diffusers' UNet with its own ControlNets and attention, of the same size as ours: two rows."""
    machine.use()
    machine.settle()
    network, side, dtype = build_networks(machine, family)[0], side_px(machine, family), machine.dtype
    networks = [build_control_network(machine, family, seed) for seed in (1, 2)]
    config: Any = network.config
    x_BCHW = torch.randn(2, 4, side // 8, side // 8, device="cpu").to(machine.device, dtype)
    text_BLD = torch.randn(2, 77, config.cross_attention_dim, device="cpu").to(machine.device, dtype)
    extra: dict[str, Any] = {}
    if config.projection_class_embeddings_input_dim is not None:
        pooled = torch.randn(2, config.projection_class_embeddings_input_dim - 6 * 256, device="cpu").to(machine.device, dtype)
        extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((2, 6), float(side)).to(machine.device, dtype)}
    hints_BCHW = torch.rand(2, 3, side, side, device="cpu").to(machine.device, dtype)

    def step(num_controls: int) -> Tensor:
        residuals: list[Any] = []
        for control in networks[:num_controls]:
            down, mid = control(x_BCHW, 500, text_BLD, hints_BCHW, 0.7, return_dict=False, **extra)
            residuals.append((down, mid))
        down_sum = [sum(parts) for parts in zip(*(down for down, _ in residuals))] if residuals else None
        mid_sum = sum(mid for _, mid in residuals) if residuals else None
        result: Tensor = network(
            x_BCHW, 500, text_BLD, down_block_additional_residuals=down_sum, mid_block_additional_residual=mid_sum, return_dict=False, **extra
        )[0]
        return result

    for num_controls in (0, 1, 2):
        step_ms = machine.median_ms(lambda count=num_controls: step(count), times=machine.pick(7, 2))  # type: ignore[misc]
        report.value(f"diffusers, {num_controls} ControlNet(s)", step_ms=round(step_ms, 2))
