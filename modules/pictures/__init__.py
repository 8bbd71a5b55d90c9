"""Processing of finished pictures: crop, upscale, write, read. Knows no models other than upscalers, and no requests.

Reading order: `images` (the names that extensions import: save_image, resize_image), `writing` (atomic writes), `filename_tokens`
("[seed]-[prompt]"), `metadata` (infotext in PNG, JPEG, WebP ...), `grids`, `resizing`, `masking`, `upscaler`, `upscaler_models` and `upscaler_list`,
`postprocessing` with `postprocessing_operations` and `postprocessing_jobs` (the work of the Extras tab). The rest: `own_files`, `unreadable`,
`unfinished_files`.

Example: `save_image(image, "outputs", seed=1, info=text)` builds the name with `filename_tokens`, adds the text with `metadata`, and
`writing` moves the finished file into place. A new file format needs an entry in `metadata` and in `writing`.
"""
