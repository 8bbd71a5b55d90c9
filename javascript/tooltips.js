// What a control does, shown when the pointer rests on it: by the text of its label or button, or by its id. Extensions add theirs to `titles`.
"use strict";

/** Text of a label or button -> what it does. */
var titles = {
    "Sampling steps": "How often the picture is improved. More steps cost more time; most samplers need 15 to 40",
    "Sampling method": "The formula by which noise becomes a picture",
    "Schedule type": "How noise is spread over the steps. Automatic: as the sampler's author chose",
    "Batch count": "How many batches are made one after the other",
    "Batch size": "How many pictures are made at once; more need more memory",
    "CFG Scale": "How closely the picture follows the prompt. With 1 the negative prompt has no effect and a step takes half the time",
    "Distilled CFG Scale": "The guidance that models such as Flux.1 dev have learned; it costs no time",
    Seed: "The number that the noise is made from: the same seed and settings give the same picture. -1 is a new one each time",
    "Variation seed": "The seed of the noise that is mixed in",
    "Variation strength": "How much of it: 0 is the picture of the seed, 1 that of the variation seed",
    "Resize seed from width": "Make noise as for a picture of this width, to get a similar one at another size; 0 is off",
    "Resize seed from height": "Make noise as for a picture of this height; 0 is off",
    "Denoising strength": "How much of the given picture may change: 0 nothing, 1 all of it",
    "Hires. fix": "Make the picture small, enlarge it, and work on it again",
    "Hires steps": "Steps of the second pass; 0 is as many as in the first",
    "Upscale by": "How much larger the second pass is",
    Upscaler: "What enlarges the picture between the passes. The latent ones need a high denoising strength",
    Width: "In pixels. Models make the best pictures near the size they were trained with",
    Height: "In pixels. Models make the best pictures near the size they were trained with",
    "Clip skip": "Leave out the last layers of the text encoder; some models were trained with 2",
    Checkpoint: "The file with the model that makes pictures",
    "VAE / Text Encoder": "Files that replace or complete parts of the checkpoint",
    "Diffusion in Low Bits": "How the model's weights lie in memory: fewer bits need less and change the picture slightly",
    "Mask blur": "Width of the soft border of the mask, in pixels",
    "Mask mode": "Whether the painted part is repainted, or everything else",
    "Masked content": "What is under the mask before the first step",
    "Inpaint area": "Work on the whole picture, or only on the masked part at full resolution",
    "Only masked padding, pixels": "How much around the mask is looked at when only the masked part is repainted",
    "Resize mode": "What happens if the given picture has another shape",
    Script: "Something that makes several pictures, or changes how one is made",
    Styles: "Kept pieces of prompts; they are added to the prompt when the picture is made",
    "Switch at": "The share of the steps after which the refiner goes on",
    Refiner: "Another checkpoint that makes the last steps",
    "Just resize": "Stretch the picture to the size",
    "Crop and resize": "Keep the shape and cut off what stands out",
    "Resize and fill": "Keep the shape and fill the rest with the colors of the border",
    "Just resize (latent upscale)": "Stretch what the network sees instead of the picture",
    fill: "The colors of the surroundings",
    original: "The picture as it is",
    "latent noise": "Noise",
    "latent nothing": "Nothing: an even gray to the network",
    "Apply settings": "Save every changed setting",
    "Reload UI": "Rebuild the page; the server stays up, models are loaded again when needed",
    "Generate forever": "Press Generate again whenever it is free",
    "Tiling": "Make a picture whose opposite borders fit together",
    Preprocessor: "What turns the given picture into the map that guides the new one",
    "Control Weight": "How strongly the map guides",
    "Starting Control Step": "The share of the steps after which guiding begins",
    "Ending Control Step": "The share of the steps after which guiding ends",
};

