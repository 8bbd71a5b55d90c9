"""Rotation of groups of numbers with a regular Hadamard matrix, as int8 "convrot" weights have it.

The matrix of 4 has one -1 per row and column; larger ones are its Kronecker powers, divided by the root of their side. They are symmetric and
orthogonal, so that a second rotation undoes the first. A product of a group of 4^k with the matrix is done as two, with matrices of about its root.
"""

from __future__ import annotations

from functools import partial
from math import isqrt

import torch
from torch import Tensor

from backend.storage.tables import table_on

_LARGEST_GROUP = 4096


def is_group(length: int) -> bool:
    """Whether groups of this length can be rotated: 4, 16, 64, 256, 1024, 4096."""
    return 4 <= length <= _LARGEST_GROUP and length & (length - 1) == 0 and length.bit_length() % 2 == 1


def rotate(value: Tensor, group: int) -> Tensor:
    """`value` (..., C), fp32, with each `group` of numbers multiplied with the matrix."""
    root = isqrt(group)
    outer = root if is_group(root) else root // 2
    grouped = value.reshape(-1, outer, group // outer) @ table_on(_MATRICES[group // outer], value.device)
    if outer > 1:
        grouped = table_on(_MATRICES[outer], value.device) @ grouped
    return (grouped / root).reshape(value.shape)


def _hadamard(side: int) -> Tensor:
    """The matrix of +1 and -1 (side, side)."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    return four if side == 4 else torch.kron(_hadamard(side // 4), four)


_MATRICES = {side: partial(_hadamard, side) for side in (4, 16, 64)}
