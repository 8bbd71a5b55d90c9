"""Stage 4: the three networks as one original-layout SD1.x file, fp16 safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from backend.families.registry import find_family
from tools.demo_model.networks import LATENT_SCALE, SIDE_PX, build_text_encoder, build_unet
from tools.demo_model.train_vae import load_trained, load_vae

MAX_FILE_BYTES = 32 * 2**20
CERTAIN_LOGVAR = -14.0  # the autoencoder was trained without a posterior width; sampling it practically gives its mean
METADATA = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
    "modelspec.title": "Demo shapes 64",
    "modelspec.description": "Colored shapes on plain backgrounds; trained from scratch by this project's tools/demo_model.",
    "modelspec.license": "Apache-2.0",
    "modelspec.resolution": f"{SIDE_PX}x{SIDE_PX}",
    "modelspec.prediction_type": "epsilon",
}


@torch.no_grad()
def fold_whitening(vae: nn.Module, mean: torch.Tensor, matrix: torch.Tensor) -> None:
    """Make the VAE use whitened latents at Stable Diffusion's scale: encode gives matrix (z - mean) / 0.18215, decode takes it."""
    gain = 1 / LATENT_SCALE
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:4, :, 0, 0].clone(), quant.bias[:4].clone()
    quant.weight[:4, :, 0, 0] = gain * matrix @ weight
    quant.bias[:4] = gain * matrix @ (bias - mean)
    quant.weight[4:].zero_()
    quant.bias[4:].fill_(CERTAIN_LOGVAR)
    back = torch.linalg.inv(matrix) / gain
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight[:, :, 0, 0] = post.weight[:, :, 0, 0].clone() @ back


def export_checkpoint(work_dir: Path, out: Path) -> None:
    """Write the checkpoint atomically. Raises: ValueError if it would exceed 32 MiB."""
    data = torch.load(work_dir / "latents.pt", weights_only=True)
    vae = load_vae(work_dir)
    fold_whitening(vae, data["mean"], data["matrix"])
    unet = load_trained(build_unet(), work_dir / "unet.pt", "ema")
    encoder = load_trained(build_text_encoder(), work_dir / "text.pt", "model")
    joined = find_family("sd15").join_checkpoint(unet, vae, [encoder])
    tensors = {name: tensor.half() for name, tensor in joined.items() if tensor.is_floating_point()}
    file_bytes = sum(tensor.numel() * 2 for tensor in tensors.values())
    if file_bytes > MAX_FILE_BYTES:
        raise ValueError(
            f"{out.name}: {file_bytes} bytes of weights, the limit for a tracked checkpoint is {MAX_FILE_BYTES}; make the networks narrower"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=METADATA)
    temporary.chmod(0o644)  # a normal file, readable like the rest of the checkout
    temporary.replace(out)
