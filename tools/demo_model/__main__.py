"""`python -m tools.demo_model STAGE`: vae, text, latents, decoder, unet, export, evaluate; then controlnet, lora, evaluate-guides.

Each resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

MODELS = Path("models")
OUT = {
    "controlnet": MODELS / "ControlNet" / "demo-shapes-canny.safetensors",
    "lora": MODELS / "Lora" / "demo-shapes-outline.safetensors",
}
CHECKPOINT = MODELS / "Stable-diffusion" / "demo-shapes-64.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("stage", choices=("vae", "text", "latents", "decoder", "unet", "export", "evaluate", "controlnet", "lora", "evaluate-guides"))
    parser.add_argument("--work-dir", type=Path, default=Path("tmp/demo_model"))
    parser.add_argument("--steps", type=int, help="training steps of the stage")
    parser.add_argument("--minutes", type=float, help="end the stage after this much training time, over all its runs")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=Path, help="the exported file (default: the tracked one)")
    parser.add_argument("--device", default="cpu", help="for controlnet and lora: cpu or cuda")
    parser.add_argument("--scenes", type=int, help="for controlnet and lora: number of scenes to draw")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {"num_steps": args.steps, "limit_s": args.minutes and args.minutes * 60, "batch": args.batch, "rate": args.rate}
    given = {name: value for name, value in given.items() if value is not None}
    out = args.out or OUT.get(args.stage, CHECKPOINT)
    if args.stage in OUT:
        train_guide(args.stage, args.work_dir, out, given | {"device": args.device} | ({"num_scenes": args.scenes} if args.scenes else {}))
    elif args.stage == "evaluate-guides":
        from tools.demo_model.evaluate_guides import evaluate_guides

        report, sheet = evaluate_guides()
        args.work_dir.mkdir(parents=True, exist_ok=True)
        sheet.save(args.work_dir / "guides.png")
        print(report)
    elif args.stage == "vae":
        from tools.demo_model.train_vae import train_vae

        train_vae(args.work_dir, **({"num_steps": 4000} | given))
    elif args.stage == "decoder":
        from tools.demo_model.train_vae import train_vae

        train_vae(args.work_dir, decoder_only=True, **({"num_steps": 6000} | given))
    elif args.stage == "text":
        from tools.demo_model.train_text import train_text

        train_text(args.work_dir, **({"num_steps": 1000} | given))
    elif args.stage == "latents":
        from tools.demo_model.train_unet import encode_dataset

        encode_dataset(args.work_dir)
    elif args.stage == "unet":
        from tools.demo_model.train_unet import train_unet

        train_unet(args.work_dir, **({"num_steps": 9000} | given))
    elif args.stage == "export":
        from tools.demo_model.export import export_checkpoint

        export_checkpoint(args.work_dir, out)
    else:
        from tools.demo_model.evaluate import evaluate_checkpoint

        table, sheet = evaluate_checkpoint(out)
        sheet.save(args.work_dir / "evaluation.png")
        print(table)


def train_guide(stage: str, work_dir: Path, out: Path, given: dict[str, Any]) -> None:
    """Train the ControlNet or the LoRA for the tracked checkpoint."""
    if stage == "controlnet":
        from tools.demo_model.train_controlnet import train_controlnet

        train_controlnet(work_dir, CHECKPOINT, out, **({"num_steps": 6000} | given))
    else:
        from tools.demo_model.train_lora import train_lora

        train_lora(work_dir, CHECKPOINT, out, **({"num_steps": 2500} | given))


if __name__ == "__main__":
    main()
