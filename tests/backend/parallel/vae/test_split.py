"""A decode split over slots equals the full decode: in fp64 up to rounding, in other dtypes as close to the exact result as the full one.

Reference: diffusers' `AutoencoderKL.decode` with the same weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backend.attention import AttentionProcessorForge
from backend.devices import virtual_gpu
from backend.devices.slot import Slot
from backend.devices.virtual_gpu import Faults
from backend.nn.tile_layers import moments_by_group, moments_in_kernel
from backend.parallel.planning.vae_cost import (
    DecoderSize,
    LinkCost,
    arriving_bytes,
    decode_macs,
    divide_rows,
    estimate_split,
    worth_splitting,
)
from backend.parallel.running.worker import SlotLost, SlotWorker
from backend.parallel.vae.split import CannotSplit, DecoderShard, SplitDecoder

CPU = torch.device("cpu")
MIB = 2**20


def make_vae(widths: tuple[int, ...] = (8, 16, 16), dtype: torch.dtype = torch.float64, **settings: Any) -> AutoencoderKL:
    """A narrow decoder with random weights; norms and biases are random too, so that a forgotten one is noticed."""
    settings = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            **settings,
        )
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.3)
    nn.Module.to(vae, dtype)
    return vae.eval().requires_grad_(False)


def make_latents(height: int, width: int, *, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[ThreadPoolExecutor, ...]]:
    """Four workers with one thread each, like slots."""
    pools = tuple(ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) for _ in range(4))
    yield pools
    for pool in pools:
        pool.shutdown()


Workers = tuple[ThreadPoolExecutor, ...]


def make_decoder(vae: AutoencoderKL, workers: Workers, num_slots: int = 2, speeds: tuple[float, ...] = (1.0,) * 4, **options: Any) -> SplitDecoder:
    shards = [DecoderShard(network=vae, device=CPU, run=workers[slot].submit, speed=speeds[slot]) for slot in range(num_slots)]
    return SplitDecoder(shards, **options)


# --- split == whole ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"widths": (32, 64, 64, 64), "layers_per_block": 2, "norm_num_groups": 32},
        {"widths": (16,)},
        {"mid_block_add_attention": False},
        {"use_post_quant_conv": False},
        {"latent_channels": 4, "out_channels": 1},
    ],
    ids=lambda options: ", ".join(options) or "narrow",
)
def test_the_split_equals_the_full_decode_in_fp64(workers: Workers, options: dict[str, Any]) -> None:
    vae, latents_BCHW = make_vae(**options), make_latents(7, 5)
    split_BCHW = make_decoder(vae, workers, 3).decode(latents_BCHW)
    torch.testing.assert_close(split_BCHW, vae.decode(latents_BCHW).sample, rtol=1e-12, atol=1e-12)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 6),
    speeds=st.lists(st.sampled_from((0.01, 0.3, 1.0, 2.5)), min_size=2, max_size=4),
)
@settings(max_examples=25)
def test_any_height_any_slots_any_speeds(workers: Workers, height: int, width: int, speeds: list[float]) -> None:
    latents_BCHW = make_latents(height, width)
    split_BCHW = make_decoder(NARROW, workers, len(speeds), tuple(speeds)).decode(latents_BCHW)
    torch.testing.assert_close(split_BCHW, NARROW.decode(latents_BCHW).sample, rtol=1e-12, atol=1e-12)


NARROW = make_vae()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_split_is_as_exact_as_the_full_decode(workers: Workers, dtype: torch.dtype) -> None:
    """Sums in another order round differently, and layers amplify that, so no two correct decodes agree to the last bit. The exact result is the
    fp64 decode of the same rounded weights; the split's error may be at most 1.5 times that of the full decode, plus one step of the dtype."""
    vae = make_vae((32, 64, 64, 64), dtype, layers_per_block=2, norm_num_groups=32)
    latents_BCHW = make_latents(12, 8, dtype=dtype)
    truth_BCHW = nn.Module.to(copy.deepcopy(vae), torch.float64).decode(latents_BCHW.double()).sample
    whole_BCHW = vae.decode(latents_BCHW).sample
    split_BCHW = make_decoder(vae, workers, 2).decode(latents_BCHW)
    assert split_BCHW.dtype == dtype
    far, near = ((one.double() - truth_BCHW).square().mean().sqrt() for one in (whole_BCHW, split_BCHW))
    assert near <= 1.5 * far + torch.finfo(dtype).eps * truth_BCHW.std()
    if dtype == torch.float32:
        torch.testing.assert_close(split_BCHW, whole_BCHW, rtol=0, atol=5e-5 * float(truth_BCHW.std()))


