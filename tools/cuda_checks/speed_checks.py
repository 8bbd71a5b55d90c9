"""The GPU against diffusers: step time, peak memory, and the time of each piece of the network against the planner's estimate."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backend.nn.network_call import NetworkCall
from backend.nn.piece import Piece
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.planning.costs import contains
from backend.parallel.planning.profiling import profile_unet
from backend.parallel.running.session import guess_speed
from backend.sampling.noise import ImageNoise
from backend.sampling.registry import find_sampler
from backend.sampling.sampler_types import SamplerSettings
from backend.sampling.sampling_function import denoise_guided, sampling_cleanup, sampling_prepare
from modules.processing import process_images
from modules.prompts.schedules import SdConditioning
from tools.cuda_checks.machine import GB, DriverPeak, Machine, difference
from tools.cuda_checks.networks import application, build_patcher, build_pipeline, checkpoint_path, side_px, txt2img, write_checkpoint
from tools.cuda_checks.runner import Report
from tools.measure import order_of_round

CFG = 7.0


def check_checkpoints(machine: Machine, report: Report) -> None:
    """Write randomly initialized checkpoints of both families, which later checks load."""
    for family in ("sd15", "sdxl"):
        seconds = machine.seconds(lambda family=family: write_checkpoint(machine, family))  # type: ignore[misc]
        report.value(f"wrote {family}", seconds=round(seconds, 2), gb=round(checkpoint_path(machine, family).stat().st_size / GB, 3))


def check_sd15(machine: Machine, report: Report) -> None:
    _compare_with_pipeline(machine, report, "sd15")


def check_sdxl(machine: Machine, report: Report) -> None:
    _compare_with_pipeline(machine, report, "sdxl")


def _compare_with_pipeline(machine: Machine, report: Report, family: str) -> None:
    num_steps, num_rounds = machine.pick(10, 2), machine.pick(7, 2)
    with application(machine, family) as app:
        report.value("load", seconds=round(machine.seconds(app.models.ensure_loaded), 2))
        process_images(txt2img(machine, family, steps=2))  # warms up
        machine.settle()
        with DriverPeak() as driver:
            seconds = machine.seconds(lambda: process_images(txt2img(machine, family, steps=num_steps)))
        report.value("ours, whole request", seconds=round(seconds, 3), steps=num_steps, **machine.peak_gb(), driver_gb=_gb(driver.used_bytes))
        engine = app.models.ensure_loaded()
        machine.settle()
        before_bytes = machine.allocated_bytes()
        pipeline = build_pipeline(machine, family, engine)
        _library_request(machine, report, pipeline, family, num_steps, before_bytes)
        inputs = _inputs(machine, engine, family, num_steps)
        ours, library = _our_latents(machine, engine, inputs), _library_latents(pipeline, inputs, family)
        diff = difference(ours(), library())
        report.expect("latents agree with diffusers'", diff["max_of_spread"] < 0.2, **diff)
        for name, run in (("ours", ours), ("diffusers", library)):
            machine.settle()
            run()
            peak_gb = machine.peak_gb()["allocated_gb"]
            report.value(f"{name}, UNet phase, both on the device", peak_above_weights_gb=_above(peak_gb, machine.allocated_bytes()))
        times = _interleave(machine, {"ours": ours, "diffusers": library}, num_rounds)
        per_step_ms = {name: [1000 * one / num_steps for one in all_s] for name, all_s in times.items()}
        ratios = [mine / theirs for mine, theirs in zip(per_step_ms["ours"], per_step_ms["diffusers"])]
        report.value("ms per step", **{name: round(statistics.median(all_ms), 3) for name, all_ms in per_step_ms.items()}, raw=per_step_ms)
        report.expect("one slot is not slower than diffusers", statistics.median(ratios) < 1.02, ratio=statistics.median(ratios), ratios=ratios)


def _gb(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / GB, 3)


def _above(peak_gb: float | None, live_bytes: int) -> float | None:
    return None if peak_gb is None else round(peak_gb - live_bytes / GB, 3)


def _library_request(machine: Machine, report: Report, pipeline: Any, family: str, num_steps: int, before_bytes: int) -> None:
    """A whole request with diffusers' pipeline; its peak, not counting our memory on the device."""
    side = side_px(machine, family)

    def request(steps: int) -> None:
        pipeline(
            "a red cat on a green hill", negative_prompt="a dog", height=side, width=side, num_inference_steps=steps, guidance_scale=CFG
        )  # fmt: skip

    request(2)
    machine.settle()
    seconds = machine.seconds(lambda: request(num_steps))
    peak_gb = machine.peak_gb()["allocated_gb"]
    report.value("diffusers, whole request", seconds=round(seconds, 3), steps=num_steps, allocated_gb=_above(peak_gb, before_bytes))


def _inputs(machine: Machine, engine: Any, family: str, num_steps: int) -> dict[str, Any]:
    """Conditions, noise and noise levels for both implementations."""
    from diffusers import EulerDiscreteScheduler

    from tools.cuda_checks.networks import SCHEDULE

    side = side_px(machine, family)
    texts = (SdConditioning(["a red cat"], width=side, height=side), SdConditioning(["a dog"], is_negative_prompt=True, width=side, height=side))
    cond, uncond = (engine.get_learned_conditioning(text) for text in texts)
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULE)
    scheduler.set_timesteps(num_steps)
    noise_BCHW = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(3)).to(machine.device)
    return {"cond": cond, "uncond": uncond, "sigmas": scheduler.sigmas.to(machine.device), "noise": noise_BCHW, "steps": num_steps, "side": side}


