// The Queue tab: the jobs that run, wait and have ended; moving, ending and repeating them. And putting a job into the queue without waiting for it.
"use strict";

var QUEUE_REFRESH_MS = 1000;
var OWN_TASKS_KEPT = 64;
var queueTimer = null;

/** Task ids that this browser has started; behind a login the server shows and changes only these jobs for it. */
function ownTasks() {
    try {
        return JSON.parse(localGet("own_tasks", "[]")).slice(-OWN_TASKS_KEPT);
    } catch (error) {
        return [];
    }
}

function noteOwnTask(taskId) {
    localSet("own_tasks", JSON.stringify([...ownTasks(), taskId].slice(-OWN_TASKS_KEPT)));
}

function sayInQueue(text) {
    const said = gradioApp().getElementById("queue_said");
    said.textContent = text;
    said.hidden = !text;
}

async function askQueue(action, values = {}, method = "GET") {
    return askPage("webui_queue", action, {...values, own: ownTasks()}, method, sayInQueue);
}

// ---- the table ----

function stateText(job) {
    const took = job.seconds === null ? "" : ` ${formatTime(job.seconds)}`;
    if (job.state === "running") {
        const left = job.eta ? `, ${formatTime(job.eta)} left` : "";
        return `running ${Math.round((job.progress || 0) * 100)}%${left}`;
    }
    return `${job.state}${took}`;
}

function queueButton(sign, title, action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    button.title = title;
    button.setAttribute("aria-label", title);
    button.addEventListener("click", action);
    return button;
}

function queueActions(job) {
    const act = (action, values) => async () => {
        await askQueue(action, {number: job.number, ...values}, "POST");
        refreshQueue();
    };
    const buttons = [];
    if (job.own && job.state === "waiting") {
        buttons.push(queueButton("↑", `Job ${job.number}: one place forward`, act("move", {places: -1})));
        buttons.push(queueButton("↓", `Job ${job.number}: one place back`, act("move", {places: 1})));
    }
    if (job.own && (job.state === "waiting" || job.state === "running")) {
        buttons.push(queueButton("✕", `${job.state === "waiting" ? "Cancel" : "Interrupt"} job ${job.number}`, act("end", {})));
    }
    if (job.can_repeat) {
        buttons.push(queueButton("↻", `Repeat job ${job.number}`, () => repeatJob(job.number)));
    }
    return buttons;
}

function queueRow(job) {
    const row = document.createElement("tr");
    row.className = `job-${job.state}`;
    row.dataset.number = job.number;
    const texts = [String(job.number), job.tab, job.label, stateText(job)];
    row.append(...texts.map((text) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        return cell;
    }));
    row.children[2].title = job.label;
    row.children[3].title = job.error;
    const actions = document.createElement("td");
    actions.className = "job-actions";
    actions.append(...queueActions(job));
    row.append(actions);
    return row;
}

function drawQueue(jobs) {
    const body = gradioApp().getElementById("queue_jobs");
    const focused = document.activeElement && body.contains(document.activeElement) ? document.activeElement.title : null;
    body.replaceChildren(...jobs.map(queueRow));
    if (focused) {
        Array.from(body.querySelectorAll("button")).find((button) => button.title === focused)?.focus();
    }
    gradioApp().getElementById("queue_nothing").hidden = jobs.some((job) => job.state === "waiting");
}

async function refreshQueue() {
    clearTimeout(queueTimer);
    const answer = await askQueue("jobs");
    if (answer) {
        drawQueue(answer.jobs);
    }
    const body = gradioApp().getElementById("queue_jobs");
    clearTimeout(queueTimer);
    if (uiElementIsVisible(body) || uiElementIsVisible(body.closest("table"))) {
        queueTimer = setTimeout(refreshQueue, QUEUE_REFRESH_MS);
    }
}

/** Queue a job again; its pictures appear in its tab when nothing else is waited for there. */
async function repeatJob(number) {
    const taskId = randomId();
    noteOwnTask(taskId);
    const answer = await askQueue("repeat", {number: number, task_id: taskId}, "POST");
    if (answer && ["txt2img", "img2img"].includes(answer.tab) && !taskEndFunctions[answer.tab]) {
        localSet(`${answer.tab}_task_id`, taskId);
        gradioApp().getElementById(`${answer.tab}_restore_progress`)?.click();
    }
    refreshQueue();
}

onUiTabChange(() => {
    const content = get_uiCurrentTabContent();
    if (content && content.id === "tab_queue") {
        sleepUntil(() => gradioApp().getElementById("queue_jobs"), 10000).then(refreshQueue);
    }
});

// ---- putting a job into the queue ----

/** The arguments of a click on the queue button. */
function enqueueTask(...args) {
    const result = create_submit_args(args);
    result[0] = randomId();
    noteOwnTask(result[0]);
    return result;
}

document.addEventListener("keydown", (event) => {
    const tab = currentGenerationTab();
    if (tab && event.key === "Enter" && event.shiftKey && (event.ctrlKey || event.metaKey) && !event.isComposing) {
        event.preventDefault();
        event.stopImmediatePropagation();
        gradioApp().getElementById(`${tab}_enqueue`).click();
    }
}, true);
