// The Settings tab: going to a setting that a search found.
"use strict";

const SETTING_WAIT_TRIES = 40;
const SETTING_WAIT_MS = 50;

/** Open the page `tabId` of the settings and show the control `elementId` on it. */
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

const RESTART_POLL_MS = 500;

/** The page's server is about to start anew: say so, wait for it and load the page again. */
function restart_reload() {
    const note = document.createElement("div");
    note.className = "restart-note";
    note.textContent = "Reloading…";
    document.body.append(note);
    const waitFor = (isUp, then) => {
        fetch(serverUrl("internal/ping"), {cache: "no-store"})
            .then((response) => response.ok, () => false)
            .then((up) => (up === isUp ? then() : setTimeout(() => waitFor(isUp, then), RESTART_POLL_MS)));
    };
    // a quick restart may be over before it is noticed
    const giveUp = setTimeout(() => window.location.reload(), 20000);
    waitFor(false, () => waitFor(true, () => {
        clearTimeout(giveUp);
        window.location.reload();
    }));
    return [];
}
