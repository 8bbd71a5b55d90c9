// Editing a prompt with the keyboard: Ctrl+Up/Down changes the weight of what the cursor is in, Alt+Left/Right moves a part past its neighbor.
"use strict";

var EDITED_PROMPTS = "textarea";
var PROMPT_FIELDS = "[id$='_prompt'] textarea, .prompt textarea, [id$='_prompt_input'] textarea";
var MAX_WEIGHT_DIGITS = 5;

// ---- weights ----

/** The range [start, end) of the word around `index`; empty between two delimiters. */
function wordAround(text, index, delimiters) {
    let [start, end] = [index, index];
    while (start > 0 && !delimiters.includes(text[start - 1])) {
        start -= 1;
    }
    while (end < text.length && !delimiters.includes(text[end])) {
        end += 1;
    }
    return [start, end];
}

function wordDelimiters() {
    const blanks = {Tab: "\t", "Carriage Return": "\r", "Line Feed": "\n"};
    const chosen = opts.keyedit_delimiters_whitespace || Object.keys(blanks);
    return (opts.keyedit_delimiters || ".,\\/!?%^*;:{}=`~() ") + chosen.map((name) => blanks[name] || "").join("") + "<>[]()";
}

function isEscaped(text, index) {
    return index > 0 && text[index - 1] === "\\";
}

/** The innermost pair of `open` and `close` around `index` as [position of open, position of close]; null for none. */
function pairAround(text, index, open, close) {
    let depth = 0;
    for (let left = index - 1; left >= 0; left -= 1) {
        if (isEscaped(text, left)) {
            continue;
        }
        depth += text[left] === close ? 1 : 0;
        if (text[left] === open && depth > 0) {
            depth -= 1;
        } else if (text[left] === open) {
            const right = matchingClose(text, index, open, close);
            return right === -1 ? null : [left, right];
        }
    }
    return null;
}

function matchingClose(text, index, open, close) {
    let depth = 0;
    for (let right = index; right < text.length; right += 1) {
        if (isEscaped(text, right)) {
            continue;
        }
        if (text[right] === close && depth === 0) {
            return right;
        }
        depth += text[right] === open ? 1 : text[right] === close ? -1 : 0;
    }
    return -1;
}

function changedWeight(weight, step) {
    return Number((weight + step).toPrecision(MAX_WEIGHT_DIGITS));
}

function shownWeight(weight) {
    return Number.isInteger(weight) ? weight.toFixed(1) : String(weight);
}

/** `tag` (<kind:name:weight...>) with another weight. */
function tagWithWeight(tag, step) {
    const parts = tag.slice(1, -1).split(":");
    const weight = parts.length > 2 ? Number(parts[2]) : 1;
    if (parts.length < 2 || Number.isNaN(weight)) {
        return null;
    }
    return `<${[parts[0], parts[1], changedWeight(weight, step), ...parts.slice(3)].join(":")}>`;
}

/**
 * What a step of the weight at the selection [start, end) makes of `text`: {from, to, text, selection}; null where there is nothing to weigh.
 * `from` and `to` are replaced by `text`; `selection` is what is selected then.
 */
function weightEdit(text, start, end, direction) {
    const tag = start === end ? pairAround(text, start, "<", ">") : text[start] === "<" && text[end - 1] === ">" ? [start, end - 1] : null;
    if (tag) {
        const changed = tagWithWeight(text.slice(tag[0], tag[1] + 1), direction * (opts.keyedit_precision_extra || 0.05));
        return changed && {from: tag[0], to: tag[1] + 1, text: changed, selection: [tag[0], tag[0] + changed.length]};
    }
    const step = direction * (opts.keyedit_precision_attention || 0.1);
    const group = weightedGroup(text, start, end);
    if (group) {
        const weight = changedWeight(group.weight, step);
        return groupEdit(group.from, group.to, group.inner, weight);
    }
    const [from, to] = start === end ? wordAround(text, start, wordDelimiters()) : trimmedRange(text, start, end);
    return from === to ? null : groupEdit(from, to, text.slice(from, to), changedWeight(1, step));
}

function trimmedRange(text, start, end) {
    const chosen = text.slice(start, end);
    const from = start + chosen.length - chosen.trimStart().length;
    return [from, Math.max(from, start + chosen.trimEnd().length)];
}

/** The group (inner:weight) around the selection, if the selection is its inside or the cursor is in it. */
function weightedGroup(text, start, end) {
    const pair = pairAround(text, start, "(", ")");
    if (!pair || pair[1] < end) {
        return null;
    }
    const parts = /^([^]*?)(?::\s*([+-]?[\d.]+)\s*)?$/.exec(text.slice(pair[0] + 1, pair[1]));
    const weight = parts[2] === undefined ? 1.1 : Number(parts[2]);
    const isWhole = start === end || (start === pair[0] + 1 && end >= start + parts[1].length);
    return isWhole && !Number.isNaN(weight) ? {from: pair[0], to: pair[1] + 1, inner: parts[1], weight: weight} : null;
}

