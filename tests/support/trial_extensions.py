"""Small extensions in the style of public ones, a kind each, for the trial of extensions: what each touches, and what comes of it in a job."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from tests.support import extensions

PICTURE, PARAMETERS, NOTHING = "picture", "parameters", "nothing"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The files of an extension, and what differs from a job without it when all its checkboxes are on."""

    files: dict[str, str]
    acts: str = PICTURE


def always_on(hook: str, body: str, head: str = "", arguments: str = "**kwargs") -> dict[str, str]:
    """A script of the tab with one checkbox, whose `hook` runs `body` when it is on."""
    script = f"""
import gradio as gr
import torch
from modules import script_callbacks, scripts, shared
{textwrap.dedent(head)}

class Trial(scripts.Script):
    def title(self):
        return "Trial"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion("Trial", open=False):
            enabled = gr.Checkbox(False, label="Enabled")
        return [enabled]

    def {hook}(self, p, {"pp, " if hook.startswith(("postprocess_image", "postprocess_batch_list", "post_sample")) else ""}enabled, {arguments}):
        if not enabled:
            return
{textwrap.indent(textwrap.dedent(body).strip(), " " * 8)}
"""
    return {"scripts/trial.py": script}


def patching(body: str, head: str = "") -> dict[str, str]:
    """Patches a clone of the UNet's patcher, `unet`, before each pass."""
    return always_on(
        "process_before_every_sampling",
        "unet = p.sd_model.forge_objects.unet.clone()\n" + textwrap.dedent(body).strip() + "\np.sd_model.forge_objects.unet = unet",
        head,
    )


def inside(body: str, undo: str, head: str = "") -> dict[str, str]:
    """Changes the model's inside, `inner`, and undoes it after the job."""
    start = "inner = p.sd_model.forge_objects.unet.model.diffusion_model\n" + textwrap.dedent(body).strip()
    files = always_on("process_batch", start, head)
    files["scripts/trial.py"] += f"""
    def postprocess(self, p, processed, enabled):
        if not enabled:
            return
        inner = p.sd_model.forge_objects.unet.model.diffusion_model
{textwrap.indent(textwrap.dedent(undo).strip(), " " * 8)}
"""
    return files


def listening(event: str, body: str) -> dict[str, str]:
    """Listens to a callback for the whole session."""
    return {
        "scripts/trial.py": f"from modules import script_callbacks\n\ndef listen(params):\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n"
        f"\nscript_callbacks.{event}(listen)\n"
    }


_ATTENTION = "from backend.attention import attention_function"

