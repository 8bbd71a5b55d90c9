// Names of the old page's scripts that extensions call or patch, each doing on this page what it did there. What a name does is elsewhere.
// Must not hold any behavior of its own beyond small dialogs.
"use strict";

// ---- generation ----

var txt2img_textarea = null;
var img2img_textarea = null;
var txt2img_gallery = null;
var img2img_gallery = null;
var originalAppTitle = document.title;
var selected_gallery_index_id = -1;

onUiLoaded(() => {
    [txt2img_textarea, img2img_textarea] = ["txt2img", "img2img"].map((tab) => gradioApp().querySelector(`#${tab}_prompt textarea`));
    [txt2img_gallery, img2img_gallery] = ["txt2img", "img2img"].map((tab) => gradioApp().getElementById(`${tab}_gallery`));
});

function regen_txt2img(...args) {
    pressIfShown("txt2img_generate");
    return args;
}

function regen_img2img(...args) {
    pressIfShown("img2img_generate");
    return args;
}

function restoreProgressTxt2img() {
    return restoreProgress("txt2img");
}

function restoreProgressImg2img() {
    return restoreProgress("img2img");
}

function rememberGallerySelection() {
    selected_gallery_index_id = selected_gallery_index();
}

/** Nothing to do: the sizes after hires fix are computed as controls change. */
function onCalcResolutionHires(...args) {
    return args;
}

/** Masks take the size of their picture by themselves. */
function imageMaskResize() {
    return undefined;
}

/** Ask under which name the two prompts are kept as a style. */
function ask_for_style_name(_, promptText, negativePromptText) {
    return [window.prompt("Style name:"), promptText, negativePromptText];
}

// ---- VAE ----

var desiredVAEName = null;

function selectVAE(name) {
    desiredVAEName = name;
    const field = gradioApp().querySelector("#setting_forge_additional_modules input");
    if (field) {
        field.focus();
        setInputValue("setting_forge_additional_modules", name);
        field.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
    }
}

// ---- token counters ----

var promptTokenCountUpdateFunctions = {};

for (const tab of ["txt2img", "img2img"]) {
    promptTokenCountUpdateFunctions[`${tab}_token_button`] = () => update_token_counter(`${tab}_token_button`);
    promptTokenCountUpdateFunctions[`${tab}_negative_token_button`] = () => update_token_counter(`${tab}_negative_token_button`);
}

function update_token_counter(buttonId) {
    const button = gradioApp().getElementById(buttonId);
    if (button) {
        button.click();
    }
}

function update_txt2img_tokens(...args) {
    update_token_counter("txt2img_token_button");
    update_token_counter("txt2img_negative_token_button");
    return args.length === 2 ? args[0] : args;
}

function update_img2img_tokens(...args) {
    update_token_counter("img2img_token_button");
    update_token_counter("img2img_negative_token_button");
    return args.length === 2 ? args[0] : args;
}

function recalculatePromptTokens(name) {
    promptTokenCountUpdateFunctions[name]?.();
}

function recalculate_prompts_txt2img(...args) {
    update_txt2img_tokens();
    return args;
}

function recalculate_prompts_img2img(...args) {
    update_img2img_tokens();
    return args;
}

function toggleTokenCountingVisibility(id, idCounter) {
    const counter = gradioApp().getElementById(idCounter);
    if (counter) {
        counter.style.display = opts.disable_token_counters ? "none" : "";
    }
}

function setupTokenCounting(id, idCounter, idButton) {
    promptTokenCountUpdateFunctions[id] = () => update_token_counter(idButton);
    toggleTokenCountingVisibility(id, idCounter);
}

function runCodeForTokenCounters(run) {
    Object.values(promptTokenCountUpdateFunctions).forEach((update) => (run ? run(update) : update()));
}

onOptionsChanged(() => {
    for (const tab of ["txt2img", "img2img"]) {
        for (const infix of ["", "negative_"]) {
            toggleTokenCountingVisibility(`${tab}_prompt`, `${tab}_${infix}token_counter`);
        }
    }
});

// ---- prompts and networks ----

var re_extranet = /<([^:>]+:[^:>]+):[\d.]+>([^]*)/;
var re_extranet_g = /<([^:>]+:[^:>]+):[\d.]+>/g;
var re_extranet_neg = /\(([^:>]+:[\d.]+)\)/;
var re_extranet_g_neg = /\(([^:>]+:[\d.]+)\)/g;

/** Take `text` (the text of a card) out of the prompt field; false if it is not there. */
function tryToRemoveExtraNetworkFromPrompt(field, text) {
    const without = withoutNetwork(field.value, text);
    if (without !== null) {
        field.value = without;
    }
    return without !== null;
}

/** Extensions replace the prompt by assigning to the field and calling this. */
function updatePromptArea(text, field, isNegative) {
    if (!tryToRemoveExtraNetworkFromPrompt(field, text, isNegative)) {
        field.value += (field.value ? opts.extra_networks_add_text_separator || " " : "") + text;
    }
    updateInput(field);
}

