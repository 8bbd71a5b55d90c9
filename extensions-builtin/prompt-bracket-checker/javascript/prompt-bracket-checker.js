"use strict";
/* Prompt bracket checker: a token counter turns red and says why when its prompt's brackets do not match. An escaped bracket (\() is text. */

const BRACKET_PAIRS = [["(", ")", "round"], ["[", "]", "square"], ["{", "}", "curly"]];

/** What is wrong with the brackets of `text`, a sentence for each kind: a pair in the wrong order counts as two that are alone. */
function findBracketFaults(text) {
    const plain = text.replace(/\\[\s\S]/g, "");
    return BRACKET_PAIRS.map(([open, close, kind]) => {
        let depth = 0;
        let unopened = 0;
        for (const character of plain) {
            if (character === open) {
                depth += 1;
            } else if (character === close && depth > 0) {
                depth -= 1;
            } else if (character === close) {
                unopened += 1;
            }
        }
        const faults = [];
        if (depth) {
            faults.push(`${depth} ${kind} bracket${depth === 1 ? "" : "s"} ${open} without ${close}`);
        }
        if (unopened) {
            faults.push(`${unopened} ${kind} bracket${unopened === 1 ? "" : "s"} ${close} without ${open}`);
        }
        return faults.join(", ");
    }).filter(Boolean);
}

function checkBrackets(textArea, counter) {
    const faults = findBracketFaults(textArea.value);
    counter.title = faults.join("\n");
    counter.classList.toggle("error", faults.length > 0);
}

function setupBracketChecking(promptId, counterId) {
    const textArea = gradioApp().querySelector(`#${promptId} textarea`);
    const counter = gradioApp().getElementById(counterId);
    if (textArea && counter) {
        textArea.addEventListener("input", () => checkBrackets(textArea, counter));
        checkBrackets(textArea, counter);
    }
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        setupBracketChecking(`${tab}_prompt`, `${tab}_token_counter`);
        setupBracketChecking(`${tab}_neg_prompt`, `${tab}_negative_token_counter`);
    }
});

Object.assign(window, {checkBrackets, setupBracketChecking});
