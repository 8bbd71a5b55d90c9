"""A loaded network with the hooks, weight changes and control networks of one job, under Forge's names. Copies share the weights.

Reading order: `base` (ModelPatcher), `unet`, `clip` and `vae` with `vae_tiles` (the patchers of a model's three parts); LoRA: `lora_files`,
`lora_keys`, `lora_math`, `weight_patches` (into the weights and back), `side_branch` (next to weights that stay as they are), `lora` (Forge's
names); control: `controlnet`, `controlnet_tasks`, `controlnet_union`, `latent_controlnet` (hints as latents: `flux_controlnet`, `sd3_controlnet`,
`zimage_controlnet`).

Example: a prompt with <lora:outline:0.8> clones the UNet's patcher and adds a patch for each layer that the file names. Before sampling,
`weight_patches` adds 0.8 up @ down to the stored weights on whatever device they are; the next job without the tag gets the stored bytes back.
"""
