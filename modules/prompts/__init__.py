"""What is written in a prompt field, before anything is computed.

Reading order: `styles` (saved pieces of prompt, put in by name), `extra_networks` (`<lora:name:0.8>` taken out and handed to its kind),
`schedules` (`[cat:dog:0.5]`, `a AND b`: which text holds at which step). Beside them: `styles_file`.

Example: "a [cat:dog:0.5] <lora:ink:0.8>" with 20 steps gives the text "a cat" until step 10, "a dog" from there, and one `ink` for the kind
`lora`.
"""
