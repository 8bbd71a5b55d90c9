"""Makes resident what a plan needs, and keeps track of the copies.

Reading order: `fleet` (the slots with their speeds and measured times), `replica_modules` (copies of a network with the same parameter names
and weight patches), `control_networks` (the ControlNets of a plan), `placement` (makes all of them resident).

Example: a plan of two replicas. The network stays on slot 0, `placement` makes a copy with the same LoRA patches on slot 1, and the next job
uses that copy again.
"""
