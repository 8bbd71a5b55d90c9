"""From numbers to a plan: no tensors, no devices.

Reading order: `slot_facts` (a slot: speed, budget, links), `costs` and `profiling` (pieces of a network: bytes, operations), `pipeline`
(how long units take through stages), `partition` (the best cut), `planner` (which kind of plan), `plan` (the frozen result); `live_facts`
asks this process, `preview` answers what if, `simulation`, `timeline` and `validation` answer for cards that are not here. Beside them:
`copy_costs`, `vae_cost`.

Example: 26 segments, two slots of 8 GB, a network of 10 GB: no slot holds a copy, so `planner` asks `partition` for cuts; each is timed by
`pipeline`; the one that fits both budgets and takes least becomes `Plan(strategy="layers", ...)`.
"""
