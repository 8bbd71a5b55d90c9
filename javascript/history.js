// The History tab: pictures of the outputs folder as pages of thumbnails; search, stars, compare two, trash. Its frame comes from the server.
"use strict";

var HISTORY_PAGE_SIZE = 60;
var HISTORY_SEARCH_MS = 250;
var HISTORY_LOOK_AGAIN_MS = 1500;
var historyState = {pictures: [], selected: [], current: null, page: 1, total: 0, trash: false, asked: 0};

function historyPart(name) {
    return gradioApp().getElementById(`history_${name}`);
}

/** Ask the server; what it refuses is shown. `values` may hold lists. */
async function askHistory(action, values = {}, method = "GET") {
    return askPage("webui_history", action, values, method, (text) => sayInHistory(text));
}

/** GET or POST `prefix/action` with `values` as query; null, with `say` called, when the server refuses. */
async function askPage(prefix, action, values, method, say) {
    const address = new URL(serverUrl(`${prefix}/${action}`));
    for (const [name, value] of Object.entries(values)) {
        [value].flat().forEach((one) => address.searchParams.append(name, one));
    }
    try {
        const response = await fetch(address, {method: method, credentials: "same-origin"});
        const answer = await response.json();
        if (response.ok) {
            say("");
            return answer;
        }
        say(typeof answer.detail === "string" ? answer.detail : `The server refused it (status ${response.status}).`);
    } catch (error) {
        say("The server does not answer.");
    }
    return null;
}

function sayInHistory(text) {
    historyPart("said").textContent = text;
    historyPart("said").hidden = !text;
}

function historyQuestion() {
    return {
        text: historyPart("search").value.trim().slice(0, 1000),
        folder: historyPart("folder").value,
        stars: historyPart("stars").checked,
        oldest: historyPart("order").value === "oldest",
        offset: (historyState.page - 1) * HISTORY_PAGE_SIZE,
        count: HISTORY_PAGE_SIZE,
    };
}

// ---- drawing ----

async function loadHistory(page = historyState.page, look = false) {
    historyState.page = Math.max(1, page);
    historyState.asked += 1;
    const asked = historyState.asked;
    const answer = await askHistory("page", {...historyQuestion(), look: look});
    if (!answer || asked !== historyState.asked) {
        return; // a later question is on its way
    }
    const numPages = Math.max(1, Math.ceil(answer.total / HISTORY_PAGE_SIZE));
    if (historyState.page > numPages) {
        loadHistory(numPages);
        return;
    }
    Object.assign(historyState, {pictures: answer.pictures, total: answer.total, selected: [], numPages: numPages});
    drawHistory();
    drawFolders(answer.folders);
    if (answer.looking) {
        setTimeout(() => asked === historyState.asked && uiElementIsVisible(historyPart("grid")) && loadHistory(), HISTORY_LOOK_AGAIN_MS);
    }
}

function drawFolders(folders) {
    const select = historyPart("folder");
    const chosen = select.value;
    select.replaceChildren(...["", ...folders.filter(Boolean)].map((name) => new Option(name || "All folders", name)));
    select.value = folders.includes(chosen) ? chosen : "";
}

function thumbAddress(picture) {
    return picture.trashPath === undefined
        ? serverUrl(`webui_history/thumb?number=${picture.number}`)
        : serverUrl(`webui_history/trash_thumb?path=${encodeURIComponent(picture.trashPath)}`);
}

function historyTile(picture) {
    const tile = document.createElement("div");
    tile.className = "history-tile";
    tile.id = `history_tile_${picture.number}`;
    tile.dataset.number = picture.number;
    tile.setAttribute("role", "option");
    tile.setAttribute("aria-selected", "false");
    tile.setAttribute("aria-label", picture.name + (picture.star ? ", with a star" : ""));
    tile.title = picture.path;
    tile.classList.toggle("with-star", Boolean(picture.star));
    const image = document.createElement("img");
    image.loading = "lazy";
    image.decoding = "async";
    image.alt = "";
    image.src = thumbAddress(picture);
    image.addEventListener("error", () => tile.classList.add("unreadable"));
    tile.append(image);
    return tile;
}