@pytest.mark.parametrize(("processor", "atol"), [(AttnProcessor, 1e-6), (AttentionProcessorForge, 1e-12)])
def test_other_ways_of_attention(workers: Workers, processor: type, atol: float) -> None:
    """The library's first implementation computes softmax in fp32 for every dtype."""
    vae, latents_BCHW = make_vae(), make_latents(5, 4)
    vae.set_attn_processor(processor())
    torch.testing.assert_close(make_decoder(vae, workers).decode(latents_BCHW), vae.decode(latents_BCHW).sample, rtol=0, atol=atol)


def test_weights_in_channels_last_order(workers: Workers) -> None:
    vae, latents_BCHW = make_vae(dtype=torch.float32), make_latents(6, 5, dtype=torch.float32)
    expected_BCHW = vae.decode(latents_BCHW).sample
    nn.Module.to(vae, memory_format=torch.channels_last)
    torch.testing.assert_close(make_decoder(vae, workers).decode(latents_BCHW), expected_BCHW, rtol=0, atol=1e-4)


def test_a_batch_goes_image_by_image(workers: Workers) -> None:
    decoder, latents_BCHW = make_decoder(NARROW, workers), make_latents(5, 4, batch=3)
    split_BCHW = decoder.decode(latents_BCHW)
    assert split_BCHW.shape == (3, 3, 5 * decoder.scale, 4 * decoder.scale)
    assert torch.equal(split_BCHW[1:2], decoder.decode(latents_BCHW[1:2]))


def test_the_result_can_be_changed_in_place_under_any_mode(workers: Workers) -> None:
    """The caller clamps the picture in place; latents may come from inference mode."""
    with torch.inference_mode():
        latents_BCHW = make_latents(4, 4) + 0
    make_decoder(NARROW, workers).decode(latents_BCHW).add_(1.0).clamp_(0.0, 1.0)
    with torch.inference_mode():
        make_decoder(NARROW, workers).decode(latents_BCHW).add_(1.0).clamp_(0.0, 1.0)


def test_threads_do_not_matter(workers: Workers) -> None:
    """The same bits in every run, from several callers at once, on a network that all strips share and none changes."""
    vae, latents_BCHW = make_vae(dtype=torch.float32), make_latents(9, 4, dtype=torch.float32)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in vae.named_modules()}
    decoders = [make_decoder(vae, workers, 4), make_decoder(vae, tuple(reversed(workers)), 4)]
    first_BCHW = decoders[0].decode(latents_BCHW)
    with ThreadPoolExecutor(4) as callers:
        pictures = list(callers.map(lambda turn: decoders[turn % 2].decode(latents_BCHW), range(12)))
    assert all(torch.equal(picture, first_BCHW) for picture in pictures)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert {name: set(vars(module)) for name, module in vae.named_modules()} == attributes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ways_of_statistics_agree_with_numbers_far_from_zero(dtype: torch.dtype) -> None:
    """A variance from sums of squares would lose all its digits here."""
    x_GKHW = (torch.randn(6, 3, 5, 7, dtype=torch.float64) + 200.0).to(dtype)
    flat = x_GKHW.double().flatten(1)
    expected = torch.stack([flat.mean(1), flat.var(1, correction=0)])
    for moments in (moments_in_kernel(x_GKHW), moments_by_group(x_GKHW)):
        assert moments.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(moments.double(), expected, rtol=1e-5, atol=0)


# --- virtual GPUs -----------------------------------------------------------------------------------------------------------------------------


def make_virtual(workers: Workers, vae: AutoencoderKL, num_slots: int = 2, **options: Any) -> SplitDecoder:
    gpus = virtual_gpu.install((64 * MIB,) * num_slots)
    shards = [DecoderShard(network=copy.deepcopy(vae).to(gpu), device=gpu, run=worker.submit) for gpu, worker in zip(gpus, workers)]
    for gpu in gpus:
        virtual_gpu.get_device(gpu).reset_peak()
    virtual_gpu.reset_copied_bytes()
    return SplitDecoder(shards, **options)


