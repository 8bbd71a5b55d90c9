"""Moves tensors between slots.

Reading order: `transport` (the way a copy takes: same device, peer, through the host), `copies` (copies that run while the slots compute),
`link_speeds` (measured once and kept).

Example: a state of 5 MB from slot 0 to slot 1 without a peer link goes to pinned host memory and from there to slot 1, on streams of their
own.
"""
