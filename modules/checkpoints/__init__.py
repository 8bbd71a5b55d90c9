"""Model files on disk, and the current model. backend/loader.py reads the tensors.

Reading order: `listing` (which checkpoints there are, and what a name means), `hashes` and `cache` (facts about files, cached by path, size
and time), `vae_files` (VAE and text encoder files), `models` (loads and switches models; keeps the old one usable if that fails),
`families` (facts about a file for the page, before it is loaded), `import_lock`.

Example: `sd_model_checkpoint` "shapes" -> `listing` finds models/Stable-diffusion/shapes.safetensors -> `ModelHost.ensure_loaded` loads it
with `backend.loader.load_checkpoint` and releases the previous one.
"""
