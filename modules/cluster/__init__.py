"""Many machines: this server is the front with the page and the API, and each worker is our engine on another machine, as a Ray Serve replica.

Reading order: `routing` (which worker gets a job), `backlog` (which waiting job gets a worker), `sharing` (many pictures of one request over
several workers), `values` and `orders` (requests and results as bytes), `store` and `kept` (accepted jobs in SQLite), `versions` (what must agree
when a worker joins), `reports` (what a worker says about itself), `fleet` (workers as the front sees them), `dispatch` (a job's pieces to workers
and back, again if one dies), `handing_over` and `model_files` (an order and its files to a worker), `watch` (progress), `front` (puts it into the
application), `engine` (the worker's side), `files` (model files by hash), `sizing` (how many workers), `ray_serve` (the only file that knows Ray),
`start` (connects a front), `joining`, `commands` and `__main__` (the command that joins a machine).

Example: POST /sdapi/v1/txt2img becomes a job of the front's queue, written down in `store`. `process_images` hands it to `front.ClusterFront`,
which asks `routing.Router` for a worker, sends the request as an `orders.Order`, copies the worker's progress into the job's state, and saves
the pictures that come back.
"""
