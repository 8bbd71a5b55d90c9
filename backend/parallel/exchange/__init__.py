"""Moves tensors between slots, and lets tiles of one row exchange them.

Reading order: `transport` (the route of a copy: same device, peer, through the host), `copies` (copies that run while the slots compute),
`link_speeds` (measured once and cached); `messages` (a tile's message to another), `meeting` (where the messages of one pass meet), `tile_task`
(runs a tile on its worker from one exchange to the next).

Example: without a peer link, a 5 MB state from slot 0 to slot 1 goes to pinned host memory and from there to slot 1, on separate streams.
"""
