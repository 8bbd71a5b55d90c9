"""Writes and reads the text in a picture that records how it was made.

Reading order: `text` (writing and splitting it), `fields` (which control each name belongs to), `reading` (into values), `parameters` (the
settings that it asks for), `versions` (texts of older programs), `foreign` (texts of other programs), `paste` (into controls), `stealth`
(hidden in pixels). Beside them: `comfy`.

Example: "a cat\nSteps: 20, Sampler: Euler, Seed: 1" -> `reading.parse_generation_parameters` -> {"Prompt": "a cat", "Steps": "20", ...}
-> `fields` maps "Steps" to the slider `steps`. A new setting gets its infotext key in modules/settings/table.py; writing and pasting use it.
"""
