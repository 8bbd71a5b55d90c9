// Prompts and numbers survive a reload, also the one after the server was restarted: this browser tab keeps what was typed.
// What is kept is written when somebody changes it, never when the page goes away or loses its server. Must not know any single control.
"use strict";

var KEPT_VALUES_KEY = "kept_values";
var KEPT_FIELDS = "#tab_txt2img textarea, #tab_img2img textarea, #tab_txt2img input[type=number], #tab_img2img input[type=number]";
var KEPT_NOT_FROM = "[id$=_results], .extra-network-pane, .extra-networks-pane, .style-dialog"; // results are the server's, dialogs are done with

function readKeptValues() {
    try {
        return JSON.parse(sessionStorage.getItem(KEPT_VALUES_KEY) || "{}");
    } catch (error) {
        return {};
    }
}

/** The id under which a field is kept: that of the component it belongs to; null for one that is not kept. */
function keptId(field) {
    const component = field.closest("[id]");
    const isShown = component && component.getClientRects().length > 0;
    return isShown && field.matches(KEPT_FIELDS) && !field.closest(KEPT_NOT_FROM) ? component.id : null;
}

function keepValue(field) {
    const id = opts.keep_values_in_browser === false ? null : keptId(field);
    if (!id) {
        return;
    }
    try {
        sessionStorage.setItem(KEPT_VALUES_KEY, JSON.stringify({...readKeptValues(), [id]: field.value}));
    } catch (error) {
        console.warn("cannot keep what was typed in this browser", error);
    }
}

/** Put back what this browser tab has kept; called once, when the server's first values are in. */
function restoreKeptValues() {
    if (opts.keep_values_in_browser === false) {
        return;
    }
    for (const [id, value] of Object.entries(readKeptValues())) {
        const field = gradioApp().querySelector(`#${CSS.escape(id)} textarea, #${CSS.escape(id)} input[type=number]`);
        if (field && field.value !== value) {
            setInputValue(id, value);
        }
    }
}

document.addEventListener("input", (event) => {
    if (event.target.matches && event.target.matches(KEPT_FIELDS)) {
        keepValue(event.target);
    }
}, true);
document.addEventListener("change", (event) => {
    if (event.target.matches && event.target.matches(KEPT_FIELDS)) {
        keepValue(event.target);
    }
}, true);

// what was pasted or sent over something typed counts as well, and is seen last of all
window.addEventListener("pagehide", () => {
    if (!uiIsLoaded) {
        return;
    }
    for (const id of Object.keys(readKeptValues())) {
        const field = gradioApp().querySelector(`#${CSS.escape(id)} textarea, #${CSS.escape(id)} input[type=number]`);
        if (field) {
            sessionStorage.setItem(KEPT_VALUES_KEY, JSON.stringify({...readKeptValues(), [id]: field.value}));
        }
    }
});
