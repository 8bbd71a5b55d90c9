"""Formulas against other computations: layers run in sequence, NumPy's products, loops over indices, and properties from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backend.patcher.lora import merge_lora_to_weight, weight_decompose
from backend.patcher.lora_math import (
    DiffPatch,
    GloraPatch,
    Ia3Patch,
    LohaPatch,
    LokrPatch,
    LoraPatch,
    OftPatch,
    SetPatch,
    as_weight_patch,
    decompose_weight,
)
from backend.patcher.weight_patches import WeightPatch, WeightPatchError

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def merged(patch: WeightPatch, weight: Tensor, strength: float = 1.0) -> Tensor:
    assert patch.explain_misfit(weight.shape) is None
    return patch.merge(weight.clone(), strength)


def test_a_linear_lora_equals_two_parallel_linear_layers() -> None:
    weight, up, down, x = rand(6, 5), rand(6, 2), rand(2, 5), rand(3, 5)
    result = F.linear(x, merged(LoraPatch(up=up, down=down, alpha=4.0), weight, 0.5))
    torch.testing.assert_close(result, F.linear(x, weight) + 0.5 * (4.0 / 2) * F.linear(F.linear(x, down), up), **TOLERANCE)
    without_alpha = merged(LoraPatch(up=up, down=down), weight)
    torch.testing.assert_close(F.linear(x, without_alpha), F.linear(x, weight) + F.linear(F.linear(x, down), up), **TOLERANCE)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_lora_is_two_convolutions(padding: int) -> None:
    weight, up, down, x = rand(6, 4, 3, 3), rand(6, 2, 1, 1), rand(2, 4, 3, 3), rand(1, 4, 7, 7)
    result = F.conv2d(x, merged(LoraPatch(up=up, down=down), weight), padding=padding)
    torch.testing.assert_close(result, F.conv2d(x, weight, padding=padding) + F.conv2d(F.conv2d(x, down, padding=padding), up), **TOLERANCE)


def test_a_convolution_lora_with_a_core_is_three_convolutions() -> None:
    weight, up, mid, down, x = rand(6, 4, 3, 3), rand(6, 2, 1, 1), rand(2, 2, 3, 3), rand(2, 4, 1, 1), rand(1, 4, 7, 7)
    result = F.conv2d(x, merged(LoraPatch(up=up, down=down, mid=mid, alpha=1.0), weight), padding=1)
    torch.testing.assert_close(result, F.conv2d(x, weight, padding=1) + 0.5 * F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up), **TOLERANCE)


def test_a_linear_lora_written_as_convolutions_fits_a_linear_layer_and_the_other_way_round() -> None:
    up, down = rand(6, 2), rand(2, 5)
    expected = rand(6, 5) + up @ down
    torch.testing.assert_close(merged(LoraPatch(up=up[:, :, None, None], down=down[:, :, None, None]), rand(6, 5)), expected)
    torch.testing.assert_close(merged(LoraPatch(up=up, down=down), rand(6, 5).reshape(6, 5, 1, 1)), expected[:, :, None, None])


def test_loha_is_the_elementwise_product_of_two_low_rank_matrices() -> None:
    a, b, c, d = rand(6, 2), rand(2, 5), rand(6, 2, seed=1), rand(2, 5, seed=1)
    expected = rand(6, 5).numpy() + 0.3 * (3.0 / 2) * np.multiply(a.numpy() @ b.numpy(), c.numpy() @ d.numpy())
    torch.testing.assert_close(merged(LohaPatch(w1_a=a, w1_b=b, w2_a=c, w2_b=d, alpha=3.0), rand(6, 5), 0.3), torch.from_numpy(expected), **TOLERANCE)


def test_loha_of_a_convolution_with_and_without_cores() -> None:
    weight = rand(6, 4, 3, 3)
    a, b, c, d = rand(6, 2), rand(2, 36), rand(6, 2, seed=1), rand(2, 36, seed=1)
    flat = (a @ b) * (c @ d)
    torch.testing.assert_close(merged(LohaPatch(w1_a=a, w1_b=b, w2_a=c, w2_b=d), weight), weight + flat.reshape(weight.shape), **TOLERANCE)

    t1, t2, a, b, c, d = rand(2, 2, 3, 3), rand(2, 2, 3, 3, seed=1), rand(2, 6), rand(2, 4), rand(2, 6, seed=1), rand(2, 4, seed=1)
    patch = LohaPatch(w1_a=a, w1_b=b, w2_a=c, w2_b=d, t1=t1, t2=t2, alpha=2.0)
    torch.testing.assert_close(merged(patch, weight), weight + tucker(t1, a, b) * tucker(t2, c, d), **TOLERANCE)


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum over i, j of core[i, j, y, x] * left[i, o] * right[j, c], with loops."""
    result = torch.zeros(left.shape[1], right.shape[1], *core.shape[2:])
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            result += left[i][:, None, None, None] * right[j][None, :, None, None] * core[i, j]
    return result


