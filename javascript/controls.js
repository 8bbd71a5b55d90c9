// Small behaviors of controls: accordions with a checkbox, seeds, the unused negative prompt.
"use strict";

// ---- accordion with a checkbox: the feature is on while it is open ----

function inputAccordionParts(accordionId) {
    const accordion = gradioApp().getElementById(accordionId);
    return {
        accordion: accordion,
        checkbox: gradioApp().querySelector(`#${CSS.escape(accordionId)}-checkbox input`),
        visible: gradioApp().getElementById(`${accordionId}-visible-checkbox`),
        header: accordion ? accordion.querySelector(":scope > .label-wrap") : null,
    };
}

function accordionIsOpen(header) {
    return header.classList.contains("open");
}

/** Set the accordion `accordionId` to the state `checked`: open and on, or closed and off. */
function inputAccordionChecked(accordionId, checked) {
    const {visible, header} = inputAccordionParts(accordionId);
    if (visible) {
        visible.checked = checked;
    }
    if (header && accordionIsOpen(header) !== Boolean(checked)) {
        header.click();
    }
}

function setupInputAccordion(accordion) {
    const {checkbox, header} = inputAccordionParts(accordion.id);
    if (!checkbox || !header) {
        return;
    }
    const visible = document.createElement("input");
    visible.type = "checkbox";
    visible.checked = checkbox.checked;
    visible.id = `${accordion.id}-visible-checkbox`;
    visible.className = "input-accordion-checkbox";
    visible.title = "On while it is open";
    header.insertBefore(visible, header.firstChild);
    const extra = gradioApp().getElementById(`${accordion.id}-extra`);
    if (extra) {
        header.insertBefore(extra, header.lastElementChild);
    }
    if (accordionIsOpen(header) !== checkbox.checked) {
        header.click();
    }
    // The framework opens it again if its tab is drawn late; only a click on the header shows what the user wants.
    let wasPressed = false;
    header.addEventListener("click", () => {
        wasPressed = true;
    });
    const follow = () => {
        const open = accordionIsOpen(header);
        const hidden = inputAccordionParts(accordion.id).checkbox;
        if (hidden && hidden.checked !== open) {
            (wasPressed ? hidden : header).click();
        }
        wasPressed = false;
        visible.checked = hidden ? hidden.checked : open;
    };
    new MutationObserver(follow).observe(header, {attributes: true, attributeFilter: ["class"]});
    visible.addEventListener("click", (event) => {
        event.stopPropagation();
        if (accordionIsOpen(header) !== visible.checked) {
            header.click();
        }
    });
    accordion.classList.add("input-accordion-ready");
}

onUiLoaded(() => {
    const setup = () => {
        for (const accordion of gradioApp().querySelectorAll(".input-accordion:not(.input-accordion-ready)")) {
            setupInputAccordion(accordion);
        }
    };
    setup();
    onUiUpdate(setup);
});

// ---- showing and hiding parts, seeds, negative prompt ----

/** Show or hide the container with the id `elementId`. */
function showPart(elementId, shown) {
    const part = gradioApp().getElementById(elementId);
    if (part) {
        part.classList.toggle("hidden-part", !shown);
    }
}

var valuesShownAtFirst = [];

/** Remember what controls show while the server is asked for their first values. */
function rememberShownValues(...shown) {
    valuesShownAtFirst = shown;
    return shown;
}

/** The server's first values, a list as JSON with null for "none", for the controls that still show what they were drawn with; the others keep theirs. */
function firstValuesOfUntouched(text, ...shown) {
    const first = JSON.parse(text || "[]");
    setTimeout(restoreKeptValues); // when these are shown
    return shown.map((value, index) => (value === valuesShownAtFirst[index] ? first[index] ?? value : value));
}

/** Count the tokens of all prompts again: the selected checkpoint, and with it the vocabulary, may be another one. */
function recountTokens() {
    for (const tab of ["txt2img", "img2img"]) {
        for (const infix of ["", "negative_"]) {
            gradioApp().getElementById(`${tab}_${infix}token_button`)?.click();
        }
    }
}

/** Set the number field `elementId` to -1: a new seed each time. */
function setRandomSeed(elementId) {
    setInputValue(elementId, "-1");
    return [];
}

/** Show that the negative prompt of `tab` has no effect (CFG scale 1). */
function markNegativePromptUnused(tab, unused) {
    const row = gradioApp().getElementById(`${tab}_neg_prompt_row`);
    if (row) {
        row.classList.toggle("unused-prompt", Boolean(unused));
        row.title = unused ? "The negative prompt has no effect while CFG Scale is 1" : "";
    }
}
