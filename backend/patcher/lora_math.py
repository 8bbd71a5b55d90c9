"""Formulas of weight patches: low-rank sums and products, full differences, replaced, rescaled and rotated weights. Knows no files and no names.

Sources: LoRA, Hu et al. 2021, section 4.1; its convolutions, LoHa and LoKr, Yeh et al. 2023 ("Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation", section 3 and appendix); DoRA, Liu et al. 2024, equation 5; (IA)3, Liu et al. 2022, section 3.3; OFT, Qiu et al.
2023, section 3.

Shapes: O output and I input channels of a weight (O, I) or (O, I, kernel), R rank of the decomposition. All tensors in a formula are fp32 on the
weight's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from backend.patcher.side_branch import LowRank
from backend.patcher.weight_patches import WeightPatch, WeightPatchError

_Patch = TypeVar("_Patch", bound="TensorPatch")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorPatch(WeightPatch):
    """A patch whose fields are tensors and numbers."""

    def on(self: _Patch, device: torch.device) -> _Patch:
        return self._converted(lambda tensor: tensor.to(device))

    def _read(self: _Patch, weight: Tensor) -> _Patch:
        """The patch in fp32 on the weight's device."""
        return self._converted(lambda tensor: tensor.to(weight.device, torch.float32))

    def _converted(self: _Patch, convert: Callable[[Tensor], Tensor]) -> _Patch:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: convert(value) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AddedPatch(TensorPatch):
    """Adds a difference to the weight. With `dora_scale` the sum keeps its direction and gets the trained magnitude."""

    dora_scale: Tensor | None = None

    def explain_misfit(self, shape: torch.Size) -> str | None:
        return self.explain_difference(shape) or explain_lengths(self.dora_scale, shape)

    def explain_difference(self, shape: torch.Size) -> str | None:
        """Why the difference does not fit a weight of this shape; None if it fits."""
        return None

    def difference(self, shape: torch.Size) -> Tensor:
        """What is added at strength 1, fp32 of `shape`. Call it on a patch from `_read`."""
        raise NotImplementedError

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        patch = self._read(weight)
        difference = patch.difference(weight.shape)
        if patch.dora_scale is None:
            return weight.add_(difference, alpha=strength)
        return decompose_weight(patch.dora_scale, weight, difference, strength)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraPatch(AddedPatch):
    """up (O, R, ...) @ down (R, I, ...) * alpha / R, with `mid` (R, R, kernel) between them if given. Without alpha the product is not scaled."""

    up: Tensor
    down: Tensor
    alpha: float | None = None
    mid: Tensor | None = None

    @property
    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        if self.mid is not None or self.dora_scale is not None or not weight.is_contiguous():
            return AddedPatch.merge(self, weight, strength)
        patch = self._read(weight)  # the common case, in one pass over the weight
        weight.view(weight.shape[0], -1).addmm_(patch.up.flatten(1), patch.down.flatten(1), alpha=self._scale * strength)
        return weight

    def low_rank(self) -> LowRank | None:
        return None if self.mid is not None or self.dora_scale is not None else LowRank(self.up, self.down, self._scale)

    def difference(self, shape: torch.Size) -> Tensor:
        if self.mid is not None:
            product = torch.einsum("or,rs...,si->oi...", self.up.flatten(1), self.mid, self.down.flatten(1))
        else:
            product = self.up.flatten(1) @ self.down.flatten(1)
        return product.reshape(shape).mul_(self._scale)

    def explain_difference(self, shape: torch.Size) -> str | None:
        kernel = math.prod(self.mid.shape[2:]) if self.mid is not None else 1
        fits = self.up.shape[0] == shape[0] and self.up.shape[0] * math.prod(self.down.shape[1:]) * kernel == shape.numel()
        ranks = (self.down.shape[0], self.down.shape[0]) if self.mid is None else (*self.mid.shape[:2],)
        fits = fits and (math.prod(self.up.shape[1:]), self.down.shape[0]) == ranks
        return None if fits else f"the LoRA was made for {(self.up.shape[0], *self.down.shape[1:])}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LohaPatch(AddedPatch):
    """(w1_a @ w1_b) * (w2_a @ w2_b) elementwise, * alpha / R. With `t1`, `t2` (R, R, kernel) each factor is built around its core."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None
    t1: Tensor | None = None
    t2: Tensor | None = None

    def difference(self, shape: torch.Size) -> Tensor:
        scale = 1.0 if self.alpha is None else self.alpha / self.w1_b.shape[0]
        product = _expand(self.w1_a, self.w1_b, self.t1) * _expand(self.w2_a, self.w2_b, self.t2)
        return product.reshape(shape).mul_(scale)

    def explain_difference(self, shape: torch.Size) -> str | None:
        rows, columns = (self.w1_a.shape[1], self.w1_b.shape[1]) if self.t1 is not None else (self.w1_a.shape[0], self.w1_b.shape[1])
        kernel = math.prod(self.t1.shape[2:]) if self.t1 is not None else 1
        return None if rows == shape[0] and rows * columns * kernel == shape.numel() else f"the LoHa was made for {(rows, columns * kernel)}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LokrPatch(AddedPatch):
    """The Kronecker product of two matrices, each whole (`w1`, `w2`) or a product; * alpha / R if one of them is a product."""

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None

    def difference(self, shape: torch.Size) -> Tensor:
        first, second = self._factors()
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        return torch.kron(first, second.contiguous()).reshape(shape).mul_(self._scale())

    def _factors(self) -> tuple[Tensor, Tensor]:
        return _whole_or_product(self.w1, self.w1_a, self.w1_b, None), _whole_or_product(self.w2, self.w2_a, self.w2_b, self.t2)

    def _scale(self) -> float:
        ranked = self.w1_b if self.w1_b is not None else self.w2_b
        return 1.0 if self.alpha is None or ranked is None else self.alpha / ranked.shape[0]

    def explain_difference(self, shape: torch.Size) -> str | None:
        one = _shape_of_factor(self.w1, self.w1_a, self.w1_b, None)
        two = _shape_of_factor(self.w2, self.w2_a, self.w2_b, self.t2)
        if one is None or two is None:
            return "the LoKr lacks a factor"
        made_for = (one[0] * two[0], one[1] * two[1])
        return None if made_for[0] == shape[0] and math.prod(made_for) == shape.numel() else f"the LoKr was made for {made_for}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GloraPatch(TensorPatch):
    """W @ A + B, with A on the inputs and B like the weight, both low-rank, * alpha / R. Accepts either order of the factors."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float | None = None

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        patch = self._read(weight)
        (left_a, right_a), (left_b, right_b) = patch._ordered(weight.shape)
        turned = torch.einsum("oi...,ir,rj->oj...", weight, left_a, right_a)
        scale = 1.0 if self.alpha is None else self.alpha / right_b.shape[0]
        return weight + (turned + (left_b @ right_b).reshape(weight.shape)) * (scale * strength)

    def _ordered(self, shape: torch.Size) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        a1, a2, b1, b2 = (one.flatten(1) for one in (self.a1, self.a2, self.b1, self.b2))
        return ((a1, a2), (b1, b2)) if a1.shape[0] == shape[1] and b1.shape[0] == shape[0] else ((a2, a1), (b2, b1))

    def explain_misfit(self, shape: torch.Size) -> str | None:
        (left_a, right_a), (left_b, right_b) = self._ordered(shape)
        fits = left_a.shape[0] == right_a.shape[1] == shape[1] and left_b.shape[0] * right_b.shape[1] == shape.numel() and left_b.shape[0] == shape[0]
        return None if fits else f"the GLoRA was made for {(left_b.shape[0], right_b.shape[1])}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DiffPatch(AddedPatch):
    """The difference itself, in the weight's shape."""

    diff: Tensor

    def difference(self, shape: torch.Size) -> Tensor:
        return self.diff.reshape(shape)

    def explain_difference(self, shape: torch.Size) -> str | None:
        return None if self.diff.numel() == shape.numel() else f"the difference is {tuple(self.diff.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SetPatch(TensorPatch):
    """New values for the weight, interpolated by the strength."""

    value: Tensor

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        return torch.lerp(weight, self._read(weight).value.reshape(weight.shape), strength)

    def explain_misfit(self, shape: torch.Size) -> str | None:
        return None if self.value.numel() == shape.numel() else f"the new weight is {tuple(self.value.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ia3Patch(TensorPatch):
    """Multiplies each output's (or input's) weights by 1 + its trained number."""

    scale: Tensor
    on_input: bool = False

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        factors = self._read(weight).scale.flatten()
        side = (1, -1) if self.on_input else (-1, 1)
        return weight + weight * factors.reshape(*side, *[1] * (weight.ndim - 2)) * strength

    def explain_misfit(self, shape: torch.Size) -> str | None:
        side = shape[1 if self.on_input else 0]
        return None if self.scale.numel() == side else f"the (IA)3 has {self.scale.numel()} numbers"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OftPatch(TensorPatch):
    """Rotates the outputs in groups: `blocks` (groups, size, size) are made skew-symmetric and turned into rotations by Cayley's transform.

    `constraint` (from alpha) limits the blocks' joint norm to `constraint * O`; `rescale` then multiplies the outputs. With `is_rotation` the
    blocks are the rotations themselves, as early LyCORIS versions wrote them as `oft_diag`.
    """

    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None
    is_rotation: bool = False

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        patch = self._read(weight)
        rotations = patch._rotations(weight.shape[0])
        groups = weight.reshape(*rotations.shape[:2], -1)
        turned = torch.einsum("gnm,gn...->gm...", rotations, groups).reshape(weight.shape)
        if patch.rescale is not None:
            turned = turned * patch.rescale.reshape(-1, *[1] * (weight.ndim - 1))
        return torch.lerp(weight, turned, strength)

    def _rotations(self, num_outputs: int) -> Tensor:
        if self.is_rotation:
            return self.blocks
        skew = self.blocks - self.blocks.transpose(1, 2)
        if self.constraint > 0:
            norm = torch.linalg.vector_norm(skew) + 1e-8
            skew = skew * (norm.clamp(max=self.constraint * num_outputs) / norm)
        identity = torch.eye(skew.shape[-1], device=skew.device)
        inverse: Tensor = torch.linalg.inv(identity - skew)
        return (identity + skew) @ inverse

    def explain_misfit(self, shape: torch.Size) -> str | None:
        fits = self.blocks.ndim == 3 and self.blocks.shape[1] == self.blocks.shape[2] and self.blocks.shape[0] * self.blocks.shape[1] == shape[0]
        if not fits:
            return f"the OFT blocks are {tuple(self.blocks.shape)}"
        return None if self.rescale is None or self.rescale.numel() == shape[0] else f"the OFT's rescale has {self.rescale.numel()} numbers"


