// Small behaviors of controls: accordions with a checkbox, seeds, the unused negative prompt, tooltips, the color theme.
"use strict";

// ---- accordion with a checkbox: the feature is on while it is open ----

function inputAccordionParts(accordionId) {
    const accordion = gradioApp().getElementById(accordionId);
    return {
        accordion: accordion,
        checkbox: gradioApp().querySelector(`#${CSS.escape(accordionId)}-checkbox input`),
        visible: gradioApp().getElementById(`${accordionId}-visible-checkbox`),
        header: accordion ? accordion.querySelector(":scope > .label-wrap") : null,
    };
}

function accordionIsOpen(header) {
    return header.classList.contains("open");
}

/** Set the accordion `accordionId` to the state `checked`: open and on, or closed and off. */
function inputAccordionChecked(accordionId, checked) {
    const {visible, header} = inputAccordionParts(accordionId);
    if (visible) {
        visible.checked = checked;
    }
    if (header && accordionIsOpen(header) !== Boolean(checked)) {
        header.click();
    }
}

function setupInputAccordion(accordion) {
    const {checkbox, header} = inputAccordionParts(accordion.id);
    if (!checkbox || !header) {
        return;
    }
    const visible = document.createElement("input");
    visible.type = "checkbox";
    visible.checked = checkbox.checked;
    visible.id = `${accordion.id}-visible-checkbox`;
    visible.className = "input-accordion-checkbox";
    visible.title = "On while it is open";
    header.insertBefore(visible, header.firstChild);
    const extra = gradioApp().getElementById(`${accordion.id}-extra`);
    if (extra) {
        header.insertBefore(extra, header.lastElementChild);
    }
    if (accordionIsOpen(header) !== checkbox.checked) {
        header.click();
    }
    // The framework opens it again if its tab is drawn late; only a click on the header shows what the user wants.
    let wasPressed = false;
    header.addEventListener("click", () => {
        wasPressed = true;
    });
    const follow = () => {
        const open = accordionIsOpen(header);
        const hidden = inputAccordionParts(accordion.id).checkbox;
        if (hidden && hidden.checked !== open) {
            (wasPressed ? hidden : header).click();
        }
        wasPressed = false;
        visible.checked = hidden ? hidden.checked : open;
    };
    new MutationObserver(follow).observe(header, {attributes: true, attributeFilter: ["class"]});
    visible.addEventListener("click", (event) => {
        event.stopPropagation();
        if (accordionIsOpen(header) !== visible.checked) {
            header.click();
        }
    });
    accordion.classList.add("input-accordion-ready");
}

onUiLoaded(() => {
    const setup = () => {
        for (const accordion of gradioApp().querySelectorAll(".input-accordion:not(.input-accordion-ready)")) {
            setupInputAccordion(accordion);
        }
    };
    setup();
    onUiUpdate(setup);
});

// ---- showing and hiding parts, seeds, negative prompt ----

/** Show or hide the container with the id `elementId`. */
function showPart(elementId, shown) {
    const part = gradioApp().getElementById(elementId);
    if (part) {
        part.classList.toggle("hidden-part", !shown);
    }
}

var valuesShownAtFirst = [];

/** Remember what controls show while the server is asked for their first values. */
function rememberShownValues(...shown) {
    valuesShownAtFirst = shown;
    return shown;
}

/** The server's first values, a list as JSON with null for "none", for the controls that still show what they were drawn with; the others keep theirs. */
function firstValuesOfUntouched(text, ...shown) {
    const first = JSON.parse(text || "[]");
    setTimeout(restoreKeptValues); // when these are shown
    return shown.map((value, index) => (value === valuesShownAtFirst[index] ? first[index] ?? value : value));
}

/** Count the tokens of all prompts again: the selected checkpoint, and with it the vocabulary, may be another one. */
function recountTokens() {
    for (const tab of ["txt2img", "img2img"]) {
        for (const infix of ["", "negative_"]) {
            gradioApp().getElementById(`${tab}_${infix}token_button`)?.click();
        }
    }
}

/** Set the number field `elementId` to -1: a new seed each time. */
function setRandomSeed(elementId) {
    setInputValue(elementId, "-1");
    return [];
}

/** Show that the negative prompt of `tab` has no effect (CFG scale 1). */
function markNegativePromptUnused(tab, unused) {
    const row = gradioApp().getElementById(`${tab}_neg_prompt_row`);
    if (row) {
        row.classList.toggle("unused-prompt", Boolean(unused));
        row.title = unused ? "The negative prompt has no effect while CFG Scale is 1" : "";
    }
}

// ---- tooltips, by id; for both tabs by the id without its tab ----

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
    interrupt: "Stop the job and keep finished pictures (Esc)",
};

function titleOfControl(id) {
    if (id in CONTROL_TITLES) {
        return CONTROL_TITLES[id];
    }
    const ofTab = id.replace(/^(txt2img|img2img|extras|xyz)_/, "").replace(/^controlnet_ControlNet-\d+_/, "");
    const plain = ofTab.replace(/_(txt2img|img2img|extras)$/, "");
    return CONTROL_TITLES[ofTab] || CONTROL_TITLES[plain] || (plain.startsWith("refresh_") ? "Look for what there is again" : "");
}

onUiLoaded(() => {
    const label = () => {
        for (const input of gradioApp().querySelectorAll(".styles-row input:not([placeholder])")) {
            input.placeholder = "Styles";
        }
        for (const element of gradioApp().querySelectorAll("button[id]:not([title])")) {
            const title = titleOfControl(element.id);
            if (title) {
                element.title = title;
                if (!element.textContent.trim()) {
                    element.setAttribute("aria-label", title);
                }
            }
        }
    };
    label();
    onAfterUiUpdate(label);
});