function paneOf(tabname, page) {
    const named = page ? `[data-page="${CSS.escape(page.replace(/_/g, " "))}"]` : "";
    const panes = Array.from(gradioApp().querySelectorAll(`.extra-networks-pane[data-tabname="${tabname}"]${named}`));
    return panes.find(uiElementIsVisible) || panes[0] || null;
}

function pressInPane(tabname, page, selector) {
    paneOf(tabname, page)?.querySelector(selector)?.click();
}

var extraNetworksApplyFilter = {};
var extraNetworksApplySort = {};
var extraPageUserMetadataEditors = {};

onUiLoaded(() => {
    const fill = () => {
        for (const pane of gradioApp().querySelectorAll(".extra-networks-pane")) {
            const name = `${pane.dataset.tabname}_${pane.dataset.page.replace(/ /g, "_")}`;
            extraNetworksApplyFilter[name] = () => applyExtraNetworkFilter(pane);
            extraNetworksApplySort[name] = () => applyExtraNetworkSort(pane);
        }
    };
    fill();
    onAfterUiUpdate(fill);
});

function setupExtraNetworksForTab(tabname) {
    for (const pane of gradioApp().querySelectorAll(`.extra-networks-pane[data-tabname="${tabname}"]`)) {
        applyExtraNetworkSort(pane);
        applyExtraNetworkFilter(pane);
    }
}

function setupExtraNetworks() {
    setupExtraNetworksForTab("txt2img");
    setupExtraNetworksForTab("img2img");
}

function extraNetworksSearchButton(tabname, page, event) {
    const pane = paneOf(tabname, page);
    const button = event.target.closest("button");
    pane.querySelector(".extra-search").value = button.dataset.folder || button.textContent.trim();
    applyExtraNetworkFilter(pane);
}

function extraNetworksControlSortOnClick(event, tabname, page) {
    const order = event.currentTarget.dataset.sortmode || event.currentTarget.dataset.sort;
    pressInPane(tabname, page, `.sort[data-sort="${CSS.escape(order || "name")}"]`);
}

function extraNetworksControlSortDirOnClick(event, tabname, page) {
    pressInPane(tabname, page, ".sort-direction");
}

function extraNetworksControlTreeViewOnClick(event, tabname, page) {
    pressInPane(tabname, page, ".tree-switch");
}

function extraNetworksControlRefreshOnClick(event, tabname, page) {
    pressInPane(tabname, page, ".refresh");
}

function extraNetworksTreeProcessDirectoryClick(event, button, tabname, page) {
    pressInPane(tabname, page, `.folder[data-folder="${CSS.escape(button.dataset.path || button.dataset.folder || "")}"]`);
}

function extraNetworksTreeProcessFileClick(event, button, tabname, page) {
    const name = button.dataset.name || button.textContent.trim();
    paneOf(tabname, page)?.querySelector(`.card[data-name="${CSS.escape(name)}"]`)?.click();
}

function extraNetworksTreeOnClick(event, tabname, page) {
    const button = event.currentTarget;
    (button.dataset.name ? extraNetworksTreeProcessFileClick : extraNetworksTreeProcessDirectoryClick)(event, button, tabname, page);
}

function extraNetworksCopyCardPath(event, path) {
    navigator.clipboard.writeText(path);
    event?.stopPropagation();
}

function extraNetworksFlattenMetadata(metadata) {
    const flat = {};
    const walk = (value, name) => {
        if (value !== null && typeof value === "object") {
            Object.entries(value).forEach(([key, inner]) => walk(inner, name ? `${name}/${key}` : key));
        } else {
            flat[name] = value;
        }
    };
    walk(metadata, "");
    return flat;
}

function extraNetworksRequestMetadata(event, page, name) {
    fetch(cardsUrl("metadata", {page: page, item: name}), {credentials: "same-origin"})
        .then((response) => response.json())
        .then((answer) => extraNetworksShowMetadata(answer.metadata || "The file contains no metadata."));
    event?.stopPropagation();
}

function extraNetworksEditUserMetadata(event, tabname, page, name) {
    const pane = paneOf(tabname, page);
    const card = pane && paneCards(pane).find((one) => one.dataset.name === name);
    if (card) {
        editUserMetadata(pane, card);
    }
    event?.stopPropagation();
}

/** Make the selected picture the preview of the card that is being edited. */
function saveCardPreview(event, tabname) {
    const button = Array.from(gradioApp().querySelectorAll(`[id^="${tabname}_"][id$="_replace_preview"]`)).find(uiElementIsVisible);
    button?.click();
    event?.preventDefault();
}

function extraNetworksTabSelected(tabname) {
    setupExtraNetworksForTab(tabname);
}

function extraNetworksUnrelatedTabSelected(tabname) {
    gradioApp().getElementById(`${tabname}_toprow`)?.scrollIntoView({block: "nearest"});
}

/** The prompts stay above the cards here. */
function extraNetworksMovePromptToTab() {
    return undefined;
}

function extraNetworksShowControlsForPage(tabname, page) {
    const id = page ? `${tabname}_${page}` : null;
    if (id) {
        clickTab(gradioApp().getElementById(`${tabname}_extra_tabs`), id);
    }
}

