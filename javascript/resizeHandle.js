// The bar between settings and results: dragged or moved with the arrow keys; a double click puts it back. The browser keeps its place.
"use strict";

var RESIZE_MIN_PX = 320;
var RESIZE_STEP_PX = 24;

function resizeKey(row) {
    const tab = row.closest("[id^=tab_]");
    return `resize_${tab ? tab.id : row.id}`;
}

function setLeftWidth(row, width) {
    const left = row.firstElementChild;
    const limit = row.clientWidth - RESIZE_MIN_PX;
    const wanted = Math.round(Math.min(limit, Math.max(RESIZE_MIN_PX, width)));
    left.style.setProperty("flex", `0 0 ${wanted}px`, "important");
    row.querySelector(":scope > .resize-handle").setAttribute("aria-valuenow", String(wanted));
    return wanted;
}

function resetLeftWidth(row) {
    row.firstElementChild.style.removeProperty("flex");
    localRemove(resizeKey(row));
}

function connectHandle(row, handle) {
    const keep = (width) => localSet(resizeKey(row), String(setLeftWidth(row, width)));
    let grip = null;
    handle.addEventListener("pointerdown", (event) => {
        grip = event.clientX - row.firstElementChild.getBoundingClientRect().width;
        handle.setPointerCapture(event.pointerId);
        event.preventDefault();
        handle.focus();
    });
    handle.addEventListener("pointermove", (event) => {
        if (grip !== null) {
            keep(event.clientX - grip);
        }
    });
    handle.addEventListener("pointerup", () => {
        grip = null;
    });
    handle.addEventListener("dblclick", () => resetLeftWidth(row));
    handle.addEventListener("keydown", (event) => {
        const step = {ArrowLeft: -RESIZE_STEP_PX, ArrowRight: RESIZE_STEP_PX}[event.key];
        if (step) {
            event.preventDefault();
            keep(row.firstElementChild.getBoundingClientRect().width + step);
        }
    });
}

function setupResizeHandle(row) {
    if (row.children.length !== 2 || row.querySelector(":scope > .resize-handle")) {
        return;
    }
    const handle = document.createElement("div");
    handle.className = "resize-handle";
    handle.tabIndex = 0;
    handle.title = "Drag, or use the arrow keys; a double click puts it back";
    handle.setAttribute("role", "separator");
    handle.setAttribute("aria-orientation", "vertical");
    handle.setAttribute("aria-label", "Width of the settings");
    handle.setAttribute("aria-valuemin", String(RESIZE_MIN_PX));
    handle.setAttribute("aria-valuenow", String(Math.round(row.firstElementChild.getBoundingClientRect().width)));
    row.insertBefore(handle, row.children[1]);
    connectHandle(row, handle);
    const kept = Number(localGet(resizeKey(row), ""));
    if (kept && row.clientWidth > 2 * RESIZE_MIN_PX) {
        setLeftWidth(row, kept);
    }
}

function setupAllResizeHandles() {
    for (const row of gradioApp().querySelectorAll(".resize-handle-row")) {
        if (row.clientWidth) {
            setupResizeHandle(row);
        }
    }
}

onUiLoaded(setupAllResizeHandles);
onUiTabChange(setupAllResizeHandles);