def test_lokr_is_the_kronecker_product() -> None:
    w1, w2 = rand(2, 3), rand(4, 5)
    expected = np.kron(w1.numpy(), w2.numpy())
    zero = torch.zeros(8, 15)
    torch.testing.assert_close(merged(LokrPatch(w1=w1, w2=w2, alpha=7.0), zero).numpy(), expected)  # full factors have no rank, so no scale
    a, b = rand(4, 2), rand(2, 5)
    expected = (6.0 / 2) * np.kron(w1.numpy(), a.numpy() @ b.numpy())
    torch.testing.assert_close(merged(LokrPatch(w1=w1, w2_a=a, w2_b=b, alpha=6.0), zero).numpy(), expected, **TOLERANCE)
    c, d = rand(2, 1), rand(1, 3)
    expected = 6.0 * np.kron(c.numpy() @ d.numpy(), w2.numpy())
    torch.testing.assert_close(merged(LokrPatch(w1_a=c, w1_b=d, w2=w2, alpha=6.0), zero).numpy(), expected, **TOLERANCE)


def test_lokr_of_a_convolution() -> None:
    w1, zero = rand(2, 3), torch.zeros(8, 15, 3, 3)
    w2 = rand(4, 5, 3, 3)
    result = merged(LokrPatch(w1=w1, w2=w2), zero)
    for y in range(3):
        for x in range(3):
            np.testing.assert_allclose(result[:, :, y, x].numpy(), np.kron(w1.numpy(), w2[:, :, y, x].numpy()), rtol=1e-5)
    core, left, right = rand(2, 2, 3, 3), rand(2, 4), rand(2, 5)
    cored = merged(LokrPatch(w1=w1, w2_a=left, w2_b=right, t2=core), zero)
    torch.testing.assert_close(cored, merged(LokrPatch(w1=w1, w2=tucker(core, left, right)), zero), **TOLERANCE)
    flat = rand(4, 2), rand(2, 45)
    torch.testing.assert_close(
        merged(LokrPatch(w1=w1, w2_a=flat[0], w2_b=flat[1]), zero),
        merged(LokrPatch(w1=w1, w2=(flat[0] @ flat[1]).reshape(4, 5, 3, 3)), zero),
        **TOLERANCE,
    )


def test_dora_has_the_trained_lengths_and_the_direction_of_the_sum() -> None:
    weight, up, down = rand(6, 5), rand(6, 2), rand(2, 5)
    total = weight + up @ down
    lengths = rand(6, 1).abs() + 0.1
    result = merged(LoraPatch(up=up, down=down, dora_scale=lengths), weight)
    torch.testing.assert_close(result.norm(dim=1, keepdim=True), lengths)
    torch.testing.assert_close(F.cosine_similarity(result, total, dim=1), torch.ones(6))
    torch.testing.assert_close(merged(LoraPatch(up=up, down=down, dora_scale=lengths.flatten()), weight), result)

    per_input = rand(1, 5).abs() + 0.1
    result = merged(LoraPatch(up=up, down=down, dora_scale=per_input), weight)
    torch.testing.assert_close(result.norm(dim=0, keepdim=True), per_input)
    half = merged(LoraPatch(up=up, down=down, dora_scale=per_input), weight, 0.5)
    torch.testing.assert_close(half, (weight + result) / 2)