def decompose_weight(dora_scale: Tensor, weight: Tensor, difference: Tensor, strength: float) -> Tensor:
    """DoRA: the sum of weight and difference, normalized to the magnitudes `dora_scale`, interpolated by the strength.

    Magnitudes of shape (O,) or (O, 1, ...) are for outputs, those of shape (1, I, ...) for inputs. Raises: WeightPatchError for other shapes.
    """
    total = weight + difference
    kept = axis_of_lengths(dora_scale, weight.shape)
    if kept is None:
        raise WeightPatchError(f"DoRA magnitudes of shape {tuple(dora_scale.shape)} do not fit a weight of shape {tuple(weight.shape)}.")
    lengths = torch.linalg.vector_norm(total, dim=[axis for axis in range(weight.ndim) if axis != kept], keepdim=True)
    scaled = total * (dora_scale.reshape(lengths.shape) / lengths.clamp_min(torch.finfo(torch.float32).eps))
    return scaled if strength == 1.0 else torch.lerp(weight, scaled, strength)


def axis_of_lengths(dora_scale: Tensor, shape: torch.Size) -> int | None:
    """Which dim of a weight the magnitudes belong to: 0 (outputs), 1 (inputs), or None if they fit neither.

    (1, N, 1, 1) with N = O but not I is PEFT's format for the outputs of a convolution; with N = I it is kohya's format for inputs.
    """
    count = dora_scale.numel()
    if dora_scale.ndim == 0 or len(shape) < 2 or count != max(dora_scale.shape):
        return None
    if dora_scale.ndim > 1 and dora_scale.shape[0] != count and dora_scale.shape[1] != count:
        return None
    on_inputs = dora_scale.ndim > 1 and dora_scale.shape[0] != count
    if on_inputs and count == shape[1]:
        return 1
    return 0 if count == shape[0] else None


