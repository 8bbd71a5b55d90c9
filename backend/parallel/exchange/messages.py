"""Messages between tiles: a few tensors for one peer, packed into one copy if they are small. Knows no network and no thread.

Tensors that stay on their device travel as they are. Small ones for another device (norm sums, boundary rows) are joined byte by byte, widest type
first, so that every part starts at a multiple of its type's size; large ones (keys and values) are worth their own copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.nn.tiles import Tensors
from backend.parallel.exchange.transport import Transfer

MOST_PACKED_BYTES = 2**20
"""Above this, copying the tensors once more costs more than starting another copy."""

Ship = Callable[[Tensor], Transfer]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a packed tensor is: its position in the message, its bytes in the pack, shape and dtype."""

    position: int
    first_byte: int
    end_byte: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedMessage:
    """Tensors in transit to one tile. `places` are None if each tensor travels alone."""

    transfers: tuple[Transfer, ...]
    places: tuple[_Place, ...] | None = None

    def open(self) -> Tensors:
        """The tensors on the receiver's device, for the calling thread's stream. The parts of a pack share its memory."""
        if self.places is None:
            return tuple(transfer.receive() for transfer in self.transfers)
        flat = self.transfers[0].receive()
        parts = {place.position: flat[place.first_byte : place.end_byte].view(place.dtype).view(place.shape) for place in self.places}
        return tuple(parts[position] for position in range(len(parts)))


def send_message(tensors: Sequence[Tensor], ship: Ship, *, stays_here: bool) -> PackedMessage:
    """Start sending. `stays_here`: the receiver is on the same device."""
    if stays_here or len(tensors) < 2 or sum(tensor.nbytes for tensor in tensors) > MOST_PACKED_BYTES:
        return PackedMessage(tuple(ship(tensor) for tensor in tensors))
    places, parts, first = [], [], 0
    for position in sorted(range(len(tensors)), key=lambda position: -tensors[position].element_size()):
        tensor = tensors[position]
        places.append(_Place(position, first, first + tensor.nbytes, tensor.shape, tensor.dtype))
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        first += tensor.nbytes
    return PackedMessage((ship(torch.cat(parts)),), tuple(places))
