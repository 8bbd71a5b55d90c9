// What scripts of extensions know from the page that gradio 3 and 4 drew: how its elements were nested, and small helpers of its global scope.
// Must not know any single control.
"use strict";

// ---- selectors: where the old page had an element, today's framework may put one more around it ----

var OLD_SELECTORS = [
    [/>\s*label\s*>\s*(textarea|input)/g, "> label $1"],
    [/>\s*(?:div)?\.tab-nav/g, "> .tab-wrapper > .tab-nav"],
];

/** The selector `selector`, written for the page as it was, for the page as it is. */
function todaysSelector(selector) {
    return OLD_SELECTORS.reduce((text, [old, today]) => text.replace(old, today), selector);
}

function meetOldSelectors(prototype) {
    const one = prototype.querySelector;
    const all = prototype.querySelectorAll;
    prototype.querySelector = function querySelector(selector) {
        const found = one.call(this, selector);
        const today = found === null && typeof selector === "string" ? todaysSelector(selector) : selector;
        return today === selector ? found : one.call(this, today);
    };
    prototype.querySelectorAll = function querySelectorAll(selector) {
        const found = all.call(this, selector);
        const today = found.length === 0 && typeof selector === "string" ? todaysSelector(selector) : selector;
        return today === selector ? found : all.call(this, today);
    };
}

meetOldSelectors(Document.prototype);
meetOldSelectors(Element.prototype);

function nameTabBars() {
    for (const bar of document.querySelectorAll(".tab-wrapper > .tab-container:not(.visually-hidden):not(.tab-nav)")) {
        bar.classList.add("tab-nav");
    }
}

onUiLoaded(() => {
    nameTabBars();
    onUiUpdate(nameTabBars);
});

// ---- translation: a table that extensions fill; without one every text is its own translation ----

var localization = {};

function hasLocalization() {
    return Object.keys(localization).length > 0;
}

/** The translation of `text`, or undefined. */
function getTranslation(text) {
    return text && localization[text] ? localization[text] : undefined;
}

/** The text nodes below `element`, without those of scripts and style sheets. */
function textNodesUnder(element) {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT, (node) => (
        ["SCRIPT", "STYLE", "TEXTAREA"].includes(node.parentElement.nodeName) ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT
    ));
    const found = [];
    while (walker.nextNode()) {
        found.push(walker.currentNode);
    }
    return found;
}

// ---- small helpers ----

function args_to_array(args) {
    return Array.from(args);
}

function pad2(number) {
    return String(number).padStart(2, "0");
}

function formatTime(seconds) {
    return formatSeconds(seconds);
}

function isMobile() {
    return window.innerWidth <= 900 && window.matchMedia("(pointer: coarse)").matches;
}

function isURL(text) {
    return URL.canParse(text);
}

function isValidImageList(files) {
    return Boolean(files) && files.length === 1 && ["image/png", "image/gif", "image/jpeg", "image/webp"].includes(files[0].type);
}

/** Whether `element` and everything around it is drawn. */
function uiElementIsVisible(element) {
    return element === document || Boolean(element && element.getClientRects().length);
}

/** Whether a part of `element` is inside of the window. */
function uiElementInSight(element) {
    const box = element.getBoundingClientRect();
    return box.top < window.innerHeight && box.bottom > 0 && box.height > 0;
}

/** GET `url` with `data` as its query; `handler` gets the answer's JSON, `errorHandler` is called otherwise. */
function requestGet(url, data, handler, errorHandler) {
    const address = new URL(url, document.baseURI);
    for (const [key, value] of Object.entries(data || {})) {
        address.searchParams.set(key, value);
    }
    fetch(address, {credentials: "same-origin"})
        .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`status ${response.status}`))))
        .then(handler)
        .catch((error) => (errorHandler || (() => {}))(error));
}

/** Wait until `condition()` holds, or `timeout` ms are over. */
async function sleepUntil(condition, timeout) {
    const end = performance.now() + timeout;
    while (!condition() && performance.now() < end) {
        await new Promise((done) => setTimeout(done, 20));
    }
    return Boolean(condition());
}

function executeCallbacks(queue, argument) {
    runUiCallbacks(queue, argument);
}

/** Put the style sheet `css` into the page under the id `key`, or take it away. */
function toggleCss(key, css, enable) {
    let style = document.getElementById(key);
    if (enable && !style) {
        style = document.createElement("style");
        style.id = key;
        document.head.append(style);
    }
    if (style) {
        style.textContent = enable ? css : "";
        style.disabled = !enable;
    }
}

// ---- tabs by number, as handlers of the old page wanted them ----

/** The number of the tab that is shown in the tabs element with the id `tabname`. */
function get_tab_index(tabname) {
    const buttons = Array.from(gradioApp().querySelectorAll(`#${CSS.escape(tabname)} > .tab-wrapper > .tab-nav > button`));
    return Math.max(0, buttons.findIndex((button) => button.classList.contains("selected")));
}

/** `args` with the number of the shown tab of `tabId` in front. */
function create_tab_index_args(tabId, args) {
    const result = Array.from(args);
    result[0] = get_tab_index(tabId);
    return result;
}

function get_img2img_tab_index() {
    const result = create_submit_args(arguments);
    result.splice(-2);
    result[0] = get_tab_index("mode_img2img");
    return result;
}

/** Show the inner tab number `number` of img2img. */
function switch_to_img2img_tab(number) {
    switchToTab("img2img");
    const button = gradioApp().querySelectorAll("#mode_img2img > .tab-wrapper > .tab-nav > button")[number];
    if (button) {
        button.click();
    }
}

/** Swap width and height of `tabname`. */
function switchWidthHeight(tabname) {
    const [width, height] = ["width", "height"].map((side) => gradioApp().querySelector(`#${tabname}_${side} input[type=number]`).value);
    setInputValue(`${tabname}_width`, height);
    setInputValue(`${tabname}_height`, width);
    return [];
}

/** Ask whether the prompt shall be emptied. */
function confirm_clear_prompt(prompt, negativePrompt) {
    return window.confirm("Delete prompt?") ? ["", ""] : [prompt, negativePrompt];
}

function setSubmitButtonsVisibility(tabname, showInterrupt, showSkip, showInterrupting) {
    showSubmitButtons(tabname, !(showInterrupt || showSkip || showInterrupting));
    if (showInterrupting) {
        showSubmitInterruptingPlaceholder(tabname);
    }
}

/** By tab: the prompt field that was written in last. */
var activePromptTextarea = {};

document.addEventListener("focusin", (event) => {
    const row = event.target.closest ? event.target.closest("#txt2img_prompt, #txt2img_neg_prompt, #img2img_prompt, #img2img_neg_prompt") : null;
    if (row && event.target.tagName === "TEXTAREA") {
        activePromptTextarea[row.id.split("_")[0]] = event.target;
    }
});

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        activePromptTextarea[tab] = gradioApp().querySelector(`#${tab}_prompt textarea`);
    }
});
