"""A folder of training pictures with their captions, under the names that extensions import. Nothing here trains."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from backend.model_folders import find_files

re_numbers_at_start = re.compile(r"^[-\d]+\s*")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class DatasetEntry:
    """A picture: `pixel_values` (3, H, W), -1..1; `latent_sample` (C, h, w) if the dataset has a model; its words, and the caption made of them."""

    filename: str | None = None
    filename_text: str | None = None
    latent_dist: Any = None
    latent_sample: Any = None
    cond: Any = None
    cond_text: str | None = None
    pixel_values: torch.Tensor | None = None
    weight: torch.Tensor | None = None


class PersonalizedBase(Dataset[list[DatasetEntry]]):
    """`data_root`'s pictures, each `repeats` times an epoch, in batches; each item is a list of entries.

    A picture's words are those of the text file next to it, else those of its name without numbers at its start. `template_file` has lines in which
    `[name]` is the placeholder and `[filewords]` the words; each use draws one. Raises: ValueError for a folder without pictures.
    """

    def __init__(
        self, data_root: str, width: int, height: int, repeats: int, flip_p: float = 0.5, placeholder_token: str = "*", model: Any = None,
        cond_model: Any = None, device: Any = None, template_file: Any = None, include_cond: bool = False, batch_size: int = 1,
        gradient_step: int = 1,
        shuffle_tags: bool = False, tag_drop_out: float = 0, latent_sampling_method: str = "once", varsize: bool = False, use_weight: bool = False,
    ) -> None:  # fmt: skip
        paths = find_files(Path(data_root), SUFFIXES)
        self.placeholder_token, self.shuffle_tags, self.tag_drop_out = placeholder_token, shuffle_tags, tag_drop_out
        self.lines = [line.strip() for line in Path(template_file).read_text(encoding="utf-8").splitlines() if line.strip()] if template_file else []
        self.lines = self.lines or ["[filewords]"]
        self.dataset = [entry for path in paths if (entry := self._read(path, None if varsize else (width, height), flip_p)) is not None]
        if not self.dataset:
            raise ValueError(f"{data_root} has no pictures that can be read ({', '.join(SUFFIXES)}).")
        for entry in self.dataset:
            if model is not None and entry.pixel_values is not None:
                entry.latent_sample = model.get_first_stage_encoding(model.encode_first_stage(entry.pixel_values.unsqueeze(0)))[0]
            if include_cond and not (self.tag_drop_out or self.shuffle_tags):
                entry.cond_text = self.create_text(entry.filename_text or "")
                entry.cond = None if cond_model is None else cond_model([entry.cond_text])
        self.length = len(self.dataset) * max(1, repeats)
        self.batch_size = min(batch_size, self.length)
        self.gradient_step = min(gradient_step, self.length // self.batch_size)

    def _read(self, path: Path, size_px: tuple[int, int] | None, flip_p: float) -> DatasetEntry | None:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            return None
        image = image if size_px is None else image.resize(size_px, Image.Resampling.BICUBIC)
        if random.random() < flip_p:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy()) / 127.5 - 1.0
        return DatasetEntry(filename=str(path), filename_text=_words_of(path), pixel_values=pixels)

    def create_text(self, filename_text: str) -> str:
        """A caption from a drawn line of the template."""
        tags = [tag for tag in filename_text.split(",") if random.random() >= self.tag_drop_out]
        if self.shuffle_tags:
            random.shuffle(tags)
        line = random.choice(self.lines).replace("[name]", self.placeholder_token)
        return line.replace("[filewords]", ",".join(tags).strip())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[DatasetEntry]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        entry = self.dataset[index % len(self.dataset)]
        if entry.cond_text is None:
            entry.cond_text = self.create_text(entry.filename_text or "")
        return [entry]


def _words_of(path: Path) -> str:
    caption = path.with_suffix(".txt")
    if caption.is_file():
        return caption.read_text(encoding="utf-8", errors="replace").strip()
    return re_numbers_at_start.sub("", path.stem)


class BatchLoader:
    """Entries as batches: `latent_sample` or `pixel_values` stacked, `cond_text` and `cond` as lists."""

    def __init__(self, data: Sequence[list[DatasetEntry]]) -> None:
        entries = [entry for item in data for entry in item]
        self.filename = [entry.filename for entry in entries]
        self.cond_text, self.cond = [entry.cond_text for entry in entries], [entry.cond for entry in entries]
        self.latent_sample = torch.stack([entry.latent_sample for entry in entries]) if entries[0].latent_sample is not None else None
        self.pixel_values = torch.stack([entry.pixel_values for entry in entries if entry.pixel_values is not None])

    def pin_memory(self) -> BatchLoader:
        if self.latent_sample is not None:
            self.latent_sample = self.latent_sample.pin_memory()
        return self


def collate_wrapper(batch: Sequence[list[DatasetEntry]]) -> BatchLoader:
    return BatchLoader(batch)


class PersonalizedDataLoader(DataLoader[list[DatasetEntry]]):
    """A shuffled loader of such a dataset, whose items are BatchLoaders."""

    def __init__(self, dataset: PersonalizedBase, latent_sampling_method: str = "once", batch_size: int = 1, pin_memory: bool = False) -> None:
        super().__init__(dataset, shuffle=True, drop_last=True, batch_size=batch_size, pin_memory=pin_memory, collate_fn=collate_wrapper)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # the collated items
        return super().__iter__()
