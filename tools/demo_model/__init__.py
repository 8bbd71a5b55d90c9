"""Trains the included demo checkpoint, its ControlNet and its LoRA on two cores: `python -m tools.demo_model STAGE`.

Reading order: `scenes` and `captions` (the data), `networks`, then the stages `train_vae`, `train_text`, `train_unet` with `progress` and
`preview`, `export`, `evaluate` with `judge` and `product`; the guides: `base_networks`, `guided_data`, `train_controlnet`, `train_lora`,
`evaluate_guides`.

Example: the caption "a red circle on a blue background" and its picture come from one scene. After the last stage, `evaluate` lets the product draw
that caption, and `judge` says which shape and colors the picture has.
"""
