"""The parts behind `backend.memory_management`: pure decisions (states, budgets, eviction, placement) and the store that carries them out.

Reading order: `vram_state`, `budget`, `eviction`, `placement`, `dtype_policy` (pure decisions), `residents` (one model on one device) and
`module_bytes`, `store` (all of them, and the moves) and `current` (the process's store); larger than the device: `streaming`, `fetching`; out of
memory: `shortages`, `recovery`, `errors`; `recent_models` (main memory).

Example: a UNet of 5 GB is to be loaded where 3 GB are free. `eviction` picks the idle VAE and text encoder, the `store` moves both to main memory,
and if 5 GB are still not free, `budget` says how much stays and `streaming` copies the other layers in as they run.
"""
