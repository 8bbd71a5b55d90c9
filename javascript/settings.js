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
