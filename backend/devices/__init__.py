"""What a GPU is: slots, probing, bytes per device, virtual GPUs, telemetry. Knows no models and no plans."""