function drawHistory() {
    const {pictures, page, numPages, total, trash} = historyState;
    historyPart("grid").replaceChildren(...pictures.map(historyTile));
    historyPart("count").textContent = trash ? `${pictures.length} in the trash` : `${total} picture${total === 1 ? "" : "s"}, page ${page} of ${numPages}`;
    historyPart("page").value = page;
    historyPart("page").max = numPages;
    historyPart("previous").disabled = trash || page <= 1;
    historyPart("next").disabled = trash || page >= numPages;
    historyPart("empty_trash").hidden = !trash || !pictures.length;
    historyPart("delete").textContent = trash ? "Put back" : "Delete";
    historyPart("viewer").hidden = true;
    historyState.current = null;
    markSelected();
}

function markSelected() {
    for (const tile of historyPart("grid").children) {
        tile.setAttribute("aria-selected", String(historyState.selected.includes(tile.dataset.number)));
        tile.classList.toggle("current", tile.dataset.number === historyState.current);
    }
    historyPart("compare").disabled = historyState.trash || historyState.selected.length !== 2;
    historyPart("delete").disabled = historyState.selected.length === 0;
    gradioApp().getElementById("history_send").classList.toggle("hidden-part", historyState.trash || historyState.current === null);
    if (historyState.current !== null) {
        historyPart("grid").setAttribute("aria-activedescendant", `history_tile_${historyState.current}`);
    }
}

// ---- selecting ----

function pictureByNumber(number) {
    return historyState.pictures.find((picture) => picture.number === number);
}

/** Select a picture and show it large; with `add` in addition to those that are selected, or take it out of them. */
async function selectInHistory(number, add = false) {
    const wasSelected = historyState.selected.includes(number);
    const others = historyState.selected.filter((one) => one !== number);
    historyState.selected = add ? (wasSelected ? others : [...others, number]) : [number];
    historyState.current = number;
    markSelected();
    gradioApp().getElementById(`history_tile_${number}`)?.scrollIntoView({block: "nearest"});
    if (!historyState.trash) {
        await showInHistory(number);
    }
}

async function showInHistory(number) {
    const answer = await askHistory("info", {number: number});
    if (!answer || historyState.current !== number) {
        return;
    }
    const address = serverUrl(`webui_history/picture?number=${number}`);
    historyPart("viewer").hidden = false;
    historyPart("viewer").querySelector(".history-large").src = address;
    historyPart("link").href = address;
    historyPart("name").textContent = `${answer.path} · ${answer.width}×${answer.height} · ${new Date(answer.seconds * 1000).toLocaleString()}`;
    historyPart("infotext").textContent = answer.infotext || "This file contains no parameters.";
    drawStar(answer.star);
}

function drawStar(star) {
    historyPart("star").textContent = star ? "★" : "☆";
    historyPart("star").setAttribute("aria-pressed", String(star));
}

function historySelectedNumber() {
    return historyState.current || "";
}

/** For the full page viewer: how it goes on from a picture of the history. */
function historySwitchFor(picture) {
    if (!picture.closest(".history-viewer")) {
        return null;
    }
    return async (offset) => {
        await stepInHistory(offset);
        showInLightbox(historyPart("viewer").querySelector(".history-large").src);
    };
}

async function stepInHistory(offset) {
    const place = historyState.pictures.findIndex((picture) => picture.number === historyState.current);
    const next = historyState.pictures[Math.min(historyState.pictures.length - 1, Math.max(0, place + offset))];
    if (next) {
        await selectInHistory(next.number);
    }
}

// ---- acting ----

async function toggleStar() {
    const picture = pictureByNumber(historyState.current);
    if (!picture || historyState.trash) {
        return;
    }
    if (await askHistory("star", {number: historyState.selected, on: !picture.star}, "POST")) {
        const star = !picture.star;
        historyState.selected.map(pictureByNumber).forEach((one) => {
            one.star = star;
            gradioApp().getElementById(`history_tile_${one.number}`).classList.toggle("with-star", star);
        });
        drawStar(star);
    }
}

async function deleteOrRestore() {
    const {selected, trash} = historyState;
    if (!selected.length) {
        return;
    }
    const numbers = trash ? {path: selected.map((number) => pictureByNumber(number).trashPath)} : {number: selected};
    await askHistory(trash ? "restore" : "delete", numbers, "POST");
    await (trash ? showTrash() : loadHistory());
    historyPart("grid").focus();
}

async function showTrash() {
    const answer = await askHistory("trash");
    if (answer) {
        const pictures = answer.trash.map((path, index) => ({number: `t${index}`, trashPath: path, path: path, name: path.split("/").pop()}));
        Object.assign(historyState, {pictures: pictures, selected: [], total: pictures.length, numPages: 1});
        drawHistory();
    }
}