def test_a_dora_whose_lengths_are_those_of_the_sum_is_the_lora() -> None:
    weight, difference = rand(6, 6, 3, 3), rand(6, 6, 3, 3, seed=1)
    total = weight + difference
    for kept, shape in ((0, (6, 1, 1, 1)), (1, (1, 6, 1, 1))):
        lengths = total.transpose(0, kept).flatten(1).norm(dim=1).reshape(shape)
        torch.testing.assert_close(decompose_weight(lengths, weight, difference, 1.0), total)
    scaled = weight_decompose(lengths, weight, difference * 2, 0.5, 1.0, torch.float32)
    torch.testing.assert_close(scaled, total)


def test_glora_in_both_orders_of_its_factors() -> None:
    weight, a1, a2, b1, b2 = rand(6, 5), rand(5, 2), rand(2, 5), rand(6, 2), rand(2, 5, seed=1)
    expected = weight + 0.5 * (weight @ a1 @ a2 + b1 @ b2)
    torch.testing.assert_close(merged(GloraPatch(a1=a1, a2=a2, b1=b1, b2=b2, alpha=1.0), weight), expected, **TOLERANCE)
    torch.testing.assert_close(merged(GloraPatch(a1=a2, a2=a1, b1=b2, b2=b1, alpha=1.0), weight), expected, **TOLERANCE)


def test_ia3_scales_outputs_or_inputs() -> None:
    weight, x = rand(6, 5), rand(3, 5)
    outputs, inputs = rand(6), rand(5)
    torch.testing.assert_close(F.linear(x, merged(Ia3Patch(scale=outputs), weight, 0.5)), F.linear(x, weight) * (1 + 0.5 * outputs), **TOLERANCE)
    torch.testing.assert_close(F.linear(x, merged(Ia3Patch(scale=inputs, on_input=True), weight)), F.linear(x * (1 + inputs), weight), **TOLERANCE)


def test_oft_rotates_the_outputs_and_keeps_their_angles() -> None:
    weight, blocks = rand(6, 5), rand(2, 3, 3) * 0.3
    result = merged(OftPatch(blocks=blocks), weight)
    for part in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(result[part].T @ result[part], weight[part].T @ weight[part], **TOLERANCE)  # no rotation changes inner products
    first = torch.linalg.lstsq(weight[:3], result[:3]).solution  # 3 equations of 5 unknowns: any solution shows that rows mix within the block
    torch.testing.assert_close(weight[:3] @ first, result[:3], **TOLERANCE)
    skew = blocks[0] - blocks[0].T
    rotation = np.linalg.solve((np.eye(3) - skew.numpy()).T, (np.eye(3) + skew.numpy()).T).T
    torch.testing.assert_close(result[:3], torch.from_numpy(rotation.T.astype(np.float32)) @ weight[:3], **TOLERANCE)
    torch.testing.assert_close(merged(OftPatch(blocks=torch.zeros(2, 3, 3)), weight), weight)
    rescaled = merged(OftPatch(blocks=blocks, rescale=torch.full((6, 1), 2.0)), weight)
    torch.testing.assert_close(rescaled, 2 * result)


def test_an_oft_constraint_limits_the_norm() -> None:
    blocks = rand(2, 3, 3)
    skew = blocks - blocks.transpose(1, 2)
    limited = skew * (0.01 * 6 / skew.norm())
    torch.testing.assert_close(
        merged(OftPatch(blocks=blocks, constraint=0.01), rand(6, 5)), merged(OftPatch(blocks=limited / 2), rand(6, 5)), **TOLERANCE
    )


def test_differences_and_new_values() -> None:
    weight = rand(6, 5)
    torch.testing.assert_close(merged(DiffPatch(diff=torch.ones(6, 5)), weight, 0.25), weight + 0.25)
    assert torch.equal(merged(SetPatch(value=torch.ones(6, 5)), weight), torch.ones(6, 5))


@pytest.mark.parametrize(
    "patch",
    [
        LoraPatch(up=rand(6, 2), down=rand(2, 4)),
        LoraPatch(up=rand(5, 2), down=rand(2, 6)),
        LoraPatch(up=rand(6, 3), down=rand(2, 5)),
        LohaPatch(w1_a=rand(6, 2), w1_b=rand(2, 4), w2_a=rand(6, 2), w2_b=rand(2, 4)),
        LokrPatch(w1=rand(3, 5), w2=rand(2, 2)),
        LokrPatch(w1=rand(3, 5)),
        GloraPatch(a1=rand(4, 2), a2=rand(2, 4), b1=rand(6, 2), b2=rand(2, 4)),
        DiffPatch(diff=rand(6, 4)),
        SetPatch(value=rand(6, 4)),
        Ia3Patch(scale=rand(5)),
        OftPatch(blocks=rand(2, 2, 2)),
    ],
)
def test_what_was_made_for_another_shape_says_so(patch: WeightPatch) -> None:
    assert patch.explain_misfit(torch.Size([6, 5])) is not None


