"""A plan carried out, step by step.

Reading order: `sampling_request` (what a run asks for), `session` (the plan in force for one run), `run_planning` and `slot_budgets` (a
plan, and another one after a shortage), `step_trial` (is dividing worth it?), `executor` (rows through stages), `routing` and `row_batch`
(which row goes where, and back in order), `worker` (a thread per slot), `failures` and `lost_slots` (out of memory, a device that is gone),
`status` (what the page is told). Beside them: `bound_hooks`, `control_passes`, `residuals`, `run_gate`, `stopwatch`.

Example: with "layers" over slots 0 and 1, row 0 enters stage 0; when it moves to stage 1, row 1 enters stage 0. If slot 1 runs out of
memory the session plans again with less of it and does the step again from the same latents.
"""
