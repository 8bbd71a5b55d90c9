// The full page viewer: opened by a click on the large picture of a gallery. Wheel or +/- zooms, dragging pans, arrows change the picture.
"use strict";

var LIGHTBOX_ZOOM_STEP = 1.2;
var LIGHTBOX_ZOOM_RANGE = [0.1, 40];
var LIGHTBOX_PICTURES = ".output-gallery .preview img[data-testid=detailed-image], .output-gallery .preview .media-button img, .history-viewer img.history-large";
var lightboxView = {scale: 1, x: 0, y: 0};
var lightboxOpener = null;
var modalObserver = null;
var gamepads = [];
var isScrolling = false;

function lightbox() {
    return gradioApp().getElementById("lightboxModal");
}

function lightboxIsOpen() {
    return Boolean(lightbox() && lightbox().classList.contains("shown"));
}

function modalPicture() {
    return gradioApp().getElementById("modalImage");
}

// ---- opening and closing ----

/** Show the picture that `event` happened at. */
function showModal(event) {
    const source = event.target || event.srcElement;
    openLightbox(source.currentSrc || source.src);
}

function openLightbox(address) {
    const modal = lightbox();
    lightboxOpener = document.activeElement;
    modal.classList.add("shown");
    modal.style.setProperty("--icon-opacity", opts.sd_webui_modal_lightbox_icon_opacity ?? 1);
    modal.style.setProperty("--toolbar-opacity", opts.sd_webui_modal_lightbox_toolbar_opacity ?? 0.9);
    modalZoomSet(modalPicture(), opts.js_modal_lightbox_initially_zoomed !== false);
    showInLightbox(address);
    gradioApp().getElementById("modal_save").hidden = !saveButtonOfTab();
    document.body.classList.add("behind-lightbox");
    modal.focus();
    pollGamepads();
}

function showInLightbox(address) {
    if (modalPicture().src !== address) {
        modalPicture().src = address;
        if (lightbox().classList.contains("tiled")) {
            lightbox().style.backgroundImage = `url(${JSON.stringify(address)})`;
        }
    }
}

function closeModal() {
    const modal = lightbox();
    modal.classList.remove("shown", "tiled");
    modal.style.backgroundImage = "";
    document.body.classList.remove("behind-lightbox");
    if (lightboxOpener && lightboxOpener.isConnected) {
        lightboxOpener.focus({preventScroll: true});
    }
}

// ---- which picture ----

/** As the page's gallery counts; the history has its own pictures. */
function getGallerySelectedIndex() {
    return selected_gallery_index();
}

function gallery_container_buttons(container) {
    return Array.from(container.querySelectorAll(".thumbnail-item.thumbnail-small"));
}

/** Show the picture `offset` places on, also in the gallery; the last is followed by the first. */
function modalImageSwitch(offset) {
    const modal = lightbox();
    if (modal.onSwitch) {
        modal.onSwitch(offset);
        return;
    }
    const buttons = all_gallery_buttons();
    if (buttons.length < 2) {
        return;
    }
    const index = (Math.max(0, selected_gallery_index()) + offset + buttons.length) % buttons.length;
    buttons[index].click();
    const picture = buttons[index].querySelector("img");
    if (picture) {
        showInLightbox(picture.src);
    }
    lightbox().focus();
}

function modalNextImage(event) {
    modalImageSwitch(1);
    event.stopPropagation();
}

function modalPrevImage(event) {
    modalImageSwitch(-1);
    event.stopPropagation();
}

/** Follow the gallery while the viewer is open: another picture selected, a new result, a live preview. */
function updateOnBackgroundChange() {
    if (!lightboxIsOpen() || lightbox().onSwitch) {
        return;
    }
    const content = get_uiCurrentTabContent();
    const preview = opts.js_live_preview_in_modal_lightbox && content ? content.querySelector(".livePreview img") : null;
    const selected = selected_gallery_button();
    const picture = preview || (selected && selected.querySelector("img"));
    if (picture && picture.src) {
        showInLightbox(picture.src);
    }
}

// ---- zoom, pan, tiling, saving ----

function drawLightbox() {
    const {scale, x, y} = lightboxView;
    modalPicture().style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
}