async function toggleTrash() {
    historyState.trash = !historyState.trash;
    historyPart("trash").setAttribute("aria-pressed", String(historyState.trash));
    await (historyState.trash ? showTrash() : loadHistory(1, true));
}

async function emptyTrash() {
    if (window.confirm("Delete the pictures in the trash for good?") && await askHistory("empty_trash", {}, "POST")) {
        await showTrash();
    }
}

/** Show the two selected pictures on top of each other; a bar that follows the pointer divides them. */
function compareInHistory() {
    const [below, above] = historyState.selected.map(pictureByNumber);
    if (!below || !above || historyState.trash) {
        return;
    }
    const frame = document.createElement("div");
    frame.className = "history-compare";
    const images = [below, above].map((picture) => {
        const image = document.createElement("img");
        image.src = serverUrl(`webui_history/picture?number=${picture.number}`);
        image.alt = picture.name;
        return image;
    });
    const range = document.createElement("input");
    range.type = "range";
    range.value = "50";
    range.setAttribute("aria-label", "Where the pictures meet");
    const divide = (share) => frame.style.setProperty("--share", `${share}%`);
    range.addEventListener("input", () => divide(range.value));
    frame.addEventListener("pointermove", (event) => {
        const box = images[0].getBoundingClientRect();
        range.value = String(Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
        divide(range.value);
    });
    divide(50);
    frame.append(...images, range);
    popup(frame);
    range.focus();
}

// ---- keys and clicks ----

function historyColumns() {
    return getComputedStyle(historyPart("grid")).gridTemplateColumns.split(" ").length;
}

function historyKey(event) {
    const actions = {
        ArrowLeft: () => stepInHistory(-1),
        ArrowRight: () => stepInHistory(1),
        ArrowUp: () => stepInHistory(-historyColumns()),
        ArrowDown: () => stepInHistory(historyColumns()),
        PageUp: () => historyState.page > 1 && loadHistory(historyState.page - 1),
        PageDown: () => historyState.page < historyState.numPages && loadHistory(historyState.page + 1),
        Delete: deleteOrRestore,
        s: toggleStar,
        c: compareInHistory,
        Enter: () => historyPart("viewer").querySelector(".history-large").click(),
    };
    if (!event.ctrlKey && !event.metaKey && !event.altKey && event.key in actions) {
        event.preventDefault();
        actions[event.key]();
    }
}

function setupHistory() {
    const grid = historyPart("grid");
    if (!grid || grid.dataset.isConnected) {
        return;
    }
    grid.dataset.isConnected = "yes";
    let timer = null;
    const again = () => {
        clearTimeout(timer);
        timer = setTimeout(() => loadHistory(1), HISTORY_SEARCH_MS);
    };
    historyPart("search").addEventListener("input", again);
    for (const name of ["folder", "order", "stars"]) {
        historyPart(name).addEventListener("change", () => loadHistory(1));
    }
    historyPart("page").addEventListener("change", (event) => loadHistory(Number(event.target.value) || 1));
    const clicks = {
        refresh: () => loadHistory(historyState.page, true),
        previous: () => loadHistory(historyState.page - 1),
        next: () => loadHistory(historyState.page + 1),
        compare: compareInHistory,
        delete: deleteOrRestore,
        trash: toggleTrash,
        empty_trash: emptyTrash,
        star: toggleStar,
    };
    Object.entries(clicks).forEach(([name, action]) => historyPart(name).addEventListener("click", action));
    grid.addEventListener("click", (event) => {
        const tile = event.target.closest(".history-tile");
        if (tile) {
            selectInHistory(tile.dataset.number, event.ctrlKey || event.metaKey || event.shiftKey);
            grid.focus({preventScroll: true});
        }
    });
    grid.addEventListener("dblclick", () => historyPart("viewer").querySelector(".history-large").click());
    grid.addEventListener("keydown", historyKey);
    markSelected();
}

/** The tab is shown: look for new pictures. */
function openHistory() {
    setupHistory();
    if (historyPart("grid") && !historyState.trash) {
        loadHistory(historyState.page, true);
    }
}

onUiTabChange(() => {
    const content = get_uiCurrentTabContent();
    if (content && content.id === "tab_history") {
        sleepUntil(() => historyPart("grid"), 10000).then(openHistory);
    }
});
