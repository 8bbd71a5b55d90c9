"use strict";
/* Narrow windows: Generate stands above the pictures, which lie below the settings there, and not next to the prompt far above them. */

let isSetupForMobile = false;

/** Whether the results lie below the settings. */
function resultsAreBelow() {
    return ["txt2img", "img2img"].some((tab) => {
        const settings = gradioApp().getElementById(`${tab}_settings`);
        const results = gradioApp().getElementById(`${tab}_results`);
        return Boolean(settings && results && results.offsetParent && results.getBoundingClientRect().top >= settings.getBoundingClientRect().bottom);
    });
}

function reportWindowSize() {
    const isNarrow = resultsAreBelow();
    if (isNarrow === isSetupForMobile) {
        return;
    }
    isSetupForMobile = isNarrow;
    window.isSetupForMobile = isNarrow;
    for (const tab of ["txt2img", "img2img"]) {
        const results = gradioApp().getElementById(`${tab}_results`);
        const box = gradioApp().getElementById(`${tab}_generate_box`);
        const home = isNarrow ? results : gradioApp().getElementById(`${tab}_actions_column`);
        if (box && home) {
            home.prepend(box);
            results.classList.toggle("mobile", isNarrow);
        }
    }
}

window.addEventListener("resize", reportWindowSize);
onUiTabChange(reportWindowSize);
onUiLoaded(reportWindowSize);

Object.assign(window, {isSetupForMobile, reportWindowSize});
