"""Settings: definition, storage, and the view a job gets.

Reading order: `options` (`OptionInfo`, the store `Options`, the frozen view `OptionsSnapshot`), `kinds` (short builders), `table`,
`page_table` and `presets` (all built-in settings), `low_bits` (one setting's values), `inert` (accepted settings without effect, with reasons). The
rest: `file`, `folder_policy`.

Example: `"samples_format": choice("png", ...)` in `table` is a row on the Settings tab, a key of /sdapi/v1/options, and
`options.samples_format` in a job. Jobs use a snapshot: a change during a job applies to the next one.
"""
