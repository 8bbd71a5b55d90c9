"""What Forge adds for extensions that change models: preprocessors, control models, patches of the UNet. Stands between `modules/` and `backend/`.

Reading order: `supported_preprocessor` and `builtin_preprocessors` with `image_maps` (pictures to hints), `reference_preprocessor` and
`reference`, `network_preprocessors`, `supported_controlnet` and `supported_ip_adapter` and `supported_flux_pictures` with `picture_towers`
(control models), `shared` (what is registered), `unet_patching`. For extensions: `utils`, `config`, `forge_version`, `forge_canvas/`.

Example: an extension registers a class with `add_supported_preprocessor`; the ControlNet panel lists it, and calls it with the picture and the
threshold sliders.
"""
