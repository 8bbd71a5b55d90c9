"""One picture on several slots. Planning knows numbers only, running knows tensors, and neither knows what network it is.

Reading order: `planning/` (costs of pieces, slots as they are now -> a frozen `Plan` with its reason), `placing/` (what the plan needs made
resident), `running/` (a session per sampling run: its executor sends rows through stages), `exchange/` (copies between slots), `vae/`
(decoding on all slots), `simulate.py` (plans for cards that are not here).

Example: two slots with room for a copy each and 2 images with CFG = 4 rows. `planning.planner.make_plan` finds "replicas": 2 rows each.
`placing` puts a copy on slot 1. In every step `running.executor` runs rows 0-1 on slot 0 and rows 2-3 on slot 1 side by side and joins the
outputs in order.
"""
