"""Writes and reads the text in a picture that records how it was made.

Reading order: `text` (writes and splits it), `fields` (which control each key fills), `reading` (parses it into values), `parameters`
(setting overrides), `versions` (texts of older programs), `foreign`, `comfy` and `civitai` (texts of other programs), `paste` (fills controls),
`stealth` (hides it in pixels).

Example: "a cat\nSteps: 20, Sampler: Euler, Seed: 1" -> `reading.parse_generation_parameters` -> {"Prompt": "a cat", "Steps": "20", ...}
-> `fields` maps "Steps" to the slider `steps`. A new setting gets its infotext key in modules/settings/table.py; writing and pasting use it.
"""