function clickLoraRefresh() {
    for (const tab of ["txt2img", "img2img"]) {
        gradioApp().getElementById(`${tab}_lora_extra_refresh_internal`)?.click();
    }
}

// ---- dialogs ----

var globalPopup = null;
var globalPopupInner = null;
var storedPopupIds = {};

/** Show the element with the id `id` in a dialog; it goes back to its place when the dialog is closed. */
function popupId(id) {
    const element = gradioApp().getElementById(id);
    if (!element) {
        return;
    }
    storedPopupIds[id] = storedPopupIds[id] || element.parentNode;
    popup(element);
    globalPopup = gradioApp().querySelector(".global-popup");
    globalPopupInner = globalPopup.firstElementChild;
    new MutationObserver((_, observer) => {
        if (!globalPopup.isConnected) {
            storedPopupIds[id].append(element);
            observer.disconnect();
        }
    }).observe(document.body, {childList: true});
}

function createRow(table, cellName, items) {
    const row = document.createElement("tr");
    const cells = items.map((text, index) => {
        const cell = document.createElement(cellName);
        cell.textContent = text;
        if (index === items.length - 1 && typeof text === "string" && /^[\d.]+$/.test(text)) {
            cell.style.textAlign = "right";
        }
        row.append(cell);
        return cell;
    });
    table.append(row);
    return cells;
}

/** Show how long each part of the start took: `path` is "./internal/profile-startup" or another address with {total, records}. */
function showProfile(path, cutoff = 0.05) {
    requestGet(path, {}, (data) => {
        const table = createVisualizationTable(data, cutoff);
        popup(table);
    });
}

function createVisualizationTable(data, cutoff = 0) {
    const table = document.createElement("table");
    table.className = "popup-table";
    createRow(table, "th", ["step", "seconds"]);
    const parts = Object.entries(data.records).sort(([, a], [, b]) => b - a).filter(([, seconds]) => seconds >= cutoff);
    [["total", data.total], ...parts].forEach(([name, seconds]) => createRow(table, "td", [name, Number(seconds).toFixed(3)]));
    return table;
}

// ---- extensions, settings, merger ----

function extensions_apply(disabledList, updateList, disableAll) {
    restart_reload();
    return [disabledList, updateList, disableAll];
}

function extensions_check(...args) {
    return [randomId(), ...args.slice(1)];
}

function config_state_confirm_restore(_, name, type) {
    const asked = name && name !== "Current" && window.confirm(`Restore ${type === "both" ? "program and extensions" : type} as in ${name}?`);
    return [Boolean(asked), name, type];
}

function install_extension_from_index(button, url) {
    button.disabled = true;
    button.textContent = "Installing…";
    setInputValue("extension_to_install", url);
    gradioApp().getElementById("install_extension_button").click();
}

function extensionBoxes() {
    return Array.from(gradioApp().querySelectorAll("#extensions_enabled_list input[type=checkbox]"));
}

function toggle_all_extensions(event) {
    extensionBoxes().filter((box) => box.checked !== event.target.checked).forEach((box) => box.click());
}

/** Keep the box that stands for all in step with the others. */
function toggle_extension() {
    const all = gradioApp().querySelector(".all_extensions_toggle");
    if (all) {
        all.checked = extensionBoxes().every((box) => box.checked);
    }
}

function modelmerger(...args) {
    return [randomId(), ...args.slice(1)];
}

function set_theme(theme) {
    const address = new URL(window.location.href);
    if (!address.searchParams.has("__theme")) {
        address.searchParams.set("__theme", theme);
        window.location.replace(address.href);
    }
}

function settingsShowAllTabs() {
    showAllSettings(true);
}

function settingsShowOneTab() {
    showAllSettings(false);
}

// ---- when things happen ----

var onEditTimers = {};
var uiAfterScriptsCallbacks = [];
var uiAfterScriptsTimeout = null;
var uiAfterUpdateTimeout = null;
var executedOnLoaded = false;
var executedAfterScripts = false;

/** Call `callback` once the page and every extension's script is there. */
function onAfterUiScripts(callback) {
    if (executedAfterScripts) {
        runUiCallbacks([callback]);
    } else {
        uiAfterScriptsCallbacks.push(callback);
    }
}

function scheduleAfterScriptsCallbacks() {
    clearTimeout(uiAfterScriptsTimeout);
    uiAfterScriptsTimeout = setTimeout(() => {
        executedAfterScripts = true;
        runUiCallbacks(uiAfterScriptsCallbacks.splice(0));
    });
}

function scheduleAfterUiUpdateCallbacks() {
    clearTimeout(uiAfterUpdateTimeout);
    uiAfterUpdateTimeout = setTimeout(() => runUiCallbacks(uiAfterUpdateCallbacks), 200);
}

onUiLoaded(() => {
    executedOnLoaded = true;
    scheduleAfterScriptsCallbacks();
});

/** Accordions with a checkbox are set up as they appear; extensions call it for theirs. */
function setupAccordion(accordion) {
    setupInputAccordion(accordion);
}
