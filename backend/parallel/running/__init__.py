"""Carries out a plan, step by step.

Reading order: `one_slot` (the simplest plan in one file), `sampling_request` (what a run asks for), `session` (the current plan of one run),
`run_planning` and `slot_budgets` (a plan, and another one after a memory shortage), `step_trial` (does dividing pay?), `executor` (rows through
stages), `routing` and `row_batch` (which row goes where, and back in order), `tile_executor` and `tile_controls` (rows that several slots compute
together), `displaced` (which of their passes need not wait), `worker` (a thread per slot), `failures` and `lost_slots` (out of memory, a dead
device), `status` (what the page shows). Helpers: `bound_hooks`, `control_passes`, `residuals`, `run_gate`, `stopwatch`.

Example: with "layers" over slots 0 and 1, row 0 enters stage 0. When it moves to stage 1, row 1 enters stage 0. If slot 1 runs out of memory,
the session plans again with a smaller share of slot 1 and repeats the step from the same latents.
"""
