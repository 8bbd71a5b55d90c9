"""One denoising step, whatever the network and the number of slots.

Reading order: `k_model` (KModel: from noisy latents and a noise level to the denoised latents), `k_prediction` (what the network's output means).

Example: at noise level 2.5, `k_prediction` scales the latents and gives timestep 625; `k_model` hands the call to its runner if several slots share
it and otherwise runs the network, and turns the predicted noise into the denoised latents.
"""