/** Tooltips by id; for both tabs by the id without its tab. */
var CONTROL_TITLES = {
    paste: "Read generation parameters from the prompt, or from the last picture if the prompt is empty",
    clear_prompt: "Clear the prompt",
    style_apply: "Insert the chosen styles into the prompt",
    restore_progress: "Show the job that was running before the page was reloaded",
    res_switch_btn: "Swap width and height",
    random_seed: "Seed -1: a different picture each time",
    reuse_seed: "Use the seed of the selected picture",
    random_subseed: "Variation seed -1: a different one each time",
    reuse_subseed: "Use the variation seed of the selected picture",
    subseed_show: "Variation seed and seed resize",
    open_folder: "Open the picture folder on the server",
    save: "Save the selected picture to the folder of saved pictures",
    save_zip: "Save all pictures of the gallery as one zip file",
    send_to_img2img: "Send the selected picture and its parameters to img2img",
    send_to_inpaint: "Send the selected picture and its parameters to inpaint",
    send_to_extras: "Send the selected picture to Extras",
    styles_edit_button: "Write, change and delete styles",
    style_copy: "Take the prompts of the tab into this style",
    style_apply_dialog: "Put this style into the prompts of the tab",
    controlnet_trigger_preprocessor: "Show the map that the preprocessor makes of the picture",
    controlnet_refresh_models: "Look for control model files again",
    grid_fill_x_tool_button: "Fill in every value that there is",
    grid_fill_y_tool_button: "Fill in every value that there is",
    grid_fill_z_tool_button: "Fill in every value that there is",
    upscale: "Repeat the selected picture with hires fix",
    detect_image_size_btn: "Use the picture's width and height",
    forge_refresh_checkpoint: "Scan for model files again",
    generate: "Ctrl+Enter",
    skip: "Stop this batch and continue with the next (Alt+Enter)",
    enqueue: "Put this job into the queue without waiting for it (Ctrl+Shift+Enter)",
    interrupt: "Stop the job and keep finished pictures (Esc)",
};

function titleOfControl(id) {
    if (id in CONTROL_TITLES) {
        return CONTROL_TITLES[id];
    }
    const ofTab = id.replace(/^(txt2img|img2img|extras|xyz)_/, "").replace(/^controlnet_ControlNet-\d+_/, "");
    const plain = ofTab.replace(/_(txt2img|img2img|extras)$/, "");
    return CONTROL_TITLES[ofTab] || CONTROL_TITLES[plain] || (/(^|_)refresh(_|$)/.test(plain) ? "Look for what there is again" : "");
}

/** Give `element` the tooltip that belongs to its text, if it has none. Returns whether it has one now. */
function updateTooltip(element) {
    const text = (element.dataset.englishText || element.textContent || "").trim() || element.value;
    const title = titles[text] || titles[element.value];
    if (title && !element.title) {
        element.title = getTranslation(title) || title;
    }
    return Boolean(element.title);
}

var tooltipCheckNodes = new Set();
var tooltipCheckTimer = null;

function processTooltipCheckNodes() {
    for (const node of tooltipCheckNodes) {
        updateTooltip(node);
    }
    tooltipCheckNodes.clear();
}

function describeButtons() {
    for (const input of gradioApp().querySelectorAll(".styles-row input:not([placeholder])")) {
        input.placeholder = "Styles";
    }
    for (const box of gradioApp().querySelectorAll("input.input-accordion-checkbox:not([aria-label])")) {
        box.setAttribute("aria-label", (box.closest(".label-wrap") || box).textContent.trim());
    }
    for (const element of gradioApp().querySelectorAll("button[id]:not([title])")) {
        const title = titleOfControl(element.id);
        if (title) {
            element.title = getTranslation(title) || title;
            if (!element.textContent.trim()) {
                element.setAttribute("aria-label", element.title);
            }
        }
    }
}

function describeControls() {
    describeButtons();
    const labels = "span[data-testid=block-info]:not([title]), label > span:not([title]), .label-wrap > span:not([title]), button:not([title])";
    for (const element of gradioApp().querySelectorAll(labels)) {
        tooltipCheckNodes.add(element);
    }
    clearTimeout(tooltipCheckTimer);
    tooltipCheckTimer = setTimeout(processTooltipCheckNodes);
}

onUiLoaded(() => {
    describeControls();
    onAfterUiUpdate(describeControls);
});
