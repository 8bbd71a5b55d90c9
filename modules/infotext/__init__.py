"""The text in a picture that says how it was made, written and read.

Reading order: `text` (writing and splitting it), `fields` (which control each name belongs to), `reading` (into values), `parameters` (the
settings that it asks for), `versions` (texts of older programs), `foreign` (texts of other programs), `paste` (into controls), `stealth`
(hidden in pixels). Beside them: `comfy`.

Example: "a cat\nSteps: 20, Sampler: Euler, Seed: 1" -> `reading.parse_generation_parameters` -> {"Prompt": "a cat", "Steps": "20", ...}
-> `fields` say that "Steps" is the slider steps. A new setting gets its name in modules/settings/table.py, where text and pasting find it.
"""
