"""The layer between the network and every route: host names, passwords, sizes and timeouts. Knows paths and headers, never what a route does.

Reading order: `hosts` (which names and sites belong to this server), `passwords`, `access` (which password each path needs), `bodies` (size and
speed limits of requests), `edge` (the one ASGI middleware that applies them all), `connections` (timeouts below HTTP), `server` (the FastAPI app
and its socket). `shown_files` says which files a page may show, `compression` makes
the page smaller on its way.

Example: a request for `/sdapi/v1/txt2img` comes in through `server`. `edge` checks its Host header with `hosts` and its password with `access`, and
limits its body with `bodies`. Then the route runs.
"""
