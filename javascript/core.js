// What every other script of the page and every extension builds on: gradioApp(), the on... registrations, the current tab, options, small helpers.
// Must not know any particular control.
"use strict";

/** The node that contains the page's elements. */
function gradioApp() {
    return document;
}

// ---- registrations: each stores a callback and calls it at its time; an error in one is logged and does not stop the others ----

var uiUpdateCallbacks = [];
var uiAfterUpdateCallbacks = [];
var uiLoadedCallbacks = [];
var uiTabChangeCallbacks = [];
var optionsChangedCallbacks = [];
var optionsAvailableCallbacks = [];

var opts = {};
var uiCurrentTab = null;
var uiIsLoaded = false;
var optionsAreAvailable = false;
var uiAfterUpdateTimer = null;

/** Call `callback` with the list of DOM changes, after each change. */
function onUiUpdate(callback) {
    uiUpdateCallbacks.push(callback);
}

/** Call `callback` when the DOM has been quiet for 200 ms after a change. */
function onAfterUiUpdate(callback) {
    uiAfterUpdateCallbacks.push(callback);
}

/** Call `callback` once the page is ready (immediately if it already is). */
function onUiLoaded(callback) {
    if (uiIsLoaded) {
        runUiCallbacks([callback]);
    } else {
        uiLoadedCallbacks.push(callback);
    }
}

/** Call `callback` when another main tab is shown. */
function onUiTabChange(callback) {
    uiTabChangeCallbacks.push(callback);
}

/** Call `callback` when settings have changed. */
function onOptionsChanged(callback) {
    optionsChangedCallbacks.push(callback);
}

/** Call `callback` once `opts` is filled (immediately if it already is). */
function onOptionsAvailable(callback) {
    if (optionsAreAvailable) {
        runUiCallbacks([callback]);
    } else {
        optionsAvailableCallbacks.push(callback);
    }
}

function runUiCallbacks(callbacks, argument) {
    for (const callback of callbacks) {
        try {
            callback(argument);
        } catch (error) {
            console.error("error in a page callback", callback.name || callback, error);
        }
    }
}

// ---- tabs ----

/** The button of the visible main tab. */
function get_uiCurrentTab() {
    return gradioApp().querySelector("#tabs > .tab-wrapper [role=tab][aria-selected=true]");
}

/** The content of the visible main tab. */
function get_uiCurrentTabContent() {
    const contents = gradioApp().querySelectorAll("#tabs > [role=tabpanel]");
    return Array.from(contents).find((content) => content.style.display !== "none") || null;
}

/** "txt2img" or "img2img" if that tab is visible, else null. */
function currentGenerationTab() {
    const content = get_uiCurrentTabContent();
    const name = content ? content.id.replace(/^tab_/, "") : "";
    return ["txt2img", "img2img"].includes(name) ? name : null;
}

/** Show the main tab `name` ("txt2img", "img2img", "pnginfo", "settings" ...). */
function switchToTab(name) {
    clickTab(gradioApp().querySelector("#tabs"), `tab_${name}`);
}

function tabButton(name) {
    return gradioApp().querySelector(`#tabs > .tab-wrapper [role=tab][aria-controls="tab_${name}"]`);
}

/** Click the button of the tab whose content has the id `contentId`, within the tabs element `tabs`. */
function clickTab(tabs, contentId) {
    const button = tabs ? tabs.querySelector(`:scope > .tab-wrapper [role=tab][aria-controls="${contentId}"]`) : null;
    if (button) {
        button.click();
    }
}

// ---- watching the page ----

function notifyUiChange(mutations) {
    runUiCallbacks(uiUpdateCallbacks, mutations);
    clearTimeout(uiAfterUpdateTimer);
    uiAfterUpdateTimer = setTimeout(() => runUiCallbacks(uiAfterUpdateCallbacks), 200);
    const tab = get_uiCurrentTab();
    if (tab && tab !== uiCurrentTab) {
        uiCurrentTab = tab;
        runUiCallbacks(uiTabChangeCallbacks);
    }
}

// The framework creates a tab's content when it is first shown. Scripts expect these to exist from the start.
var TABS_TO_RENDER = ["txt2img", "img2img", "extras", "pnginfo"];
var hiddenTabsWereShown = false;

function firstTabStands() {
    const content = get_uiCurrentTabContent();
    return Boolean(get_uiCurrentTab() && content && content.querySelector(".block") && gradioApp().querySelector("#settings_json textarea"));
}

function hiddenTabsStand() {
    const sign = (name) => (["txt2img", "img2img"].includes(name) ? `#${name}_prompt textarea` : `#tab_${name} .block`);
    return TABS_TO_RENDER.every((name) => !tabButton(name) || gradioApp().querySelector(sign(name)));
}