def test_tuples_of_extensions() -> None:
    weight, up, down = rand(6, 5), rand(6, 2), rand(2, 5)
    entries = [[0.5, ("lora", (up, down, 2.0, None, None)), 1.0, None, None], [1.0, (torch.ones(6, 5),), 2.0, None, None]]
    torch.testing.assert_close(merge_lora_to_weight(entries, weight), (weight + 0.5 * up @ down) * 2 + 1, **TOLERANCE)
    a, b = rand(6, 2), rand(2, 5)
    loha = as_weight_patch(("loha", (a, b, 2.0, a, b, None, None, None)))
    torch.testing.assert_close(merged(loha, weight), weight + (a @ b) ** 2, **TOLERANCE)
    lokr = as_weight_patch(("lokr", (rand(2, 1), rand(3, 5), None, None, None, None, None, None, None)))
    torch.testing.assert_close(merged(lokr, weight).numpy(), weight.numpy() + np.kron(rand(2, 1).numpy(), rand(3, 5).numpy()))
    assert isinstance(as_weight_patch(("glora", (a, a, a, b, 1.0, None))), GloraPatch)
    for wrong in (3, "lora", (), ("nothing", ())):
        with pytest.raises(WeightPatchError):
            as_weight_patch(wrong)


def reference_dora(weight: Tensor, difference: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA, Liu et al. 2024, equation 5, row by row: W' = m (W + BA) / ||W + BA||, m one number for each output."""
    return torch.stack([row * (length / row.pow(2).sum().sqrt()) for row, length in zip(weight + difference, magnitude, strict=True)])


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 1, 1), (1, 6, 1, 1)])
def test_lengths_of_a_convolution_are_read_in_every_way_they_are_written(shape: tuple[int, ...]) -> None:
    weight, up, down, lengths = rand(6, 4, 3, 3), rand(6, 2, 1, 1), rand(2, 4, 3, 3), rand(6).abs() + 0.1
    expected = reference_dora(weight, torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down), lengths)
    torch.testing.assert_close(merged(LoraPatch(up=up, down=down, dora_scale=lengths.reshape(shape)), weight), expected, **TOLERANCE)


@pytest.mark.parametrize("shape", [(), (5,), (1, 5, 1, 1), (5, 1), (2, 3), (0,), (1, 1, 6, 1), (6, 4, 3, 3)])
def test_lengths_that_do_not_fit_are_seen_before_anything_is_merged(shape: tuple[int, ...]) -> None:
    patch = LoraPatch(up=rand(6, 2, 1, 1), down=rand(2, 4, 3, 3), dora_scale=torch.ones(shape))
    assert "DoRA magnitudes" in str(patch.explain_misfit(torch.Size((6, 4, 3, 3))))
    for other in (LohaPatch(w1_a=rand(6, 2), w1_b=rand(2, 36), w2_a=rand(6, 2), w2_b=rand(2, 36), dora_scale=torch.ones(shape)),
                  DiffPatch(diff=rand(6, 4, 3, 3), dora_scale=torch.ones(shape))):  # fmt: skip
        assert other.explain_misfit(torch.Size((6, 4, 3, 3))) is not None


def test_blocks_of_oft_diag_are_the_rotations_themselves() -> None:
    angle = torch.tensor(0.3)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    weight = rand(4, 5)
    result = merged(OftPatch(blocks=torch.stack([turn, torch.eye(2)]), is_rotation=True), weight)
    expected = torch.stack([
        angle.cos() * weight[0] + angle.sin() * weight[1],
        -angle.sin() * weight[0] + angle.cos() * weight[1],
        weight[2],
        weight[3],
    ])  # fmt: skip
    torch.testing.assert_close(result, expected, **TOLERANCE)
