// The Settings tab: jumps to a setting found by a search.
"use strict";

var SETTING_WAIT_TRIES = 40;
var SETTING_WAIT_MS = 50;

/** Open the settings page `tabId` and scroll to the control `elementId`. */
function showSetting(tabId, elementId, tries = SETTING_WAIT_TRIES) {
    if (tries === SETTING_WAIT_TRIES) {
        clickTab(gradioApp().querySelector("#settings"), tabId);
    }
    const control = gradioApp().getElementById(elementId);
    if (!control || !control.getClientRects().length) {
        if (tries > 0) {
            setTimeout(() => showSetting(tabId, elementId, tries - 1), SETTING_WAIT_MS);
        }
        return;
    }
    control.scrollIntoView({block: "center"});
    control.classList.add("found-setting");
    setTimeout(() => control.classList.remove("found-setting"), 2500);
}

var RESTART_POLL_MS = 500;

/** The page's server is about to restart: say so, wait until another one answers in its place, and load the page again. */
function restart_reload() {
    const note = document.createElement("div");
    note.className = "restart-note";
    note.textContent = "Reloading…";
    document.body.append(note);
    const known = String((window.gradio_config || {}).app_id);
    const ask = () => {
        fetch(serverUrl("gradio_api/app_id"), {cache: "no-store"})
            .then((response) => (response.ok ? response.json() : {}), () => ({}))
            .then((answer) => (answer.app_id && String(answer.app_id) !== known ? window.location.reload() : setTimeout(ask, RESTART_POLL_MS)));
    };
    ask();
    return [];
}

// ---- all pages at once, and hints ----

var settingsExcludeTabsFromShowAll = {settings_tab_defaults: 1, settings_tab_sysinfo: 1, settings_tab_actions: 1, settings_tab_licenses: 1};
var ALL_SETTINGS_WAIT_MS = 15000;

function settingsPanels() {
    return Array.from(gradioApp().querySelectorAll("#settings > [role=tabpanel]"));
}

/** Show the pages of settings one below the other (`all`), or one at a time. A page that was never shown is built first. */
async function showAllSettings(all) {
    const tabs = gradioApp().getElementById("settings");
    if (all) {
        const buttons = Array.from(tabs.querySelectorAll(":scope > .tab-wrapper [role=tab]"));
        const shown = buttons.find((button) => button.classList.contains("selected"));
        for (const button of buttons) {
            const id = button.getAttribute("aria-controls");
            const stands = () => gradioApp().querySelector(`#${CSS.escape(id)} .block`);
            if (!stands() && !(id in settingsExcludeTabsFromShowAll)) {
                button.click();
                await sleepUntil(stands, ALL_SETTINGS_WAIT_MS);
            }
        }
        shown?.click();
    }
    for (const panel of settingsPanels()) {
        panel.classList.toggle("excluded-from-all", panel.id in settingsExcludeTabsFromShowAll);
        const button = tabs.querySelector(`:scope > .tab-wrapper [role=tab][aria-controls="${panel.id}"]`);
        panel.dataset.title = button ? button.textContent.trim() : "";
    }
    tabs.classList.toggle("all-settings", all);
    gradioApp().getElementById("settings_show_all_pages")?.classList.toggle("hidden-part", all);
    gradioApp().getElementById("settings_show_one_page")?.classList.toggle("hidden-part", !all);
}

/** The name of each setting as its tooltip, for quick settings and the API. */
function settingsHintsSetup() {
    for (const control of gradioApp().querySelectorAll("#settings [id^=setting_]")) {
        const label = control.querySelector("span[data-testid=block-info], label > span");
        if (label && !label.title) {
            label.title = control.id.replace(/^setting_/, "");
        }
    }
}

/** List every setting's name and label in a dialog. */
function settingsHintsShowQuicksettings() {
    requestGet(serverUrl("internal/quicksettings-hint"), {}, (hints) => {
        const table = document.createElement("table");
        table.className = "popup-table";
        hints.forEach((hint) => createRow(table, "td", [hint.name, hint.label]));
        popup(table);
    });
}

onUiLoaded(() => onAfterUiUpdate(settingsHintsSetup));

// ---- tabs without the row of settings above them ----

function hideQuickSettingsWhereUnwanted() {
    const title = (get_uiCurrentTab() || {}).textContent || "";
    const hidden = (opts.tabs_without_quick_settings_bar || []).some((name) => name.toLowerCase() === title.trim().toLowerCase());
    for (const id of ["quicksettings", "quicksettings_more"]) {
        gradioApp().getElementById(id)?.classList.toggle("hidden-part", hidden);
    }
}

onUiTabChange(hideQuickSettingsWhereUnwanted);
onOptionsChanged(hideQuickSettingsWhereUnwanted);
