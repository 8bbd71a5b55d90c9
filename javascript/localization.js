// The page in another language: texts are replaced as they are drawn, by the table of the chosen localization file. What people wrote stays.
"use strict";

var ignore_ids_for_localization = {
    setting_sd_model_checkpoint: "OPTION",
    setting_forge_additional_modules: "OPTION",
    txt2img_styles: "OPTION",
    img2img_styles: "OPTION",
    extras_upscaler_1: "SPAN",
    extras_upscaler_2: "SPAN",
};
var KEPT_IN_ENGLISH = ".prompt, .infotext-box, .output-gallery, .html-log, [data-untranslated], pre, code";
var re_num = /^[.\d]+$/;
var re_emoji = /[\p{Extended_Pictographic}\u{1F3FB}-\u{1F3FF}\u{1F9B0}-\u{1F9B3}]/u;
var original_lines = {}; // texts that were seen, for a file to be translated
var translated_lines = {};

function canBeTranslated(node, text) {
    const parent = node.parentElement;
    if (!text || !parent || re_num.test(text) || re_emoji.test(text) || ["SCRIPT", "STYLE", "TEXTAREA"].includes(parent.nodeName)) {
        return false;
    }
    return !parent.closest(KEPT_IN_ENGLISH) && !Object.keys(ignore_ids_for_localization).some((id) => parent.closest(`#${id} [role=listbox]`));
}

function translationOf(text) {
    if (text in translated_lines) {
        return undefined; // it is a translation already
    }
    original_lines[text] = 1;
    const translated = getTranslation(text);
    if (translated !== undefined) {
        translated_lines[translated] = 1;
    }
    return translated;
}

function processTextNode(node) {
    const text = node.textContent.trim();
    const translated = canBeTranslated(node, text) ? translationOf(text) : undefined;
    if (translated !== undefined) {
        node.parentElement.dataset.englishText = text; // tooltips are found by it
        node.textContent = node.textContent.replace(text, () => translated);
    }
}

/** Translate `node` and everything below it: texts, tooltips, placeholders. */
function processNode(node) {
    if (node.nodeType === Node.TEXT_NODE) {
        processTextNode(node);
        return;
    }
    if (node.nodeType !== Node.ELEMENT_NODE) {
        return;
    }
    const elements = [node, ...node.querySelectorAll("[title], [placeholder]")];
    for (const element of elements) {
        for (const attribute of ["title", "placeholder"]) {
            const text = element.getAttribute(attribute);
            const translated = text ? translationOf(text) : undefined;
            if (translated !== undefined) {
                element.setAttribute(attribute, translated);
            }
        }
    }
    textNodesUnder(node).forEach(processTextNode);
}

function localizeWholePage() {
    processNode(document.body);
}

/** Every text seen so far, with its translation or an empty one. */
function dumpTranslations() {
    if (!hasLocalization()) {
        localizeWholePage(); // only notes the texts
    }
    const known = Object.fromEntries(Object.entries(localization).filter(([, text]) => text));
    return {...Object.fromEntries(Object.keys(original_lines).map((text) => [text, known[text] || ""])), ...known};
}

/** Save those texts as a file to be filled in. */
function download_localization() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(dumpTranslations(), null, 4)], {type: "application/json"}));
    link.download = "localization.json";
    link.click();
    URL.revokeObjectURL(link.href);
}

onUiLoaded(() => {
    Object.assign(localization, window.webuiLocalization || {});
    if (!hasLocalization()) {
        return;
    }
    document.documentElement.dir = localization.rtl ? "rtl" : document.documentElement.dir;
    localizeWholePage();
    onUiUpdate((mutations) => mutations.forEach((mutation) => mutation.addedNodes.forEach(processNode)));
});
