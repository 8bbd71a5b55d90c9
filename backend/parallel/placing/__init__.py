"""Makes resident what a plan needs, and keeps account of the copies.

Reading order: `fleet` (the slots with their speeds and measured times), `replica_modules` (copies of a network with the same names and
changes), `control_networks` (ControlNets that a plan takes along), `placement` (makes all of them resident).

Example: a plan of two replicas: the network stays where it is on slot 0, `placement` makes a copy on slot 1 with the same LoRA patches, and
the next job finds it.
"""
