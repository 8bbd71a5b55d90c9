"""Settings: what there are, how they are kept, and how a job sees them.

Reading order: `options` (`OptionInfo`, the store `Options`, the frozen view `OptionsSnapshot`), `kinds` (short builders), `table` and
`page_table` (every built-in setting), `inert` (settings that are accepted and do nothing, with the reason). Beside them: `file`,
`folder_policy`.

Example: `"samples_format": choice("png", ...)` in `table` is a row on the Settings tab, a key of /sdapi/v1/options, and
`options.samples_format` in a job, which works with a snapshot: a change while it runs is the next job's.
"""
