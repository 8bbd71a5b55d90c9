"""Turns numbers into a plan, without tensors or devices.

Reading order: `slot_facts` (a slot: speed, budget, links), `costs` and `profiling` (pieces of a network: bytes, operations), `pipeline` (how
long rows take through stages), `partition` with `cut_costs` and `cut_search` (the best cut), `planner` (which kind of plan) with `candidate` and
`plan_reasons`, `plan` (the frozen result). `live_facts` reads the numbers from this process, `preview` plans for a checkpoint before it is
loaded, `simulation` and `validation` plan for cards this machine does not have, `timeline` turns a recording into each slot's time.
`copy_costs`, `tile_costs` and `vae_cost` price whole copies, teams of slots that compute rows in tiles, and a split VAE decode.

Example: 26 segments, two 8 GB slots, a 10 GB network. No slot has room for a copy, so `planner` asks `partition` for cuts and `pipeline` times
each one. The fastest cut that fits both budgets becomes `Plan(strategy="layers", ...)`.
"""
