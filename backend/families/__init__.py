"""Families of networks: one folder each with everything that is peculiar to it, and nothing else knows it.

Reading order: `latent_format` and `key_map` (what a family is described with), `family` (the frozen `Family`), `registry` (which there are, in the
order in which files are asked), `unet_family` (what the Stable Diffusion families share), then a folder: `sd1` is the shortest.

Adding a family: a folder here whose `__init__` has `FAMILY`, its test, its row in docs/families.md. Example: a file is opened, `identify(file)` asks
each family in turn, `sdxl` finds a UNet with a vector of 2816 numbers, and the loader builds what `FAMILY` of that folder says.
"""
