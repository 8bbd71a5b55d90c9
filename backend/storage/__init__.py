"""How weights lie in memory: one small protocol that loader, LoRA, replicas, planner and saver ask, so that none asks for `weight.dtype`.

Reading order: `base` (the protocol), `plain` and `fp8` (the kinds), `kinds` (`storage_of`: which kind a tensor is), `running` (layers whose weights
are dequantized for the time they run). Example: `storage_of(layer.weight).stored_bytes` is 1 MiB for a 1024x1024 weight kept in fp8.
"""
