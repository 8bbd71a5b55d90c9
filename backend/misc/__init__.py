"""Picture and attention helpers that extensions import from here: `image_resize` (resizing of tensors), `tomesd` (token merging)."""