/** Fill the window with the picture (`enable`), or show it at its own size if that is smaller. */
function modalZoomSet(picture, enable) {
    picture.classList.toggle("modalImageFullscreen", Boolean(enable));
    lightboxView = {scale: 1, x: 0, y: 0};
    drawLightbox();
}

function modalZoomToggle(event) {
    modalZoomSet(modalPicture(), !modalPicture().classList.contains("modalImageFullscreen"));
    event.stopPropagation();
}

/** Zoom by `factor`; the point (clientX, clientY) stays where it is. */
function zoomLightbox(factor, clientX, clientY) {
    const scale = Math.min(LIGHTBOX_ZOOM_RANGE[1], Math.max(LIGHTBOX_ZOOM_RANGE[0], lightboxView.scale * factor));
    const [centerX, centerY] = [window.innerWidth / 2, window.innerHeight / 2];
    const ratio = scale / lightboxView.scale;
    lightboxView = {
        scale: scale,
        x: clientX - centerX - (clientX - centerX - lightboxView.x) * ratio,
        y: clientY - centerY - (clientY - centerY - lightboxView.y) * ratio,
    };
    drawLightbox();
}

/** Fill the window with copies of the picture side by side, to look at the seams of a tiling texture; or with one again. */
function modalTileImageToggle(event) {
    const tiled = lightbox().classList.toggle("tiled");
    lightbox().style.backgroundImage = tiled ? `url(${JSON.stringify(modalPicture().src)})` : "";
    event.stopPropagation();
}

function modalLivePreviewToggle(event) {
    opts.js_live_preview_in_modal_lightbox = !opts.js_live_preview_in_modal_lightbox;
    gradioApp().getElementById("modal_toggle_live_preview").setAttribute("aria-pressed", String(opts.js_live_preview_in_modal_lightbox));
    event.stopPropagation();
}

function saveButtonOfTab() {
    const content = get_uiCurrentTabContent();
    return content ? gradioApp().getElementById(`save_${content.id.replace(/^tab_/, "")}`) : null;
}

/** Press the Save button of the tab. */
function saveImage() {
    const button = saveButtonOfTab();
    if (button) {
        button.click();
    }
}

function modalSaveImage(event) {
    saveImage();
    event.stopPropagation();
}

// ---- keys, mouse, gamepad ----

function modalKeyHandler(event) {
    const center = [window.innerWidth / 2, window.innerHeight / 2];
    const actions = {
        s: saveImage,
        ArrowLeft: () => modalImageSwitch(-1),
        ArrowRight: () => modalImageSwitch(1),
        Escape: closeModal,
        z: () => modalZoomSet(modalPicture(), !modalPicture().classList.contains("modalImageFullscreen")),
        t: () => modalTileImageToggle(event),
        "+": () => zoomLightbox(LIGHTBOX_ZOOM_STEP, ...center),
        "-": () => zoomLightbox(1 / LIGHTBOX_ZOOM_STEP, ...center),
        0: () => modalZoomSet(modalPicture(), modalPicture().classList.contains("modalImageFullscreen")),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) {
        return;
    }
    event.preventDefault();
    event.stopImmediatePropagation(); // Esc would end the job too
    actions[event.key]();
}

document.addEventListener("keydown", (event) => {
    if (lightboxIsOpen()) {
        modalKeyHandler(event);
    }
}, true);

function watchPointer(modal) {
    let grip = null;
    let wasDragged = false;
    modal.addEventListener("wheel", (event) => {
        event.preventDefault();
        zoomLightbox(event.deltaY < 0 ? LIGHTBOX_ZOOM_STEP : 1 / LIGHTBOX_ZOOM_STEP, event.clientX, event.clientY);
    }, {passive: false});
    modal.addEventListener("pointerdown", (event) => {
        if (event.button === 0 && !event.target.closest("button")) {
            grip = {x: event.clientX - lightboxView.x, y: event.clientY - lightboxView.y};
            wasDragged = false;
            modal.setPointerCapture(event.pointerId);
        }
    });
    modal.addEventListener("pointermove", (event) => {
        if (!grip) {
            return;
        }
        const [x, y] = [event.clientX - grip.x, event.clientY - grip.y];
        wasDragged = wasDragged || Math.hypot(x - lightboxView.x, y - lightboxView.y) > 3;
        if (wasDragged) {
            lightboxView = {...lightboxView, x: x, y: y};
            drawLightbox();
        }
    });
    modal.addEventListener("pointerup", () => {
        grip = null;
    });
    modal.addEventListener("click", (event) => {
        if (!wasDragged && !event.target.closest("button") && pointIsOutsidePicture(event)) {
            closeModal();
        }
    });
    modal.addEventListener("dblclick", (event) => {
        if (!event.target.closest("button")) {
            modalZoomToggle(event);
        }
    });
}