function showHiddenTabsOnce() {
    if (hiddenTabsWereShown) {
        return;
    }
    hiddenTabsWereShown = true;
    const shown = get_uiCurrentTab();
    for (const button of TABS_TO_RENDER.map(tabButton)) {
        if (button && button !== shown) {
            button.click();
        }
    }
    shown.click();
}

// Showing another tab may change attributes only, which the observer does not see.
document.addEventListener("click", (event) => {
    if (uiIsLoaded && event.target.closest && event.target.closest("[role=tab]")) {
        setTimeout(() => notifyUiChange([]));
    }
});

function watchPage() {
    const observer = new MutationObserver((mutations) => {
        if (!uiIsLoaded && firstTabStands()) {
            showHiddenTabsOnce();
            if (hiddenTabsStand()) {
                uiIsLoaded = true;
                watchOptions();
                runUiCallbacks(uiLoadedCallbacks);
            }
        }
        notifyUiChange(mutations);
    });
    observer.observe(document.body, {childList: true, subtree: true});
}

// The framework adds scripts after the page itself has been parsed.
if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", watchPage);
} else {
    watchPage();
}

// ---- options: the server stores them as JSON in a hidden text box ----

function readOptions(text) {
    try {
        opts = JSON.parse(text || "{}");
    } catch (error) {
        console.error("cannot read the page's settings", error);
        return;
    }
    if (!optionsAreAvailable) {
        optionsAreAvailable = true;
        runUiCallbacks(optionsAvailableCallbacks);
    }
    runUiCallbacks(optionsChangedCallbacks);
}

function watchOptions() {
    const box = gradioApp().querySelector("#settings_json textarea");
    let shown = box.value;
    readOptions(shown);
    // The framework fills the box without firing an event, but the surrounding page changes at the same time.
    onAfterUiUpdate(() => {
        const now = gradioApp().querySelector("#settings_json textarea");
        if (now && now.value !== shown) {
            shown = now.value;
            readOptions(shown);
        }
    });
}

// ---- helpers ----

/** Tell the framework that a script has set the value of the input or text area `target`. */
function updateInput(target) {
    target.dispatchEvent(new Event("input", {bubbles: true}));
}

/** Set the input inside the element with the id `elementId` to `value`. */
function setInputValue(elementId, value) {
    const input = gradioApp().querySelector(`#${CSS.escape(elementId)} input, #${CSS.escape(elementId)} textarea`);
    if (input) {
        input.value = value;
        updateInput(input);
        input.dispatchEvent(new Event("change", {bubbles: true}));
        input.dispatchEvent(new Event("blur", {bubbles: false}));
    }
}

/** Call `callback` when `element` was edited and then unchanged for `delay` ms; returns a function that calls it immediately. */
function onEdit(editId, element, delay, callback) {
    let timer = null;
    const run = () => {
        clearTimeout(timer);
        timer = null;
        callback();
    };
    element.addEventListener("input", () => {
        clearTimeout(timer);
        timer = setTimeout(run, delay);
    });
    return run;
}

/** An id for a task: task(<random letters and digits>). */
function randomId() {
    const words = crypto.getRandomValues(new Uint32Array(3));
    return `task(${Array.from(words, (word) => word.toString(36)).join("").slice(0, 15)})`;
}

/** The URL of the server's `path`, wherever the page is mounted. */
function serverUrl(path) {
    const root = (window.gradio_config || {}).root || document.baseURI;
    return new URL(path, root.endsWith("/") ? root : `${root}/`).href;
}

/** POST `data` as JSON to `url`; `onSuccess` gets the JSON answer, `onFailure` is called otherwise. */
function request(url, data, onSuccess, onFailure) {
    fetch(url, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(data), credentials: "same-origin"})
        .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`status ${response.status}`))))
        .then(onSuccess)
        .catch((error) => (onFailure || (() => {}))(error));
}

function localSet(key, value) {
    try {
        localStorage.setItem(key, value);
    } catch (error) {
        console.warn(`cannot store ${key} in this browser`, error);
    }
}

function localGet(key, fallback) {
    try {
        const value = localStorage.getItem(key);
        return value === null ? fallback : value;
    } catch (error) {
        return fallback;
    }
}

function localRemove(key) {
    try {
        localStorage.removeItem(key);
    } catch (error) {
        console.warn(`cannot remove ${key} from this browser`, error);
    }
}

// ---- a dialog over the page ----

/** Show the element `content` in a dialog over the page; a click outside it, or Escape, closes it. */
function popup(content) {
    closePopup();
    const around = document.createElement("div");
    around.className = "global-popup";
    const inner = document.createElement("div");
    inner.className = "global-popup-inner";
    inner.append(content);
    around.append(inner);
    around.addEventListener("click", (event) => {
        if (event.target === around) {
            closePopup();
        }
    });
    document.body.append(around);
}

function closePopup() {
    for (const shown of gradioApp().querySelectorAll(".global-popup")) {
        shown.remove();
    }
}

document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
        closePopup();
    }
});
