// Cards of model files: inserting them into the prompt, searching, sorting, folders, descriptions. The server creates the cards.
// Must not know any kind of model.
"use strict";

var desiredCheckpointName = null;

/** Select the checkpoint `name`. */
function selectCheckpoint(name) {
    desiredCheckpointName = name;
    gradioApp().getElementById("change_checkpoint").click();
}

// ---- prompts ----

var lastPromptFields = {};

document.addEventListener("focusin", (event) => {
    const field = event.target.closest("#txt2img_prompt, #txt2img_neg_prompt, #img2img_prompt, #img2img_neg_prompt");
    if (field) {
        lastPromptFields[field.id.split("_")[0]] = field.id;
    }
});

function promptArea(tabname, negative) {
    return gradioApp().querySelector(`#${tabname}_${negative ? "neg_prompt" : "prompt"} textarea`);
}

function escapedForRegex(text) {
    return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

/** `prompt` without the network in `text`, with any multipliers, and without the words after it; null if it is not in the prompt. */
function withoutNetwork(prompt, text) {
    const parts = /^<([^:>]+:[^:>]+)(?::[^>]*)?>([^]*)$/.exec(text);
    const separator = escapedForRegex(opts.extra_networks_add_text_separator || " ");
    if (!parts) {
        const word = new RegExp(`(?:${separator}|^)${escapedForRegex(text)}(?=${separator}|$)`);
        return word.test(prompt) ? prompt.replace(word, "") : null;
    }
    const tag = new RegExp(`(?:${separator})?<${escapedForRegex(parts[1])}(?::[^>]*)?>`);
    if (!tag.test(prompt)) {
        return null;
    }
    const rest = parts[2] ? new RegExp(`(<${escapedForRegex(parts[1])}(?::[^>]*)?>)${escapedForRegex(parts[2])}`) : null;
    return (rest ? prompt.replace(rest, "$1") : prompt).replace(tag, "");
}

function togglePromptText(area, text) {
    const without = withoutNetwork(area.value, text);
    area.value = without === null ? area.value + (area.value ? opts.extra_networks_add_text_separator : "") + text : without;
    updateInput(area);
}

/** Add a card's text to the prompt of `tabname`, or remove it if it is there; same for its negative text and the negative prompt. */
function cardClicked(tabname, textToAdd, textToAddNegative, allowNegativePrompt) {
    if (textToAddNegative) {
        togglePromptText(promptArea(tabname, true), textToAddNegative);
    }
    const negative = allowNegativePrompt && lastPromptFields[tabname] === `${tabname}_neg_prompt`;
    togglePromptText(promptArea(tabname, negative), textToAdd);
}

// ---- which cards are visible, and their order ----

function paneCards(pane) {
    return Array.from(pane.querySelectorAll(".extra-network-cards > .card"));
}

/** Show the cards of the selected folder whose name, path or hash matches every search word. */
function applyExtraNetworkFilter(pane) {
    const words = pane.querySelector(".extra-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const folder = (pane.querySelector(".folder.selected") || {dataset: {folder: ""}}).dataset.folder;
    for (const card of paneCards(pane)) {
        const below = opts.extra_networks_dir_button_function ? card.dataset.folder === folder : `${card.dataset.folder}/`.startsWith(`${folder}/`);
        const inFolder = !folder || below;
        const found = words.every((word) => card.dataset.search.includes(word));
        const kept = Boolean(card.dataset.hidden) && pane.dataset.hiddenModels === "When searched" && !words.length;
        card.classList.toggle("hidden-part", !inFolder || !found || kept);
    }
}

function sortValue(card, key) {
    const value = card.getAttribute(`data-sort-${key}`) || "";
    return key.startsWith("date_") ? Number(value) : value;
}

/** Sort the cards in the selected order. */
function applyExtraNetworkSort(pane) {
    const selected = pane.querySelector(".sort.selected");
    const key = selected ? selected.dataset.sort : "name";
    const sign = pane.querySelector(".sort-direction").dataset.direction === "descending" ? -1 : 1;
    const cards = paneCards(pane);
    cards.sort((a, b) => {
        const [x, y] = [sortValue(a, key), sortValue(b, key)];
        return sign * (typeof x === "number" ? x - y : x.localeCompare(y));
    });
    pane.querySelector(".extra-network-cards").append(...cards);
}

// ---- what the small buttons do ----

/** The URL of card data on the server; with a password set, it includes the page's key. */
function cardsUrl(path, values) {
    const key = gradioApp().querySelector(".extra-networks-pane").dataset.key;
    return serverUrl(`sd_extra_networks/${path}?${new URLSearchParams({...values, ...(key ? {key: key} : {})})}`);
}

/** Show the metadata stored in a card's file. */
function extraNetworksShowMetadata(text) {
    const box = document.createElement("pre");
    box.className = "extra-network-metadata";
    box.textContent = text;
    popup(box);
}

function showCardMetadata(pane, card) {
    fetch(cardsUrl("metadata", {page: pane.dataset.page, item: card.dataset.name}), {credentials: "same-origin"})
        .then((response) => response.json())
        .then((answer) => extraNetworksShowMetadata(answer.metadata || "The file contains no metadata."))
        .catch((error) => console.error("cannot read a card's metadata", error));
}

/** Refresh one card in its tab. */
function extraNetworksRefreshSingleCard(page, tabname, name) {
    fetch(cardsUrl("get-single-card", {page: page, tabname: tabname, name: name}), {credentials: "same-origin"})
        .then((response) => response.json())
        .then((answer) => {
            const pane = gradioApp().querySelector(`.extra-networks-pane[data-tabname="${tabname}"][data-page="${CSS.escape(page)}"]`);
            const card = pane && paneCards(pane).find((one) => one.dataset.name === name);
            if (card && answer.html) {
                card.outerHTML = answer.html;
                applyExtraNetworkFilter(pane);
            }
        })
        .catch((error) => console.error("cannot refresh a card", error));
}

function editUserMetadata(pane, card) {
    const part = `${pane.dataset.tabname}_${pane.dataset.page.replace(/ /g, "_")}_edit_user_metadata`;
    const field = gradioApp().querySelector(`#${CSS.escape(part)}_name textarea, #${CSS.escape(part)}_name input`);
    field.value = card.dataset.name;
    updateInput(field);
    setTimeout(() => gradioApp().getElementById(`${part}_button`).click(), 0);
}

var CARD_BUTTONS = {
    "metadata-button": showCardMetadata,
    "edit-button": editUserMetadata,
    "copy-path-button": (pane, card) => navigator.clipboard.writeText(card.dataset.path),
};

var PANE_BUTTONS = {
    sort: (pane, button) => {
        pane.querySelectorAll(".sort").forEach((other) => other.classList.toggle("selected", other === button));
        applyExtraNetworkSort(pane);
    },
    "sort-direction": (pane, button) => {
        button.dataset.direction = button.dataset.direction === "ascending" ? "descending" : "ascending";
        applyExtraNetworkSort(pane);
    },
    "tree-switch": (pane, button) => {
        const shown = button.classList.toggle("selected");
        pane.querySelector(".extra-network-tree").classList.toggle("hidden-part", !shown);
    },
    refresh: (pane) => {
        gradioApp().getElementById(`${pane.dataset.tabname}_${pane.dataset.page.replace(/ /g, "_")}_extra_refresh_internal`).click();
    },
    folder: (pane, button) => {
        pane.querySelectorAll(".folder").forEach((other) => other.classList.toggle("selected", other === button));
        applyExtraNetworkFilter(pane);
    },
};

function actOn(table, element, ...arguments_) {
    const name = Object.keys(table).find((known) => element.classList.contains(known));
    if (name) {
        table[name](...arguments_);
    }
    return Boolean(name);
}

// Runs before a card's own onclick: clicking one of its buttons must not count as clicking the card.
document.addEventListener("click", (event) => {
    const button = event.target.closest(".extra-networks-pane button");
    const pane = button && button.closest(".extra-networks-pane");
    if (!pane) {
        return;
    }
    const card = button.closest(".card");
    if (card ? actOn(CARD_BUTTONS, button, pane, card) : actOn(PANE_BUTTONS, button, pane, button)) {
        event.stopPropagation();
    }
}, true);

document.addEventListener("input", (event) => {
    if (event.target.matches(".extra-networks-pane .extra-search")) {
        applyExtraNetworkFilter(event.target.closest(".extra-networks-pane"));
    }
});

document.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && event.target.matches(".extra-network-cards > .card")) {
        event.preventDefault();
        event.target.click();
    }
});
