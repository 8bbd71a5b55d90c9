"""User metadata of a LoRA file in addition to description and notes: family, activation text, preferred weight, negative text."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from network import SdVersion

from modules.ui_extra_networks_user_metadata import UserMetadataEditor

MAX_TAGS = 24
VERSIONS = ("SD1", "SD2", "SDXL", "Unknown")


def training_tags(metadata: dict[str, Any]) -> list[str]:
    """The most frequent words in the training captions."""
    counts: dict[str, int] = {}
    folders = metadata.get("ss_tag_frequency")
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, (int, float)):
                counts[str(tag).strip()] = counts.get(str(tag).strip(), 0) + int(count)
    return sorted(counts, key=lambda tag: (-counts[tag], tag))[:MAX_TAGS]


class LoraUserMetadataEditor(UserMetadataEditor):
    """The dialog of a LoRA card."""

    def create_extra_default_items_in_left_column(self) -> None:
        self.sd_version = gr.Dropdown(label="Stable Diffusion version", choices=list(VERSIONS), elem_id=f"{self.id_part}_sd_version")
        self.activation_text = gr.Textbox(label="Activation text", lines=2, elem_id=f"{self.id_part}_activation_text")
        self.training_tags = gr.HTML()
        self.preferred_weight = gr.Slider(
            label="Preferred weight (0: the setting's)", minimum=0.0, maximum=2.0, step=0.01, elem_id=f"{self.id_part}_preferred_weight"
        )
        self.negative_text = gr.Textbox(label="Negative prompt", lines=1, elem_id=f"{self.id_part}_negative_text")
        self.components += [self.sd_version, self.activation_text, self.training_tags, self.preferred_weight, self.negative_text]

    def extra_values(self, metadata: dict[str, Any], item: dict[str, Any]) -> list[Any]:
        version = metadata.get("sd version") or str(item.get("sd_version_str") or "").rpartition(".")[2]
        weight = metadata.get("preferred weight")
        tags = training_tags(item.get("metadata") or {})
        shown = f"<p class='training-tags'>Trained with: {escape(', '.join(tags))}</p>" if tags else ""
        return [
            version if version in SdVersion.__members__ else "Unknown",
            metadata.get("activation text", ""),
            shown,
            weight if isinstance(weight, (int, float)) else 0.0,
            metadata.get("negative text", ""),
        ]

    def saved_components(self) -> list[Any]:
        return [*super().saved_components(), self.sd_version, self.activation_text, self.preferred_weight, self.negative_text]

    def metadata_from(self, description: str, notes: str, *more: Any) -> dict[str, Any]:
        sd_version, activation_text, preferred_weight, negative_text = more
        return {
            **super().metadata_from(description, notes),
            "sd version": sd_version,
            "activation text": activation_text,
            "preferred weight": preferred_weight,
            "negative text": negative_text,
        }