def test_virtual_gpus_never_mix_and_each_needs_less_memory(workers: Workers) -> None:
    vae, latents_BCHW = make_vae((32, 32, 32), torch.float32), make_latents(12, 12, dtype=torch.float32)
    peaks = {}
    for num_slots in (2, 3, 4):
        decoder = make_virtual(workers, vae, num_slots)
        picture_BCHW = decoder.decode(latents_BCHW)
        assert picture_BCHW.device == CPU
        torch.testing.assert_close(picture_BCHW, vae.decode(latents_BCHW).sample, rtol=0, atol=1e-4)
        devices = [virtual_gpu.get_device(index) for index in range(num_slots)]
        peaks[num_slots] = max(device.peak_bytes - device.live_bytes for device in devices)
    (gpu,) = virtual_gpu.install((64 * MIB,))
    whole = copy.deepcopy(vae).to(gpu)
    device = virtual_gpu.get_device(gpu)
    device.reset_peak()
    whole.decode(latents_BCHW.to(gpu))
    peaks[1] = device.peak_bytes - device.live_bytes
    assert peaks[2] < 0.6 * peaks[1]
    assert peaks[4] < peaks[3] < peaks[2]


@pytest.mark.parametrize("num_slots", [2, 3])
def test_the_bytes_that_cross_are_the_predicted_ones(workers: Workers, num_slots: int) -> None:
    vae, latents_BCHW = make_vae((8, 16, 24), torch.float32, layers_per_block=2), make_latents(7, 5, dtype=torch.float32)
    make_virtual(workers, vae, num_slots).decode(latents_BCHW)
    rows = divide_rows(7, (1.0,) * num_slots)
    expected = arriving_bytes(rows, 5, 4, DecoderSize.from_config(vae.config))
    between = {pair: count for pair, count in virtual_gpu.copied_bytes().items() if "cpu" not in pair}
    for slot, count in enumerate(expected):
        assert sum(moved for (_, target), moved in between.items() if target == f"vgpu:{slot}") == count


@pytest.fixture
def slot_workers() -> Iterator[tuple[SlotWorker, ...]]:
    """The engine's workers for two virtual GPUs."""
    gpus = virtual_gpu.install((64 * MIB,) * 2)
    found = tuple(SlotWorker(Slot(index=index, torch_device=gpu, name="virtual", total_bytes=64 * MIB)) for index, gpu in enumerate(gpus))
    yield found
    for worker in found:
        worker.close(wait=True)


def make_with_slot_workers(vae: AutoencoderKL, slot_workers: tuple[SlotWorker, ...]) -> SplitDecoder:
    devices = [worker.slot.torch_device for worker in slot_workers]
    shards = [DecoderShard(network=copy.deepcopy(vae).to(gpu), device=gpu, run=worker.submit) for gpu, worker in zip(devices, slot_workers)]
    return SplitDecoder(shards)


def test_slot_workers_in_inference_mode(slot_workers: tuple[SlotWorker, ...]) -> None:
    """As in the engine: the slots' workers, which adopt the caller's mode."""
    vae, latents_BCHW = make_vae(dtype=torch.float32), make_latents(6, 5, dtype=torch.float32)
    decoder, expected_BCHW = make_with_slot_workers(vae, slot_workers), vae.decode(latents_BCHW).sample
    with torch.inference_mode():
        picture_BCHW = decoder.decode(latents_BCHW + 0).add_(0.0)
    torch.testing.assert_close(picture_BCHW, expected_BCHW, rtol=0, atol=1e-4)


@pytest.mark.parametrize("operation", [1, 30, *range(50, 58), 300])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_slot_is_known_whichever_end_of_a_copy_sees_it_first(slot_workers: tuple[SlotWorker, ...], operation: int, lost: int) -> None:
    decoder = make_with_slot_workers(make_vae(dtype=torch.float32), slot_workers)
    virtual_gpu.get_device(lost).set_faults(Faults(lost_at_operation=operation))
    with pytest.raises(SlotLost, match=f"slot {lost}"):
        decoder.decode(make_latents(6, 5))
    assert slot_workers[1 - lost].lost is None


def test_pictures_go_to_the_requested_device(workers: Workers) -> None:
    vae = make_vae(dtype=torch.float32)
    assert make_virtual(workers, vae, output_device=torch.device("vgpu:1")).decode(make_latents(4, 4)).device == torch.device("vgpu", 1)


# --- one strip fails --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", [1, 40, 200])
def test_out_of_memory_on_one_slot_frees_all_and_a_retry_works(workers: Workers, allocation: int) -> None:
    vae, latents_BCHW = make_vae(dtype=torch.float32), make_latents(6, 5, dtype=torch.float32)
    decoder = make_virtual(workers, vae, 3)
    expected_BCHW = decoder.decode(latents_BCHW)
    devices = [virtual_gpu.get_device(index) for index in range(3)]
    held_bytes = [device.live_bytes for device in devices]
    devices[1].set_faults(Faults(out_of_memory_at=frozenset({allocation})))
    with pytest.raises(torch.OutOfMemoryError, match="vgpu:1"):
        decoder.decode(latents_BCHW)
    assert [device.live_bytes for device in devices] == held_bytes
    devices[1].set_faults(None)
    assert torch.equal(decoder.decode(latents_BCHW), expected_BCHW)


