"""What a GPU is: slots, probing, bytes per device, virtual GPUs, telemetry. Knows no models and no plans.

Reading order: `slot` (one place to compute), `inventory` (what torch sees) and `probing` (flags and devices to slots), `device_memory` and
`peak_memory` (bytes), `links`, `link_test` and `link_probe` (copies between cards), `virtual_gpu`, `virtual_tensor` and `virtual_device` (GPUs
without GPUs), `cpu_threads`, `launch_graphs` (launches recorded once), `determinism`, `telemetry`.

Example: `--device-id 0,1` becomes two slots in `probing`; `link_test` finds that the cards' direct copies arrive wrong, and `links` says that the
route between these slots is through main memory.
"""
