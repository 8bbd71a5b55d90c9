"""Networks as lists of segments, so that any run of layers can be placed, timed, cut or replaced. Knows no files, no plans and no jobs.

Reading order: `network_call` (a call's inputs and rows), `program` and `piece` (a network as segments, and runs of them), then the UNet:
`unet_program`, `unet_state`, `unet_layers`, `unet` (Forge's names of its parts), `recorded_stages`. Transformers: `block_segment`,
`stream_layers`, `flux_layers`, `padded_text`, `references`, `second_text`, `flux2`, `anima`; the programs themselves are with their families.
Tiles: `tiles`, `tile_layers`, `unet_tiles`, `stream_tiles`. Text encoders: `t5`, `qwen3`, `gemma2`, `qwen25_vl` with `qwen_vision`. VAEs:
`picture_vae`, `flux2_vae`. Control networks: `controlnet`, `controlnet_union`, `flux_controlnet`, `transformer_controlnet`, `t2i_adapter`,
`deferred_control`. For all networks: `owner`, `empty_network`, `layer_names`, `nan_search`. Forge's names of other networks: `flux`, `chroma`,
`mmditx`, `zimage`.

Example: the UNet's program lists "input 4" as a segment that reads the hidden state and the text and pushes a skip. On two slots the first runs
the segments up to it, and what the next one declares to read is what crosses to the second slot.
"""
