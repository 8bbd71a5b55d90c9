"""The application: settings, jobs, pictures, page and API around the engine in `backend/`.

Reading order: `app_config` (the flags as a value), `application` (the running application), then a job's way through the rooms: `ui/` or `api/` (a
request), `jobs/` (the queue), `processing/` (a request to pictures) with `prompts/`, `samplers/`, `checkpoints/` and `infotext/`, `pictures/`
(files). Around them: `launch/` (start), `settings/`, `scripts/` (extensions), `http_edge/` (what every request passes).

The other files only have names that extensions import. Example: `modules.sd_models` is `modules.checkpoints.models` under A1111's name.
"""
