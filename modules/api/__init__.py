"""The REST API that clients of A1111 and Forge know. Must not know the page or how a picture is made.

Reading order: `api` (all routes), `routes` (what every route does: password, strict JSON, errors), `models` (bodies), `generation` (txt2img,
img2img) with `settings`, `script_args`, `infotext` and `waiting`; `extras`, `embeddings`, `jobs`, `listings`, `server`, `metrics`, `internal`.
What a client brings: `pictures`, `fetching`, `picture_budget`, `limits`, `pools`; `errors`.

Example: a POST to /sdapi/v1/txt2img is parsed by `routes`, checked by `models` and `limits`, becomes a request in `generation`, waits in the job
queue without a thread (`waiting`), and is answered with base64 pictures and their infotext.
"""