def test_a_lost_slot_is_named_by_its_error(workers: Workers) -> None:
    decoder = make_virtual(workers, make_vae(dtype=torch.float32))
    virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=50))
    with pytest.raises(torch.AcceleratorError, match="vgpu:1"):
        decoder.decode(make_latents(4, 4))


class _Stop(BaseException):
    """A cancel that no `except Exception` catches."""


@pytest.mark.parametrize("turn", [1, 5, 20])
def test_a_cancel_in_one_worker_releases_the_others(workers: Workers, turn: int) -> None:
    turns: list[int] = []
    stopping = threading.local()

    def stop_later() -> None:
        stopping.count = getattr(stopping, "count", 0) + 1
        turns.append(stopping.count)
        if stopping.count == turn:
            raise _Stop

    with pytest.raises(_Stop):
        make_decoder(NARROW, workers, 3, before_exchange=stop_later).decode(make_latents(6, 4))
    assert max(turns) <= turn
    assert torch.isfinite(make_decoder(NARROW, workers, 3).decode(make_latents(6, 4))).all()


def test_strips_on_one_worker_take_turns(workers: Workers) -> None:
    """A strip that waits leaves its worker, so that the other strip can run there."""
    latents_BCHW = make_latents(5, 4)
    shards = [DecoderShard(network=NARROW, device=CPU, run=workers[0].submit) for _ in range(3)]
    torch.testing.assert_close(SplitDecoder(shards).decode(latents_BCHW), NARROW.decode(latents_BCHW).sample, rtol=1e-12, atol=1e-12)


def _refuse(function: Callable[[], Any], /) -> Future[Any]:
    raise RuntimeError("this worker has shut down")


def _cancel(function: Callable[[], Any], /) -> Future[Any]:
    future: Future[Any] = Future()
    future.cancel()
    future.set_running_or_notify_cancel()
    return future


def _lose(function: Callable[[], Any], /) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(OSError("the slot is gone"))
    return future


@pytest.mark.parametrize(("run", "error"), [(_refuse, RuntimeError), (_cancel, CancelledError), (_lose, OSError)])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_strip_that_never_begins_releases_the_others(workers: Workers, run: Any, error: type[BaseException], broken: int) -> None:
    runs = [run if slot == broken else workers[slot].submit for slot in range(2)]
    shards = [DecoderShard(network=NARROW, device=CPU, run=one) for one in runs]
    with pytest.raises(error) as caught:
        SplitDecoder(shards).decode(make_latents(4, 4))
    assert type(caught.value) is error


# --- what cannot be split ---------------------------------------------------------------------------------------------------------------------


def _tile(vae: Any) -> None:
    vae.enable_tiling()


def _wrap_around(vae: Any) -> None:
    vae.decoder.up_blocks[0].resnets[0].conv1.padding_mode = "circular"


def _replace_forward(vae: Any) -> None:
    vae.decoder.conv_in.forward = vae.decoder.conv_in.forward


def _replace_decode(vae: Any) -> None:
    vae.decode = vae.decode


def _hook(vae: Any) -> None:
    vae.decoder.conv_out.register_forward_pre_hook(lambda module, args: None)


def _put_spatial_norm(vae: Any) -> None:
    vae.decoder.conv_norm_out = nn.Identity()


def _put_other_resnet(vae: Any) -> None:
    vae.decoder.mid_block.resnets[1] = nn.Identity()


def _put_other_mid_block(vae: Any) -> None:
    vae.decoder.mid_block = nn.Identity()


def _put_other_activation(vae: Any) -> None:
    vae.decoder.up_blocks[1].resnets[0].nonlinearity = nn.GELU()


def _slice_attention(vae: Any) -> None:
    vae.set_attn_processor(SlicedAttnProcessor(1))


