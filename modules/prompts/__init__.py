"""Processes prompt text before anything is computed.

Reading order: `styles` (saved prompt fragments, inserted by name), `extra_networks` (removes `<lora:name:0.8>` and passes it to its kind),
`schedules` (`[cat:dog:0.5]`, `a AND b`: which text applies at which step). The rest: `styles_file`.

Example: with 20 steps, "a [cat:dog:0.5] <lora:ink:0.8>" yields the text "a cat" until step 10, then "a dog", and one `ink` for the kind
`lora`.
"""
