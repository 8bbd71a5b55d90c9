// Which picture of a gallery is selected, and the tab switches for sending a picture.
"use strict";

function currentGallery() {
    const content = get_uiCurrentTabContent();
    return content ? content.querySelector(".output-gallery") : null;
}

/** The buttons of all pictures in the current tab's gallery: below the large picture, or in the grid if none is enlarged. */
function all_gallery_buttons() {
    const gallery = currentGallery();
    if (!gallery) {
        return [];
    }
    const small = Array.from(gallery.querySelectorAll(".thumbnail-item.thumbnail-small"));
    return small.length ? small : Array.from(gallery.querySelectorAll(".grid-wrap .thumbnail-item"));
}

/** The button of the selected picture, or null. */
function selected_gallery_button() {
    return all_gallery_buttons().find((button) => button.classList.contains("selected")) || null;
}

/** Index of the selected picture in the current tab's gallery; 0 if there is only one, -1 if none is selected. */
function selected_gallery_index() {
    const buttons = all_gallery_buttons();
    const selected = buttons.findIndex((button) => button.classList.contains("selected"));
    return selected === -1 && buttons.length === 1 ? 0 : selected;
}

/** The selected picture of `gallery` as a list of one; the first picture if none is selected. */
function extract_image_from_gallery(gallery) {
    if (!gallery || gallery.length === 0) {
        return [null];
    }
    const index = selected_gallery_index();
    return [gallery[index < 0 || index >= gallery.length ? 0 : index]];
}

function switchToImg2imgTab(name) {
    switchToTab("img2img");
    clickTab(gradioApp().querySelector("#mode_img2img"), `img2img_${name}_tab`);
}

function switch_to_txt2img(...args) {
    switchToTab("txt2img");
    return args;
}

function switch_to_img2img(...args) {
    switchToImg2imgTab("img2img");
    return args;
}

function switch_to_sketch(...args) {
    switchToImg2imgTab("img2img_sketch");
    return args;
}

function switch_to_inpaint(...args) {
    switchToImg2imgTab("inpaint");
    return args;
}

function switch_to_inpaint_sketch(...args) {
    switchToImg2imgTab("inpaint_sketch");
    return args;
}

function switch_to_extras(...args) {
    switchToTab("extras");
    return args;
}
