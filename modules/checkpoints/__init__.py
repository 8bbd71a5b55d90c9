"""Model files on disk and the one model in use. Reading tensors is backend/loader.py's work.

Reading order: `listing` (which checkpoints there are, and what a name means), `hashes` and `cache` (what is known of a file, kept by path,
size and time), `vae_files` (VAE and text encoder files), `models` (loading, switching, keeping the old one usable when that fails),
`import_lock`.

Example: `sd_model_checkpoint` "shapes" -> `listing` finds models/Stable-diffusion/shapes.safetensors -> `ModelHost.ensure_loaded` loads it
with `backend.loader.load_checkpoint` and lets the one before go.
"""
