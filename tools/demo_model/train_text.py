"""Stage 2: pretrains the text encoder to predict a caption's labels, read out by cross-attention the way the UNet will read it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from tools.demo_model.captions import CONTEXT_LENGTH, LABEL_CLASSES, encode_caption, known_rows_mask, label_scene
from tools.demo_model.networks import CONTEXT_CHANNELS, build_text_encoder
from tools.demo_model.progress import StageClock, cosine_rate, iterate_steps, save_atomically
from tools.demo_model.scenes import describe_scene, sample_scene

SHORT_LENGTH = 40  # captions fit; the last fifth of the stage uses full-length padding


class LabelReader(nn.Module):
    """One query per label attends to the tokens; discarded after this stage."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(LABEL_CLASSES), CONTEXT_CHANNELS) * 0.1)
        self.attention = nn.MultiheadAttention(CONTEXT_CHANNELS, 4, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(CONTEXT_CHANNELS, count) for count in LABEL_CLASSES])

    def forward(self, tokens_BLC: torch.Tensor) -> list[torch.Tensor]:
        queries = self.queries.expand(tokens_BLC.shape[0], -1, -1)
        read_BQC, _ = self.attention(queries, tokens_BLC, tokens_BLC, need_weights=False)
        return [head(read_BQC[:, index]) for index, head in enumerate(self.heads)]


def prepare_text_encoder() -> nn.Module:
    """A new encoder whose rows for unknown tokens are zero and stay zero."""
    encoder = build_text_encoder()
    mask = known_rows_mask()
    embedding = encoder.embeddings.token_embedding.weight
    with torch.no_grad():
        embedding.normal_(std=0.1).mul_(mask)
        encoder.embeddings.position_embedding.weight.normal_(std=0.02)
    embedding.register_hook(lambda gradient: gradient * mask)
    return encoder


def train_text(work_dir: Path, *, num_steps: int, limit_s: float | None = None, batch: int = 64, rate: float = 1e-3) -> None:
    torch.manual_seed(2)
    path = work_dir / "text.pt"
    encoder, reader = prepare_text_encoder(), LabelReader()
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    clock = StageClock(limit_s=limit_s)
    if path.exists():
        state = torch.load(path, weights_only=True)
        encoder.load_state_dict(state["model"])
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
        clock = StageClock(state["step"], state["spent_s"], limit_s)

    def save(clock: StageClock) -> None:
        state = {"model": encoder.state_dict(), "reader": reader.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically(state | {"step": clock.step, "spent_s": clock.spent_s}, path)

    rng = random.Random(2000 + clock.step)
    shown = 0.0
    for fraction, bar in iterate_steps("text", clock, num_steps, save):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(rate, fraction)
        tokens, labels = [], []
        length = SHORT_LENGTH if fraction < 0.8 else CONTEXT_LENGTH
        for _ in range(batch):
            scene = sample_scene(rng)
            caption = describe_scene(scene, rng)
            tokens.append(encode_caption(caption, rng, length=length))
            labels.append(label_scene(scene, caption))
        labels_BQ = torch.tensor(labels)
        logits = reader(encoder(torch.tensor(tokens)).last_hidden_state)
        loss = sum(functional.cross_entropy(logit, labels_BQ[:, index]) for index, logit in enumerate(logits)) / len(logits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = sum((logit.argmax(1) == labels_BQ[:, index]).float().mean().item() for index, logit in enumerate(logits)) / len(logits)
        shown = right if not shown else 0.98 * shown + 0.02 * right
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{shown:.3f}", refresh=False)
