"""KModel: one denoising step of one batch, from noisy latents and a noise level to the denoised latents.

A KModel combines a UNet (as a program of segments) with its prediction. It does not know where its weights are; `split_unet_across_gpus` cuts one
over slots from outside. Must not know guidance, samplers or prompts.

Shapes: B batch, C channels, H W latent rows and columns, L tokens, D width of a token, V width of SDXL's vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from backend import memory_management, profiler
from backend.attention import install_attention
from backend.families.key_map import KeyMap
from backend.families.unet_family import build_unet_program, unet_key_map
from backend.modules.k_prediction import AbstractPrediction
from backend.nn.deferred_control import DeferredControl
from backend.nn.empty_network import META, make_empty_network
from backend.nn.network_call import NetworkCall, Runner
from backend.nn.owner import owner_of
from backend.nn.program import Program, TransformerOptions
from backend.nn.unet import with_replaced_views
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.planning.plan import Plan, ReplicaPlan
from backend.parallel.running.executor import Executor, Replica
from backend.storage.kinds import has_packed_weights
from backend.storage.running import set_types

if TYPE_CHECKING:
    from backend.patcher.base import ModelPatcher

BuildProgram = Callable[[Any], Program]


@dataclass(slots=True)
class _InForce:
    """The network's current runner. A copy of the network starts without one."""

    runner: Runner | None = None


class KModel(nn.Module):
    """A denoiser. `diffusion_model` owns all weights; `program`, made by `build_program`, runs it and contains everything specific to its family.

    Weights are stored in `storage_dtype` or packed, and layers compute in `computation_dtype`. If these differ (`is_compact`), each layer's weights
    are dequantized while it runs; or, if it `multiplies_fp8`, those stored in e4m3 are multiplied as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        predictor: AbstractPrediction,
        *,
        storage_dtype: torch.dtype | None = None,
        computation_dtype: torch.dtype | None = None,
        config: object = None,
        build_program: BuildProgram = build_unet_program,
        key_map: KeyMap | None = None,
        multiplies_fp8: bool = False,
    ) -> None:
        super().__init__()
        self.diffusion_model: Any = model
        self.predictor = predictor
        self.config = config
        self.key_map = unet_key_map(model) if key_map is None else key_map
        self.storage_dtype: torch.dtype = storage_dtype or next(model.parameters()).dtype
        self.computation_dtype: torch.dtype = computation_dtype or self.storage_dtype
        self.multiplies_fp8 = multiplies_fp8
        set_types(model, self.storage_dtype, self.computation_dtype, multiplies_fp8=multiplies_fp8)
        self.is_compact = self.storage_dtype != self.computation_dtype or has_packed_weights(model)
        install_attention(model)
        self.build_program = build_program
        self.program: Program = build_program(model)

    @property
    def runner(self) -> Runner | None:
        """Runs the network on all rows of a call while there is a plan over several slots."""
        return owner_of(self).part(_InForce).runner

    @runner.setter
    def runner(self, runner: Runner | None) -> None:
        owner_of(self).part(_InForce).runner = runner

    @property
    def deferred_networks(self) -> frozenset[nn.Module]:
        """ControlNets whose residuals the runner computes itself, so that calls may defer them."""
        return frozenset() if self.runner is None else self.runner.deferred_networks

    def make_empty(self) -> KModel:
        """A denoiser of the same kind, with the same names and types, on the meta device."""
        empty = KModel(
            make_empty_network(self.diffusion_model),
            copy.deepcopy(self.predictor).to(META),
            storage_dtype=self.storage_dtype,
            computation_dtype=self.computation_dtype,
            config=self.config,
            build_program=self.build_program,
            key_map=self.key_map,
            multiplies_fp8=self.multiplies_fp8,
        )
        return empty.train(self.training)

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Mapping[str, Sequence[Tensor | None]] | DeferredControl | None = None,
        transformer_options: TransformerOptions | None = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x0 (B, C, H, W) in fp32 of noisy latents `x` at noise levels `t` (B,).

        `c_concat` (B, C', H, W): mask and masked picture for an inpainting model. `c_crossattn` (B, L, D): text. `y` (B, V): SDXL's pooled text
        and sizes. `control`: ControlNet residuals, computed or deferred. Other tensors (Flux's `guidance`) are passed under their own names. The
        network gets the inputs that its program reads.
        """
        if torch.is_grad_enabled():  # asked once, because entering the context costs more calls than the rest of this function
            with torch.no_grad():
                return self.apply_model(x, t, c_concat, c_crossattn, control, transformer_options, y, **kwargs)
        sigma, dtype, predictor = t, self.computation_dtype, self.predictor
        model_input = predictor.calculate_input(sigma, x)
        if c_concat is not None:
            model_input = torch.cat([model_input, c_concat.to(model_input)], dim=1)
        context = None if c_crossattn is None else c_crossattn.to(dtype)
        known = {"x": model_input.to(dtype), "timesteps": predictor.timestep(sigma), "sigma": sigma, "context": context, "y": y}
        inputs = {name: tensor for name, tensor in {**kwargs, **known}.items() if isinstance(tensor, Tensor) and name in self.program.reads}
        call = NetworkCall(rows=inputs, control=control, options=with_replaced_views(self.diffusion_model, transformer_options or {}))
        return predictor.calculate_denoised(sigma, self.run_network(call).float(), x)

    def run_network(self, call: NetworkCall) -> Tensor:
        """Run all rows of a call according to the plan. The result is on the call's device."""
        runner = self.runner
        return self.run_here(call) if runner is None else runner.run(call)

    def run_here(self, call: NetworkCall) -> Tensor:
        """Run all rows in one pass, on the device of the call and the weights."""
        recorder = profiler.recorder()
        if recorder.is_on:
            with recorder.measure("network", "whole network", device=call.device, batch=recorder.next_batch(), rows=call.num_rows):
                output = self._run(call)
        else:
            output = self._run(call)
        profiler.meter().count_stage_run_on(call.device)
        return output

    def _run(self, call: NetworkCall) -> Tensor:
        program, stages = self.program, current_fleet().recorder
        foreign_forward = program.foreign_forward()
        if foreign_forward is not None:
            return foreign_forward(call.rows)
        state = call.start(program)
        if stages is None:
            return program.run(state)
        stages.run(program, program.whole_pieces(), state)
        output: Tensor = state.tensors[program.output]
        return output

    def memory_required(self, input_shape: Sequence[int]) -> float:
        """Estimated working memory, in bytes, of a forward pass over (B, C, H, W)."""
        return self.program.working_bytes(input_shape, self.computation_dtype.itemsize)


