// Pictures that come from outside: dropped on a prompt (its parameters are read), dropped or pasted onto a picture field.
"use strict";

var PICTURE_FIELDS = ".gradio-image, .gradio-imageeditor, .paint-canvas";
var FIELD_WAIT_MS = 2000;

function eventHasFiles(event) {
    const data = event.dataTransfer;
    return Boolean(data) && (data.types.includes("Files") || data.types.includes("text/uri-list"));
}

/** The tab whose prompt `target` belongs to; null outside of prompts. */
function promptTabOf(target) {
    const field = target && target.closest ? target.closest("#txt2img_prompt, #txt2img_neg_prompt, #img2img_prompt, #img2img_neg_prompt") : null;
    return field ? field.id.split("_")[0] : null;
}

function dragDropTargetIsPrompt(target) {
    return promptTabOf(target) !== null;
}

/** The dropped files; a picture of this page that was dragged is fetched. Addresses of other hosts are not. */
async function droppedFiles(data) {
    if (data.files.length) {
        return data.files;
    }
    const address = (data.getData("text/uri-list") || "").split("\n")[0].trim();
    if (!isURL(address) || new URL(address).origin !== window.location.origin) {
        return [];
    }
    const response = await fetch(address, {credentials: "same-origin"});
    const blob = await response.blob();
    return response.ok ? fileList(new File([blob], decodeURIComponent(address.split("/").pop().split("?")[0]) || "picture.png", {type: blob.type})) : [];
}

function fileList(file) {
    const transfer = new DataTransfer();
    transfer.items.add(file);
    return transfer.files;
}

/** Hand `files` to the file input inside `field` as if the user had chosen them. */
function giveFiles(field, files) {
    const input = field.querySelector("input[type=file]");
    if (!input) {
        return false;
    }
    input.value = "";
    input.files = files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
    return true;
}

/** Put the picture in `files` into the picture field around or at `field`, in the place of the one that is there. */
async function dropReplaceImage(field, files) {
    const around = field.closest(PICTURE_FIELDS) || field;
    if (!isValidImageList(files)) {
        return;
    }
    const clear = around.querySelector("button[aria-label='Remove Image'], button[aria-label='Clear'], button[aria-label='Clear canvas']");
    if (clear && !around.matches(".paint-canvas")) {
        clear.click();
        await sleepUntil(() => around.querySelector("input[type=file]"), FIELD_WAIT_MS);
    }
    giveFiles(around, files);
}

document.addEventListener("dragover", (event) => {
    if (eventHasFiles(event) && (dragDropTargetIsPrompt(event.target) || (event.target.closest && event.target.closest(PICTURE_FIELDS)))) {
        event.preventDefault();
        event.dataTransfer.dropEffect = "copy";
    }
});

document.addEventListener("drop", async (event) => {
    const tab = promptTabOf(event.target);
    const field = event.target.closest ? event.target.closest(PICTURE_FIELDS) : null;
    if (!eventHasFiles(event) || (!tab && !field)) {
        return;
    }
    if (!tab && event.dataTransfer.files.length && field.querySelector("input[type=file]") && !field.querySelector("img, canvas")) {
        return; // an empty field takes files by itself
    }
    event.preventDefault();
    event.stopPropagation();
    const files = await droppedFiles(event.dataTransfer);
    if (!files.length) {
        return;
    }
    if (tab) {
        giveFiles(gradioApp().getElementById(`${tab}_prompt_image`), files);
    } else {
        dropReplaceImage(field, files);
    }
}, true);

// ---- Ctrl+V ----

var pointedAt = null;

document.addEventListener("mouseover", (event) => {
    pointedAt = event.target;
});

/** The picture field that a pasted picture goes to: the one under the pointer, else the first empty one on screen, else the first. */
function fieldForPaste() {
    const pointed = pointedAt && pointedAt.closest ? pointedAt.closest(PICTURE_FIELDS) : null;
    if (pointed && pointed.querySelector("input[type=file], img, canvas")) {
        return pointed;
    }
    const content = get_uiCurrentTabContent();
    const shown = content ? Array.from(content.querySelectorAll(PICTURE_FIELDS)).filter(uiElementIsVisible) : [];
    return shown.find((field) => field.querySelector("input[type=file]") && !field.querySelector("img")) || shown[0] || null;
}

document.addEventListener("paste", (event) => {
    const data = event.clipboardData;
    const isTyping = event.target.closest && event.target.closest("input, textarea, [contenteditable]");
    if (!data || !isValidImageList(data.files) || (isTyping && data.types.includes("text/plain"))) {
        return;
    }
    const field = fieldForPaste();
    if (field) {
        event.preventDefault();
        dropReplaceImage(field, data.files);
    }
});