function pointIsOutsidePicture(event) {
    const box = modalPicture().getBoundingClientRect();
    const isInside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    return lightbox().classList.contains("tiled") || !isInside;
}

function pollGamepads() {
    if (!opts.js_modal_lightbox_gamepad || !lightboxIsOpen() || !navigator.getGamepads) {
        return;
    }
    gamepads = Array.from(navigator.getGamepads()).filter(Boolean);
    const lean = gamepads.map((pad) => pad.axes[0] || 0).find((axis) => Math.abs(axis) > 0.3) || 0;
    if (lean) {
        modalImageSwitch(lean < 0 ? -1 : 1);
    }
    isScrolling = Boolean(lean);
    setTimeout(pollGamepads, lean ? opts.js_modal_lightbox_gamepad_repeat || 250 : 50);
}

// ---- building it ----

var LIGHTBOX_BUTTONS = [
    ["modal_zoom", "Fill the window or show at its own size (Z)", "⤢", modalZoomToggle],
    ["modal_tile_image", "Show side by side copies (T)", "⊞", modalTileImageToggle],
    ["modal_save", "Save (S)", "⤓", modalSaveImage],
    ["modal_toggle_live_preview", "Show live previews here", "◉", modalLivePreviewToggle],
    ["modal_close", "Close (Esc)", "✕", closeModal],
];

function lightboxButton(id, title, sign, action) {
    const button = document.createElement("button");
    button.type = "button";
    button.id = id;
    button.title = title;
    button.setAttribute("aria-label", title);
    button.textContent = sign;
    button.addEventListener("click", action);
    return button;
}

function buildLightbox() {
    const modal = document.createElement("div");
    modal.id = "lightboxModal";
    modal.tabIndex = -1;
    modal.setAttribute("role", "dialog");
    modal.setAttribute("aria-modal", "true");
    modal.setAttribute("aria-label", "Picture");
    const controls = document.createElement("div");
    controls.className = "modalControls";
    controls.append(...LIGHTBOX_BUTTONS.map((button) => lightboxButton(...button)));
    const picture = document.createElement("img");
    picture.id = "modalImage";
    picture.alt = "The selected picture";
    picture.draggable = false;
    const previous = lightboxButton("modalPrev", "Previous picture (Left)", "❮", modalPrevImage);
    const next = lightboxButton("modalNext", "Next picture (Right)", "❯", modalNextImage);
    previous.className = "modalPrev";
    next.className = "modalNext";
    modal.append(picture, controls, previous, next);
    watchPointer(modal);
    document.body.append(modal);
}

/** A click on `picture` opens the viewer; the gallery's own pictures do it by themselves. */
function setupImageForLightbox(picture) {
    picture.style.cursor = "zoom-in";
    picture.addEventListener("click", (event) => {
        event.stopPropagation();
        showModal(event);
    }, true);
}

function attachGalleryListeners(name) {
    return gradioApp().getElementById(`${name}_gallery`); // galleries are listened to as a whole, from the start
}

document.addEventListener("click", (event) => {
    if (opts.js_modal_lightbox === false || event.button !== 0 || event.ctrlKey || event.metaKey || !event.target.closest) {
        return;
    }
    const picture = event.target.matches(LIGHTBOX_PICTURES) ? event.target : event.target.querySelector(":scope > img");
    if (picture && picture.matches(LIGHTBOX_PICTURES) && event.target.closest(".media-button, .history-viewer")) {
        event.preventDefault();
        event.stopImmediatePropagation();
        lightbox().onSwitch = window.historySwitchFor ? window.historySwitchFor(picture) : null;
        openLightbox(picture.currentSrc || picture.src);
    }
}, true);

onUiLoaded(() => {
    buildLightbox();
    modalObserver = new MutationObserver(updateOnBackgroundChange);
    modalObserver.observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["src", "class"]});
});