@dataclass(eq=False)
class SplitUNet:
    """A denoiser whose pieces are on several slots. `undo`, or leaving a `with` block, reverses the split."""

    model: KModel
    plan: ReplicaPlan
    _devices: Mapping[nn.Module, torch.device]
    _runner_before: Runner | None
    _executor: Executor

    def undo(self) -> None:
        """Move every tensor back to where it was before the split, and restore the previous runner."""
        self.model.runner = self._runner_before
        self._executor.close()
        for module, device in self._devices.items():
            memory_management.module_move(module, device, recursive=False)

    def __enter__(self) -> SplitUNet:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def split_unet_across_gpus(unet: KModel | ModelPatcher, plan: Plan | ReplicaPlan) -> SplitUNet:
    """Move the UNet's pieces to their slots according to the first replica of `plan`, and run it there until `undo`.

    The time embedding goes with the first piece; the prediction's tables stay with the latents. Parameter names do not change. Nothing is counted
    or evicted here: a job's sampling run places plans through memory management. Raises: torch.OutOfMemoryError, after moving the network back;
    ValueError for a plan with other pieces.
    """
    model = unet if isinstance(unet, KModel) else cast("KModel", unet.model)
    replica = plan if isinstance(plan, ReplicaPlan) else plan.replicas[0]
    _check_pieces(model.program, replica)
    fleet = current_fleet()
    before = {module: device for module in model.diffusion_model.modules() if (device := _own_device(module)) is not None}
    executor = Executor([Replica(program=model.program, plan=replica)], fleet, deal=lambda num_rows: (num_rows,))
    split = SplitUNet(model, replica, before, model.runner, executor)
    try:
        for _, layer in model.program.embedding.named_layers:
            memory_management.module_move(layer, fleet.device(replica.slots[0]))
        for piece, slot in zip(replica.pieces, replica.slots):
            for _, layer in model.program.piece_layers(piece):
                memory_management.module_move(layer, fleet.device(slot))
    except RuntimeError:
        split.undo()
        raise
    model.runner = executor
    return split


def _check_pieces(program: Program, replica: ReplicaPlan) -> None:
    """Raises: ValueError if the plan's pieces are not the network's pieces, each once and in order."""
    parts = [part for piece in replica.pieces if piece.segment < len(program.segments) for part in program.finest_parts(piece)]
    if parts != list(program.finest_pieces()):
        raise ValueError(
            f"A plan of the pieces {', '.join(map(str, replica.pieces))} was given for a UNet of {len(program.segments)} segments. "
            "A plan must name every segment once, in order. Make it from this network's profile."
        )


def _own_device(module: nn.Module) -> torch.device | None:
    """The device of a module's own tensors; None for a module without tensors."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return next((tensor.device for tensor in tensors if tensor is not None), None)
