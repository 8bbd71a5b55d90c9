"""The engine: loads models, keeps them on devices, turns prompts into conditions and noise into latents, on one slot or several. It knows no page,
no HTTP and no command line.

Reading order: `args` (the configuration that it is given) and `devices/` (slots); `loader` (from a file to a model), which reads files through
`checkpoint_file`, `checkpoint_layout`, `families/` and `storage/`; `nn/` (networks as segments), `diffusion_engine/` (one loaded model),
`patcher/` (its networks with a job's hooks), `text_processing/` and `sampling/` (a job), `modules/k_model` (one step), `memory_management` and
`memory/` (what is on which device), `parallel/` (several slots), `profiler`.

Files: `tensor_file` is what every kind of file promises; `file_bytes`, `checkpoint_pickle` with `pickle_scan`, `gguf_file` with `gguf_names` and
`gguf_tokenizer`, and `quantized_file` are the kinds; `checkpoint_identity`, `checkpoint_config`, `checkpoint_prediction`, `key_layout`,
`original_config` and `foreign_json` say what is in one; `state_dict` fills a network from it; `tensor_writer`, `unfinished_files`,
`checkpoint_converter`, `checkpoint_output`, `checkpoint_lora` and `checkpoint_merger` write; `model_folders` lists. Control files:
`controlnet_loader`, `control_lora`, `control_dtype`, `ip_adapter`, `flux_ip_adapter`, `redux`, `clip_vision`, `siglip_vision`. Dtypes:
`denoiser_types`. Names that extensions import: `attention`, `operations`, `misc/`, `utils`.

Example: `loader` opens a file; `families` finds that it is SDXL and how its weights are named; `state_dict` builds the UNet and copies its tensors
from the file. A job encodes its prompt (`text_processing`), a sampler (`sampling`) calls `modules.k_model` once a step, and with two slots a
session of `parallel.running` computes that call.
"""
