"""One loaded model under the names that extensions know: `sd_model.forge_objects`, `get_learned_conditioning`, `is_sdxl`.

Reading order: `base` (ForgeDiffusionEngine: the networks, their patchers and the family's facts), `faces` (which class a family gets), then Forge's
classes: `sd15`, `sd20`, `sdxl`, `sd35`, `flux`, `chroma`.

Example: `base` builds an engine from what the loader read. Its family is SDXL, so `faces` makes it a `StableDiffusionXL`, and an extension's
`isinstance(shared.sd_model, StableDiffusionXL)` holds.
"""