def explain_lengths(dora_scale: Tensor | None, shape: torch.Size) -> str | None:
    """Why DoRA magnitudes do not fit a weight of this shape; None if they fit."""
    fits = dora_scale is None or axis_of_lengths(dora_scale, shape) is not None
    return None if fits or dora_scale is None else f"the DoRA magnitudes are {tuple(dora_scale.shape)}"


def _expand(left: Tensor, right: Tensor, core: Tensor | None) -> Tensor:
    """left (O, R) @ right (R, I). With a core (R, R, kernel), left is (R, O) and right (R, I)."""
    return left @ right if core is None else torch.einsum("rs...,ro,si->oi...", core, left, right)


def _whole_or_product(whole: Tensor | None, left: Tensor | None, right: Tensor | None, core: Tensor | None) -> Tensor:
    if whole is not None:
        return whole
    assert left is not None and right is not None  # explain_misfit has checked
    return _expand(left, right, core)


def _shape_of_factor(whole: Tensor | None, left: Tensor | None, right: Tensor | None, core: Tensor | None) -> tuple[int, int] | None:
    """(outputs, inputs times kernel)."""
    if whole is not None:
        return whole.shape[0], math.prod(whole.shape[1:])
    if left is None or right is None:
        return None
    return (left.shape[1], right.shape[1] * math.prod(core.shape[2:])) if core is not None else (left.shape[0], right.shape[1])