def _our_latents(machine: Machine, engine: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    unet = engine.forge_objects.unet
    noise_BCHW, sigmas_T = inputs["noise"], inputs["sigmas"]

    @torch.inference_mode()
    def run() -> Tensor:
        sampling_prepare(unet, noise_BCHW)
        latents_BCHW: Tensor = find_sampler("Euler").function(
            lambda x, sigma: denoise_guided(unet, x, sigma, text_cond=inputs["cond"], text_uncond=inputs["uncond"], cond_scale=CFG)[0],
            noise_BCHW * sigmas_T[0], sigmas_T, settings=SamplerSettings(), noise=ImageNoise(tuple(noise_BCHW.shape[1:]), [0]),
        )  # fmt: skip
        sampling_cleanup(unet)
        machine.sync()
        return latents_BCHW

    return run


def _library_latents(pipeline: Any, inputs: dict[str, Any], family: str) -> Callable[[], Tensor]:
    dtype = pipeline.unet.dtype
    cond, uncond = inputs["cond"], inputs["uncond"]
    device = inputs["noise"].device
    texts = [one["crossattn"] if family == "sdxl" else one for one in (cond, uncond)]
    extra: dict[str, Any] = {}
    if family == "sdxl":
        width = pipeline.text_encoder_2.config.projection_dim
        pooled = [one["vector"][:, :width].to(device, dtype) for one in (cond, uncond)]
        extra = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}

    def run() -> Tensor:
        result: Tensor = pipeline(
            prompt_embeds=texts[0].to(device, dtype), negative_prompt_embeds=texts[1].to(device, dtype), latents=inputs["noise"].to(dtype),
            height=inputs["side"], width=inputs["side"], num_inference_steps=inputs["steps"], guidance_scale=CFG, output_type="latent", **extra,
        ).images  # fmt: skip
        return result

    return run


def _interleave(machine: Machine, runs: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Seconds by name, one per round, alternating, every other round in reverse."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(num_rounds):
        for name in order_of_round(list(runs), index):
            times[name].append(machine.seconds(runs[name]))
    return times


def check_segments(machine: Machine, report: Report) -> None:
    """ms per piece of the network against its share of FLOPs, and a step against the planner's first estimate."""
    stored: dict[str, Any] = {}
    for family in ("sd15", "sdxl"):
        unet = build_patcher(machine, family)
        call = make_call(machine, unet, family, num_rows=2)
        measured = _time_pieces(machine, unet, call, times=machine.pick(7, 2))
        profile = profile_unet(
            unet.model.diffusion_model.config, latent_height=call.rows["x"].shape[2], latent_width=call.rows["x"].shape[3], dtype=machine.dtype
        )
        total_ms, total_flops = sum(measured.values()), profile.flops_per_row
        rows = []
        for cost in profile.pieces:
            piece_ms = sum(ms for piece, ms in measured.items() if contains(cost.piece, piece))
            predicted_ms = total_ms * cost.flops_per_row / total_flops
            rows.append({"piece": str(cost.piece), "ms": round(piece_ms, 4), "by_flops_ms": round(predicted_ms, 4), "kernels": cost.num_kernels})
        whole_ms = machine.median_ms(lambda unet=unet, call=call: unet.model.run_here(call), times=machine.pick(7, 2))  # type: ignore[misc]
        guess_ms = profile.work_per_row * call.num_rows / guess_speed(current_fleet().primary)
        off = sum(abs(row["ms"] - row["by_flops_ms"]) for row in rows) / total_ms  # type: ignore[operator]
        report.value(
            f"{family}, 2 rows", whole_ms=round(whole_ms, 3), sum_of_pieces_ms=round(total_ms, 3), planner_first_guess_ms=round(guess_ms, 3),
            share_misplaced_by_flops=round(off / 2, 4), tflop_per_s=round(2 * total_flops / whole_ms / 1e9, 1),
        )  # fmt: skip
        stored[family] = {"rows": 2, "latent": list(call.rows["x"].shape), "whole_ms": whole_ms, "pieces": rows}
        worst = max(rows, key=lambda row: abs(row["ms"] - row["by_flops_ms"]))  # type: ignore[operator]
        report.value(f"{family}, piece farthest from its FLOPs", **worst)
        del unet, call
        machine.settle()
    (machine.out_dir / "segments.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")


def make_call(machine: Machine, unet: Any, family: str, num_rows: int) -> NetworkCall:
    """Random inputs of the family's size, the same every time."""
    config, dtype = unet.model.diffusion_model.config, unet.model.computation_dtype
    side = side_px(machine, family) // 8
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(machine.device, dtype)

    width = config.projection_class_embeddings_input_dim
    rows = {
        "x": random(num_rows, 4, side, side),
        "timesteps": torch.full((num_rows,), 500.0, device=machine.device),
        "context": random(num_rows, 77, config.cross_attention_dim),
    }
    return NetworkCall(rows=rows if width is None else {**rows, "y": random(num_rows, width)})


def _time_pieces(machine: Machine, unet: Any, call: NetworkCall, times: int) -> dict[Piece, float]:
    """Median ms of every finest piece, with the device idle before and after each."""
    program = unet.model.program
    samples: dict[Piece, list[float]] = {}
    for run in range(times + 1):
        state = call.start(program)
        for piece in program.finest_pieces():
            one_ms = 1000 * machine.seconds(lambda piece=piece, state=state: program.run_piece(piece, state))
            if run:  # the first run warms up
                samples.setdefault(piece, []).append(one_ms)
    return {piece: statistics.median(all_ms) for piece, all_ms in samples.items()}
