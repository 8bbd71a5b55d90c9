"""Dequantization of GGUF blocks as one compiled kernel each, an option: the eager reader makes several passes over memory.

The kernel is compiled when a type is first used on a kind of device, which takes seconds; it is the same for all shapes. If it cannot be compiled,
the eager reader is used from then on, and one line in the log says why. A compiled kernel may round a product and a sum together, so its last bit
may differ from the eager reader's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from backend.storage.gguf_blocks import BlockType, dequantize_blocks

logger = logging.getLogger(__name__)

_KINDS_OF_DEVICES = frozenset({"cuda"})


class _Choice:
    """Whether to compile. Set once at startup, and cleared by the first failure."""

    is_on: bool = False


def configure_fusing(is_on: bool) -> None:
    _Choice.is_on = is_on


def dequantize_fused(kind: BlockType, blocks_BN: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`dequantize_blocks`, compiled if that was asked for and can be done on the blocks' device."""
    if not _Choice.is_on or blocks_BN.device.type not in _KINDS_OF_DEVICES:
        return dequantize_blocks(kind, blocks_BN, out_dtype)
    try:
        return _compiled(kind, out_dtype)(blocks_BN)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError) as error:
        _Choice.is_on = False
        logger.warning("--compile-dequantization: GGUF blocks cannot be compiled here (%s); they are dequantized step by step.", str(error)[:300])
        return dequantize_blocks(kind, blocks_BN, out_dtype)


@cache
def _compiled(kind: BlockType, out_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def read(blocks_BN: Tensor) -> Tensor:
        return dequantize_blocks(kind, blocks_BN, out_dtype)

    return torch.compile(read, dynamic=True, fullgraph=True)