KINDS: dict[str, Kind] = {
    # around the model's guidance
    "post-cfg": Kind(files=patching('unet.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.8)')),
    "pre-cfg": Kind(
        files=patching("""
        def halve(model, cond, uncond, x, timestep, options):
            return model, cond, uncond, x * 0.9, timestep, options
        unet.add_sampler_pre_cfg_function(halve)
    """)
    ),
    "cfg-function": Kind(files=patching('unet.set_model_sampler_cfg_function(lambda args: args["uncond"] + (args["cond"] - args["uncond"]) * 2.0)')),
    "cfg-function-of-three": Kind(files=patching("unet.set_model_sampler_cfg_function(lambda cond, uncond, scale: uncond + (cond - uncond) * 3.0)")),
    "unet-wrapper": Kind(
        files=patching("""
        def wrapped(apply_model, args):
            return apply_model(args["input"], args["timestep"], **args["c"]) * 0.9
        unet.set_model_unet_function_wrapper(wrapped)
    """)
    ),
    "conditioning-modifier": Kind(
        files=patching("""
        def modify(model, x, timestep, uncond, cond, scale, options, seed):
            return model, x, timestep, uncond, cond, scale * 2, options, seed
        unet.add_conditioning_modifier(modify)
    """)
    ),
    # inside the network, by the patcher
    "attn1-patch": Kind(files=patching("unet.set_model_attn1_patch(lambda n, context, value, extra: (n, context, value * 0.5))")),
    "attn2-replace": Kind(
        files=patching(
            'unet.set_model_attn2_replace(lambda q, k, v, extra: attention_function(q, k, v * 0.5, extra["n_heads"]), "input", 1)', _ATTENTION
        )
    ),
    "attn1-replace-all": Kind(files=patching("unet.set_model_replace_all(lambda q, k, v, extra: v, 'attn1')")),
    "attn-output": Kind(files=patching("unet.set_model_attn2_output_patch(lambda n, extra: n * 0.5)")),
    "input-block": Kind(files=patching("unet.set_model_input_block_patch(lambda h, options: h * 0.9)")),
    "input-block-after-skip": Kind(files=patching("unet.set_model_input_block_patch_after_skip(lambda h, options: h * 0.9)")),
    "output-block": Kind(files=patching("unet.set_model_output_block_patch(lambda h, hsp, options: (h, hsp * 0.5))")),
    "block-modifier": Kind(files=patching('unet.add_block_modifier(lambda h, when, options: h * (0.95 if when == "after" else 1.0))')),
    "block-inner-modifier": Kind(
        files=patching('unet.add_block_inner_modifier(lambda x, when, layer, index, layers, options: x * (0.98 if when == "before" else 1.0))')
    ),
    "group-norm": Kind(files=patching("unet.set_group_norm_wrapper(lambda norm, h, options: norm(h) * 0.95)")),
    "token-merging": Kind(files=patching("unet = TomePatcher().patch(unet, 0.5)", "from backend.misc.tomesd import TomePatcher")),
    # inside the network, by its parts
    "walks-blocks": Kind(
        files=inside(
            """
            self.found = [part for block in inner.input_blocks for part in block if type(part).__name__ == "SpatialTransformer"]
            for transformer in self.found:
                for block in transformer.transformer_blocks:
                    before = block.attn2.forward
                    block.attn2.forward = lambda x, *args, before=before, **kwargs: before(x, *args, **kwargs) * 0.5
            """,
            "for transformer in self.found:\n    for block in transformer.transformer_blocks:\n        del block.attn2.forward",
        )
    ),
    "patches-a-class": Kind(
        files=inside(
            "self.before = CrossAttention.forward\n"
            "CrossAttention.forward = lambda own, x, *args, before=self.before, **kwargs: before(own, x, *args, **kwargs) * 0.9",
            "CrossAttention.forward = self.before",
            "from backend.nn.unet import CrossAttention",
        )
    ),
    "replaces-a-resblock": Kind(
        files=inside(
            "block = inner.output_blocks[3][0]\nbefore = block.forward\nblock.forward = lambda x, emb, *args: before(x, emb) * 0.7",
            "del inner.output_blocks[3][0].forward",
        )
    ),
    "replaces-a-real-layer": Kind(
        files=inside(
            "layer = inner.mid_block.resnets[0]\nbefore = layer.forward\nlayer.forward = lambda *args, **kwargs: before(*args, **kwargs) * 0.7",
            "del inner.mid_block.resnets[0].forward",
        )
    ),
    "weight-patches": Kind(
        files=patching("""
        name = next(name for name, _ in unet.model.named_parameters() if name.endswith("attn2.to_k.weight"))
        shape = dict(unet.model.named_parameters())[name].shape
        unet.add_patches(filename="trial", patches={name: ("diff", (torch.full(shape, 0.5),))}, strength_patch=1.0)
    """)
    ),
    "own-network": Kind(
        files=patching(
            """
            with using_forge_operations(manual_cast_enabled=True):
                self.net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1, bias=False))  # a bias starts at random
            torch.nn.init.constant_(self.net[0].weight, 0.1)
            patcher = unet.add_extra_torch_module_during_sampling(self.net)
            unet.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + self.net(args["denoised"].to(torch.float32)).detach())
            """,
            "from backend.operations import using_forge_operations",
        )
    ),
    # callbacks of a step
    "cfg-denoiser": Kind(files=listening("on_cfg_denoiser", "params.x = params.x * 0.9")),
    "cfg-denoised": Kind(files=listening("on_cfg_denoised", "params.x = params.x * 0.9")),
    "after-cfg": Kind(files=listening("on_cfg_after_cfg", "params.x = params.x * 0.9")),
    # around a job
    "prompts": Kind(files=extensions.PROMPT_CHANGER),
    "selectable": Kind(files=extensions.SELECTABLE),
    "batch-prompts": Kind(files=always_on("process_batch", 'p.prompts[:] = [prompt + ", at night" for prompt in p.prompts]')),
    "noise": Kind(files=always_on("process_before_every_sampling", 'p.modified_noise = kwargs["noise"].flip(-1)')),
    "schedule": Kind(
        files=always_on("process", "p.sampler_noise_scheduler_override = lambda steps: torch.cat([torch.linspace(9, 0.1, steps), torch.zeros(1)])")
    ),
    "latents": Kind(files=always_on("post_sample", "pp.samples = pp.samples.flip(-1)")),
    "pictures": Kind(files=always_on("postprocess_image", "pp.image = ImageOps.mirror(pp.image)", "from PIL import ImageOps")),
    "picture-tensors": Kind(files=always_on("postprocess_batch", 'kwargs["images"].mul_(0.5)')),
    "parameters": Kind(files=always_on("process", 'p.extra_generation_params["Trial"] = "yes, there: 1"'), acts=PARAMETERS),
    # what the page and the program have
    "sampler": Kind(
        files={
            "scripts/trial.py": """
                from modules import sd_samplers, sd_samplers_common
                from modules.sd_samplers_kdiffusion import KDiffusionSampler

                euler = sd_samplers.find_sampler_config("Euler")
                own = sd_samplers_common.SamplerData("Trial sampler", euler.constructor, ["trial"], {})
                if own.name not in sd_samplers.all_samplers_map:
                    sd_samplers.add_sampler(own)
            """
        },
        acts=NOTHING,
    ),
    "tab-and-route": Kind(files=extensions.TABS_AND_ROUTES, acts=NOTHING),
    "canvas": Kind(
        files={
            "scripts/trial.py": """
                import gradio as gr
                from modules import script_callbacks
                from modules_forge.forge_canvas.canvas import ForgeCanvas

                def tab():
                    with gr.Blocks() as block:
                        canvas = ForgeCanvas(elem_id="trial_canvas", height=300)
                        gr.Button("Go").click(lambda a, b: a, inputs=[canvas.background, canvas.foreground], outputs=[canvas.background])
                    return [(block, "Canvas", "trial_canvas_tab")]

                script_callbacks.on_ui_tabs(tab)
            """
        },
        acts=NOTHING,
    ),
    "extra-network": Kind(
        files={
            "scripts/trial.py": """
                from modules import extra_networks, script_callbacks

                class Trial(extra_networks.ExtraNetwork):
                    def __init__(self):
                        super().__init__("trial")

                    def activate(self, p, params_list):
                        p.extra_generation_params["Trial networks"] = len(params_list)

                    def deactivate(self, p):
                        pass

                extra_networks.register_extra_network(Trial())
                script_callbacks.on_script_unloaded(lambda: extra_networks.extra_network_registry.pop("trial", None))
            """
        },
        acts=PARAMETERS,
    ),
}