function groupEdit(from, to, inner, weight) {
    return weight === 1
        ? {from: from, to: to, text: inner, selection: [from, from + inner.length]}
        : {from: from, to: to, text: `(${inner}:${shownWeight(weight)})`, selection: [from + 1, from + 1 + inner.length]};
}

// ---- parts of a prompt ----

/** Where the parts of `text` begin and end: they are separated by commas outside of brackets. */
function promptParts(text) {
    const parts = [];
    let [begin, depth] = [0, 0];
    for (let index = 0; index <= text.length; index += 1) {
        const sign = text[index];
        depth += "([<{".includes(sign) && sign ? 1 : ")]>}".includes(sign) && sign && depth > 0 ? -1 : 0;
        if (sign === undefined || (sign === "," && depth === 0)) {
            const [from, to] = trimmedRange(text, begin, index);
            parts.push({begin: begin, end: index, from: from, to: to});
            begin = index + 1;
        }
    }
    return parts;
}

/** The prompt with the parts that the selection touches moved past their neighbor: {text, selection}; null at the border. */
function orderEdit(text, start, end, direction) {
    const parts = promptParts(text);
    const first = parts.findIndex((part) => part.end >= start);
    let last = first;
    while (last + 1 < parts.length && parts[last + 1].begin < end) {
        last += 1;
    }
    const other = direction < 0 ? first - 1 : last + 1;
    if (first < 0 || other < 0 || other >= parts.length) {
        return null;
    }
    const bodies = parts.map((part) => text.slice(part.from, part.to));
    const [moved] = bodies.splice(other, 1);
    bodies.splice(direction < 0 ? last : first, 0, moved);
    const [newFirst, newLast] = [first + direction, last + direction];
    const selection = [0, 0];
    let result = "";
    parts.forEach((part, index) => {
        result += text.slice(part.begin, part.from);
        selection[0] = index === newFirst ? result.length : selection[0];
        result += bodies[index];
        selection[1] = index === newLast ? result.length : selection[1];
        result += text.slice(part.to, part.end) + (index + 1 < parts.length ? "," : "");
    });
    return {text: result, selection: selection};
}

// ---- keys ----

/** Replace [from, to) of the field and tell the framework; the browser's undo knows of it. */
function replaceInField(field, from, to, text) {
    field.focus();
    field.setSelectionRange(from, to);
    const isDone = text ? document.execCommand("insertText", false, text) : document.execCommand("delete");
    if (!isDone) {
        field.setRangeText(text, from, to, "end");
    }
    updateInput(field);
}

function isPromptField(target) {
    return Boolean(target && target.matches && target.matches(EDITED_PROMPTS) && target.matches(PROMPT_FIELDS));
}

/** Ctrl+Up/Down (with Meta on a Mac) in a prompt. */
function keyupEditAttention(event) {
    const direction = {ArrowUp: 1, ArrowDown: -1}[event.key];
    const field = event.target;
    if (!direction || !(event.ctrlKey || event.metaKey) || event.altKey || !isPromptField(field)) {
        return;
    }
    event.preventDefault();
    const edit = weightEdit(field.value, field.selectionStart, field.selectionEnd, direction);
    if (edit) {
        replaceInField(field, edit.from, edit.to, edit.text);
        field.setSelectionRange(...edit.selection);
    }
}

/** Alt+Left/Right in a prompt. */
function keyupEditOrder(event) {
    const direction = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    const field = event.target;
    if (!direction || !event.altKey || event.ctrlKey || event.metaKey || opts.keyedit_move === false || !isPromptField(field)) {
        return;
    }
    event.preventDefault();
    const edit = orderEdit(field.value, field.selectionStart, field.selectionEnd, direction);
    if (edit) {
        replaceInField(field, 0, field.value.length, edit.text);
        field.setSelectionRange(...edit.selection);
    }
}

document.addEventListener("keydown", keyupEditAttention);
document.addEventListener("keydown", keyupEditOrder);

// ---- a size pasted into width or height, such as 512x768, fills both ----

function pasteSize(event) {
    const field = event.target.closest ? event.target.closest("#txt2img_width, #txt2img_height, #img2img_width, #img2img_height") : null;
    const size = field ? /^\s*(\d+)\s*[x×*,:\s]\s*(\d+)\s*$/i.exec(event.clipboardData.getData("text")) : null;
    if (size) {
        const tab = field.id.split("_")[0];
        event.preventDefault();
        setInputValue(`${tab}_width`, size[1]);
        setInputValue(`${tab}_height`, size[2]);
    }
}

function setupResolutionPasting() {
    document.addEventListener("paste", pasteSize); // as a whole: the framework rebuilds the fields when their bounds change
}

setupResolutionPasting();
