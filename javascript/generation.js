// The Generate, Interrupt and Skip buttons: request data of a click, which buttons show while a task runs, keys, and progress that survives a reload.
"use strict";

var taskEndFunctions = {}; // by tab: ends the display of the running task

/** Show Generate (`show` true) or Interrupt and Skip. */
function showSubmitButtons(tab, show) {
    const box = gradioApp().getElementById(`${tab}_generate_box`);
    if (box) {
        box.classList.toggle("generating", !show);
        box.classList.remove("interrupting");
    }
}

function showSubmitInterruptingPlaceholder(tab) {
    const box = gradioApp().getElementById(`${tab}_generate_box`);
    if (box) {
        box.classList.add("interrupting");
    }
}

function showRestoreProgressButton(tab, show) {
    const button = gradioApp().getElementById(`${tab}_restore_progress`);
    if (button) {
        button.classList.toggle("shown", show);
    }
}

/** The arguments of a click, as sent to the server. */
function create_submit_args(args) {
    return Array.from(args);
}

function followTask(tab, taskId) {
    if (taskEndFunctions[tab]) {
        taskEndFunctions[tab]();
    }
    showSubmitButtons(tab, false);
    localSet(`${tab}_task_id`, taskId);
    const container = gradioApp().getElementById(`${tab}_gallery_container`);
    taskEndFunctions[tab] = requestProgress(taskId, container, container, () => {
        delete taskEndFunctions[tab];
        showSubmitButtons(tab, true);
    });
}

function submitTask(tab, args) {
    const taskId = randomId();
    noteOwnTask(taskId);
    followTask(tab, taskId);
    const result = create_submit_args(args);
    result[0] = taskId;
    return result;
}

function submit(...args) {
    return submitTask("txt2img", args);
}

function submit_img2img(...args) {
    return submitTask("img2img", args);
}

function submit_extras(...args) {
    return submitTask("extras", args);
}

/** Like submit(); the second argument is the index of the selected picture. */
function submit_txt2img_upscale(...args) {
    const result = submitTask("txt2img", args);
    result[1] = selected_gallery_index();
    return result;
}

/** The server has answered the click: end the progress display. */
function taskAnswered(tab) {
    localRemove(`${tab}_task_id`);
    showRestoreProgressButton(tab, false);
    if (taskEndFunctions[tab]) {
        taskEndFunctions[tab]();
    }
    showSubmitButtons(tab, true);
    setTimeout(notifyOfPictures); // when the pictures are drawn
}

function taskOf(tab) {
    return [localGet(`${tab}_task_id`, "")];
}

function interruptPressed(tab) {
    showSubmitInterruptingPlaceholder(tab);
    return taskOf(tab);
}

/** Reconnect to a task that was running before the page was reloaded. */
function restoreProgress(tab) {
    showRestoreProgressButton(tab, false);
    const taskId = localGet(`${tab}_task_id`, "");
    if (taskId) {
        followTask(tab, taskId);
    }
    return [taskId];
}

function offerToRestore(tab) {
    const taskId = localGet(`${tab}_task_id`, "");
    if (!taskId) {
        return;
    }
    request(
        serverUrl("internal/progress"),
        {id_task: taskId, live_preview: false},
        (answer) => {
            const known = answer.active || answer.queued || answer.completed;
            showRestoreProgressButton(tab, known);
            if (!known) {
                localRemove(`${tab}_task_id`);
            }
        },
        () => {},
    );
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        showRestoreProgressButton(tab, false);
        offerToRestore(tab);
    }
});

// ---- keys: Ctrl+Enter generates, Alt+Enter skips, Esc interrupts ----

function isShown(element) {
    return Boolean(element && element.getClientRects().length);
}

function pressIfShown(id) {
    const button = gradioApp().getElementById(id);
    if (isShown(button)) {
        button.click();
        return true;
    }
    return false;
}

document.addEventListener("keydown", (event) => {
    const tab = currentGenerationTab();
    if (!tab || event.isComposing) {
        return;
    }
    let handled = false;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.shiftKey) {
        handled = pressIfShown(`${tab}_generate`);
    } else if (event.key === "Enter" && event.altKey) {
        handled = pressIfShown(`${tab}_skip`);
    } else if (event.key === "Escape" && !gradioApp().querySelector("[role=listbox], dialog[open], .global-popup, #lightboxModal.shown")) {
        handled = pressIfShown(`${tab}_interrupt`);
    }
    if (handled) {
        event.preventDefault();
    }
}, true);
