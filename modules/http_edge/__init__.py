"""What stands between the network and every route: names, passwords, sizes and times. It knows paths and headers, never what a route does.

Read in this order: `hosts` (which names and sites are this server's own), `passwords`, `access` (which password each path needs), `bodies` (how large
and how slow a request may be), `edge` (the one ASGI middleware that asks them all), `connections` (time-outs below HTTP).
"""
