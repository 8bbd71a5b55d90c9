"""How weights are stored in memory: one small protocol for loader, LoRA, replicas, planner and saver, none of which looks at `weight.dtype`.

Reading order: `base` (the protocol), `plain` and `fp8` (the kinds), `packed` (bytes with a format: `scaled`, `block_scaled`, `four_bit`, `gguf`
with `gguf_blocks` and `gguf_grids`), `kinds` (`storage_of`: a tensor's kind), `running` (layers whose weights are dequantized while they run),
`choices` (formats by the users' names). Options: `native_fp8` (products in fp8), `fusing` (compiled dequantization). Numbers: `tables`,
`rotation`.

Example: `storage_of(layer.weight).stored_bytes` is 1 MiB for a 1024x1024 weight stored in fp8.
"""
