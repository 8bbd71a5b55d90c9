"""Families of networks: one folder each, with everything specific to the family. Nothing else knows it.

Reading order: `latent_format` and `key_map` (parts of a description), `family` (the frozen `Family`), `registry` (the known families, in the order
in which they are tried), `unet_family` with `inpainting` and `sdxl_text` (shared by the Stable Diffusion families), text encoders (`t5_text`,
`qwen_text`, `qwen_vl_text`, `gemma_text`, `file_tokenizers`) and `qwen_vae`, `flow_family` and `one_stream` (shared by transformers),
`file_shapes` and `single_file` (reading and writing files), then a folder: `sd1` is the shortest.

To add a family: a folder here whose `__init__` has `FAMILY`, its test, its row in docs/families.md. Example: a file is opened, `identify(file)`
asks each family in turn, `sdxl` finds a UNet with a vector of 2816 numbers, and the loader builds what that folder's `FAMILY` describes.
"""
