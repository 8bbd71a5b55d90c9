// While width or height of img2img is being changed, a frame on the picture shows what its shape will keep.
"use strict";

var ASPECT_FRAME_MS = 1500;
var currentWidth = null;
var currentHeight = null;
var arFrameTimeout = null;

function imgOfMode() {
    const shown = Array.from(gradioApp().querySelectorAll("#mode_img2img .gradio-image img, #mode_img2img .paint-canvas canvas"));
    return shown.find(uiElementIsVisible) || null;
}

/** Width, height and shape of the visible source picture; null if there is none. */
function currentImg2imgSourceResolution() {
    const picture = imgOfMode();
    const width = picture ? picture.naturalWidth || Number(picture.dataset.pictureWidth) : 0;
    const height = picture ? picture.naturalHeight || Number(picture.dataset.pictureHeight) : 0;
    return width && height ? [width, height, width / height] : null;
}

function aspectFrame() {
    let frame = gradioApp().getElementById("imageARPreview");
    if (!frame) {
        frame = document.createElement("div");
        frame.id = "imageARPreview";
        document.body.append(frame);
    }
    return frame;
}

/** The centered part of a picture of `width` x `height` that has the shape `wanted` (width by height), within a box of that picture. */
function keptBox(box, picture, wanted) {
    const shape = picture.width / picture.height;
    const shown = shape > box.width / box.height
        ? {width: box.width, height: box.width / shape}
        : {width: box.height * shape, height: box.height};
    const kept = wanted > shape ? {width: shown.width, height: shown.width / wanted} : {width: shown.height * wanted, height: shown.height};
    return {...kept, left: box.left + (box.width - kept.width) / 2, top: box.top + (box.height - kept.height) / 2};
}

/** Called with each change of a size field of img2img. */
function dimensionChange(event, isWidth, isHeight) {
    currentWidth = isWidth ? Number(event.target.value) : currentWidth;
    currentHeight = isHeight ? Number(event.target.value) : currentHeight;
    const source = currentImg2imgSourceResolution();
    if (!source || !(currentWidth > 0) || !(currentHeight > 0)) {
        return;
    }
    const box = imgOfMode().getBoundingClientRect();
    const kept = keptBox(box, {width: source[0], height: source[1]}, currentWidth / currentHeight);
    const frame = aspectFrame();
    Object.assign(frame.style, {display: "block", left: `${kept.left}px`, top: `${kept.top}px`, width: `${kept.width}px`, height: `${kept.height}px`});
    clearTimeout(arFrameTimeout);
    arFrameTimeout = setTimeout(() => {
        frame.style.display = "none";
    }, ASPECT_FRAME_MS);
}

function watchSizes() {
    const fields = {width: [true, false], height: [false, true]};
    for (const [side, which] of Object.entries(fields)) {
        const around = gradioApp().getElementById(`img2img_${side}`);
        for (const input of around ? around.querySelectorAll("input:not(.watches-shape)") : []) {
            input.classList.add("watches-shape");
            currentWidth = which[0] ? Number(input.value) : currentWidth;
            currentHeight = which[1] ? Number(input.value) : currentHeight;
            input.addEventListener("input", (event) => dimensionChange(event, ...which));
        }
    }
}

/** Show the size that "Resize by" gives for a picture that was just set. */
function updateImg2imgResizeToTextAfterChangingImage() {
    const scale = gradioApp().querySelector("#img2img_scale input[type=number]");
    if (scale && uiElementIsVisible(scale)) {
        setTimeout(() => updateInput(scale), 500); // the server learns of the picture first
    }
    return [];
}

onUiLoaded(() => {
    watchSizes();
    onAfterUiUpdate(watchSizes);
});