# patches from extensions


ExtraWeightCalculator = Callable[[Tensor, float, Any], Tensor]
extra_weight_calculators: dict[str, ExtraWeightCalculator] = {}
"""Kinds of patches added by extensions: (fp32 weight, strength, values) -> changed weight."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExtraPatch(WeightPatch):
    """A patch of a kind that an extension added."""

    kind: str
    values: Any

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        return extra_weight_calculators[self.kind](weight, strength, self.values)


def as_weight_patch(value: object) -> WeightPatch:
    """A patch from the tuples of Forge's extensions: ("lora", (up, down, alpha, mid, dora_scale)), ("diff", (tensor,)), (tensor,) and so on.

    Raises: WeightPatchError for an unknown kind.
    """
    if isinstance(value, WeightPatch):
        return value
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise WeightPatchError(f"A weight patch is a {type(value).__name__}; it must be a WeightPatch or a tuple (kind, values).")
    if isinstance(value[0], Tensor):
        return DiffPatch(diff=value[0])
    kind, values = value[0], value[1] if len(value) > 1 else ()
    if kind in extra_weight_calculators:
        return ExtraPatch(kind=kind, values=values)
    build = _FORGE_KINDS.get(kind)
    if build is None:
        known = ", ".join([*_FORGE_KINDS, *extra_weight_calculators])
        raise WeightPatchError(f"Weight patch kind {kind!r} is unknown. Use one of {known}, or register it in extra_weight_calculators.")
    return build(values)


def _from_lora(values: Sequence[Any]) -> WeightPatch:
    up, down, alpha, mid, dora_scale = (*values, None, None, None)[:5]
    return LoraPatch(up=up, down=down, alpha=_number(alpha), mid=mid, dora_scale=dora_scale)


def _from_loha(values: Sequence[Any]) -> WeightPatch:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, dora_scale = (*values, None, None, None)[:8]
    return LohaPatch(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=_number(alpha), t1=t1, t2=t2, dora_scale=dora_scale)


def _from_lokr(values: Sequence[Any]) -> WeightPatch:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, dora_scale = (*values, *[None] * 7)[:9]
    return LokrPatch(w1=w1, w2=w2, alpha=_number(alpha), w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, t2=t2, dora_scale=dora_scale)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


_FORGE_KINDS: dict[str, Callable[[Sequence[Any]], WeightPatch]] = {
    "diff": lambda values: DiffPatch(diff=values[0]),
    "set": lambda values: SetPatch(value=values[0]),
    "lora": _from_lora,
    "loha": _from_loha,
    "lokr": _from_lokr,
    "glora": lambda values: GloraPatch(a1=values[0], a2=values[1], b1=values[2], b2=values[3], alpha=_number(values[4])),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowsPatch(WeightPatch):
    """Applies a patch for a larger matrix, of which the weight is the rows (first, end, total, swapped); if swapped, with its second half first.

    The other rows are zeros while the patch is applied, so this works for every patch whose rows do not depend on each other.
    """

    patch: WeightPatch
    rows: tuple[int, int, int, bool]

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        first, end, total, swapped = self.rows
        whole = weight.new_zeros(total, *weight.shape[1:])
        whole[first:end] = _swap_halves(weight) if swapped else weight
        merged = self.patch.merge(whole, strength)[first:end]
        return _swap_halves(merged) if swapped else merged

    def explain_misfit(self, shape: torch.Size) -> str | None:
        first, end, total, _ = self.rows
        if shape[0] != end - first:
            return f"the change has {end - first} rows for it"
        if end - first < total and (reason := _explain_joint_rows(self.patch, self.rows, shape)) is not None:
            return reason
        return self.patch.explain_misfit(torch.Size((total, *shape[1:])))

    def on(self, device: torch.device) -> RowsPatch:
        return replace(self, patch=self.patch.on(device))


def _explain_joint_rows(patch: WeightPatch, rows: tuple[int, int, int, bool], shape: torch.Size) -> str | None:
    """Why some rows alone cannot be changed, if they cannot: the change needs the others, which another weight has."""
    first, end, total, _ = rows
    dora_scale = getattr(patch, "dora_scale", None)
    if dora_scale is not None and axis_of_lengths(dora_scale, torch.Size((total, *shape[1:]))) == 1:
        return "its DoRA has lengths of inputs over all rows of a matrix that this model keeps in parts"
    if (
        isinstance(patch, OftPatch)
        and patch.blocks.ndim == 3
        and patch.blocks.shape[1]
        and (first % patch.blocks.shape[1] or end % patch.blocks.shape[1])
    ):
        return f"its OFT blocks of {patch.blocks.shape[1]} rows cross the parts in which this model keeps the matrix"
    return None


def _swap_halves(weight: Tensor) -> Tensor:
    return torch.cat([*reversed(weight.chunk(2))])


def patch_of_rows(patch: WeightPatch, rows: tuple[int, int, int, bool]) -> WeightPatch:
    """The part of a patch for some rows of its matrix. For products and differences, only those rows are kept."""
    first, end, total, swapped = rows

    def cut(tensor: Tensor) -> Tensor:
        return _swap_halves(tensor[first:end]) if swapped else tensor[first:end].clone()

    if getattr(patch, "dora_scale", None) is None:
        if type(patch) is LoraPatch and patch.mid is None and patch.up.ndim and patch.up.shape[0] == total:
            return replace(patch, up=cut(patch.up))
        if type(patch) is DiffPatch and patch.diff.ndim and patch.diff.shape[0] == total:
            return replace(patch, diff=cut(patch.diff))
    return RowsPatch(patch=patch, rows=rows)
