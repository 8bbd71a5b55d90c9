"""Computes one picture on several slots. Planning sees only numbers, running sees tensors, and neither knows which network it is.

Reading order: `planning/` (costs of pieces and the slots' current state -> a frozen `Plan` with its reason), `placing/` (makes resident what
the plan needs), `running/` (one session per sampling run; its executor sends rows through stages), `exchange/` (copies between slots), `vae/`
(decoding on all slots), `simulate.py` (plans for cards this machine does not have).

Example: two slots that each have room for a copy, and 2 images with CFG = 4 rows. `planning.planner.make_plan` picks "replicas": 2 rows each.
`placing` puts a copy on slot 1. In every step `running.executor` runs rows 0-1 on slot 0 and rows 2-3 on slot 1 at the same time and joins
the outputs in order.
"""