def _mix_types(vae: Any) -> None:
    vae.decoder.conv_out.half()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_tile, "tiles"),
        (_wrap_around, r"up_blocks.0.resnets.0.conv1.*zero padding"),
        (_replace_forward, "decoder.conv_in has had its forward replaced"),
        (_replace_decode, "its decode has been replaced"),
        (_hook, "decoder.conv_out has forward hooks"),
        (_put_spatial_norm, "conv_norm_out"),
        (_put_other_resnet, "mid_block.resnets.1 is a Identity"),
        (_put_other_mid_block, "mid block is a Identity"),
        (_put_other_activation, "GELU"),
        (_slice_attention, "SlicedAttnProcessor"),
        (_mix_types, "float16"),
    ],
)
def test_unknown_parts_are_named(workers: Workers, change: Callable[[Any], None], reason: str) -> None:
    vae = make_vae()
    change(vae)
    with pytest.raises(CannotSplit, match=reason):
        make_decoder(vae, workers)


def test_other_decoders_and_too_few_slots(workers: Workers) -> None:
    tiny: Any = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(CannotSplit, match="DecoderTiny"):
        make_decoder(tiny, workers)
    with pytest.raises(CannotSplit, match="at least two"):
        make_decoder(NARROW, workers, 1)


def test_networks_that_differ_or_lie_elsewhere(workers: Workers) -> None:
    with pytest.raises(CannotSplit, match="differs"):
        SplitDecoder([DecoderShard(network=vae, device=CPU, run=workers[0].submit) for vae in (make_vae(), make_vae((8, 16, 24)))])
    gpus = virtual_gpu.install((MIB, MIB))
    with pytest.raises(CannotSplit, match="is on cpu, the strip on vgpu:0"):
        SplitDecoder([DecoderShard(network=NARROW, device=gpu, run=workers[0].submit) for gpu in gpus])


# --- cost -------------------------------------------------------------------------------------------------------------------------------------


@given(num_rows=st.integers(1, 60), speeds=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4))
def test_no_other_division_of_rows_ends_earlier(num_rows: int, speeds: list[float]) -> None:
    rows = divide_rows(num_rows, speeds)
    assert sum(rows) == num_rows
    ends_at = max(count / speed for count, speed in zip(rows, speeds))
    fitting = sum(int(ends_at * (1 - 1e-9) * speed) for speed in speeds)
    assert fitting < num_rows  # a little earlier, fewer rows would be done


def test_equal_slots_get_equal_rows_and_a_slow_one_none() -> None:
    assert divide_rows(128, (1.0, 1.0)) == (64, 64)
    assert divide_rows(130, (1.0, 0.6, 1.0)) == (50, 30, 50)
    assert divide_rows(4, (1.0, 0.01)) == (4, 0)
    with pytest.raises(ValueError, match="above 0"):
        divide_rows(4, (1.0, 0.0))


def test_multiplications_are_those_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_post_quant_conv=False,
        )
        with FlopCounterMode(display=False) as counter:
            vae.decode(torch.randn(1, 4, 128, 128))
    assert decode_macs(128, 128, DecoderSize.from_config(vae.config)) == counter.get_total_flops() // 2
    assert decode_macs(128, 128) == pytest.approx(5.24e12, rel=2e-3)  # the published figure


@pytest.mark.parametrize("has_attention", [True, False])
def test_exchanges_are_those_that_happen(workers: Workers, has_attention: bool) -> None:
    vae = make_vae(layers_per_block=2, mid_block_add_attention=has_attention)
    calls: list[None] = []
    make_decoder(vae, workers, before_exchange=lambda: calls.append(None)).decode(make_latents(4, 4))
    assert len(calls) == 2 * DecoderSize.from_config(vae.config).num_exchanges
    assert DecoderSize().num_exchanges == 34


def test_large_pictures_are_worth_it_and_small_ones_are_not() -> None:
    assert worth_splitting(128, 128, 2)
    assert not worth_splitting(16, 16, 2)
    assert not worth_splitting(128, 128, 1)
    assert not worth_splitting(1, 4096, 2)
    assert not worth_splitting(128, 128, 2, speeds=(1.0, 0.02))
    assert not worth_splitting(128, 128, 2, link=LinkCost(bytes_per_s=2e8))
    assert worth_splitting(16, 16, 2, whole_s=10.0)


def test_the_estimate_adds_up() -> None:
    estimate = estimate_split(100, 64, (1.0, 0.5), whole_s=9.0, link=LinkCost(exchange_s=0.0, bytes_per_s=float("inf")))
    assert estimate.rows == (67, 33)
    assert estimate.split_s == pytest.approx(9.0 * 0.67)
    waiting = estimate_split(100, 64, (1.0, 0.5), whole_s=9.0, link=LinkCost(exchange_s=0.1, bytes_per_s=float("inf")))
    assert waiting.split_s - estimate.split_s == pytest.approx(3.4)
    assert waiting.speedup == pytest.approx(9.0 / waiting.split_s)
