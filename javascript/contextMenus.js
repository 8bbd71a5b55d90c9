// Menus on a right click: extensions add theirs to any element by its selector; Generate has "Generate forever".
"use strict";

var contextMenuEntries = new Map(); // id -> {selector, name, action}

/** Add the entry `name` to the menu of what `targetElementSelector` finds; `entryFunction` is called when it is chosen. Returns the entry's id. */
function appendContextMenuOption(targetElementSelector, entryName, entryFunction) {
    const id = randomId();
    contextMenuEntries.set(id, {selector: targetElementSelector, name: entryName, action: entryFunction});
    return id;
}

function removeContextMenuOption(id) {
    contextMenuEntries.delete(id);
}

/** Kept for extensions that call it after adding entries; the menus are there from the start. */
function addContextMenuEventListener() {
    document.addEventListener("contextmenu", openContextMenu);
}

function contextMenuInit() {
    return [appendContextMenuOption, removeContextMenuOption, addContextMenuEventListener];
}

function closeContextMenu() {
    const menu = document.getElementById("context-menu");
    if (menu) {
        menu.remove();
    }
}

function entriesFor(element) {
    return Array.from(contextMenuEntries.values()).filter((entry) => element.closest(entry.selector));
}

function openContextMenu(event) {
    closeContextMenu();
    const entries = event.target.closest ? entriesFor(event.target) : [];
    if (!entries.length) {
        return;
    }
    event.preventDefault();
    const menu = document.createElement("nav");
    menu.id = "context-menu";
    menu.setAttribute("role", "menu");
    for (const entry of entries) {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("role", "menuitem");
        button.textContent = entry.name;
        button.addEventListener("click", () => {
            closeContextMenu();
            runUiCallbacks([entry.action]);
        });
        menu.append(button);
    }
    document.body.append(menu);
    menu.style.left = `${Math.max(0, Math.min(event.clientX, window.innerWidth - menu.offsetWidth - 4))}px`;
    menu.style.top = `${Math.max(0, Math.min(event.clientY, window.innerHeight - menu.offsetHeight - 4))}px`;
    menu.firstElementChild.focus();
}

addContextMenuEventListener();
document.addEventListener("click", closeContextMenu);
document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.getElementById("context-menu")) {
        closeContextMenu();
        event.stopImmediatePropagation(); // Esc would end the job too
    }
}, true);

// ---- generate forever ----

var GENERATE_FOREVER_MS = 500;
var generateForeverTimers = {}; // by tab

/** Press Generate of `tab` again whenever it is free. */
function generateForever(tab) {
    cancelGenerateForever(tab);
    const press = () => pressIfShown(`${tab}_generate`);
    press();
    generateForeverTimers[tab] = setInterval(press, GENERATE_FOREVER_MS);
}

function cancelGenerateForever(tab) {
    clearInterval(generateForeverTimers[tab]);
    delete generateForeverTimers[tab];
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        for (const button of ["generate", "interrupt", "skip"]) {
            appendContextMenuOption(`#${tab}_${button}`, "Generate forever", () => generateForever(tab));
            appendContextMenuOption(`#${tab}_${button}`, "Cancel generate forever", () => cancelGenerateForever(tab));
        }
    }
});
