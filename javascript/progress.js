// Progress of a task: polls the server and shows the bar above the gallery, the live preview and the window title.
"use strict";

var PROGRESS_INACTIVITY_S = 40;
var PROGRESS_FAILURES_MAX = 20;
var progressTrackers = {}; // by tab: how to end the running display

function formatSeconds(seconds) {
    const two = (number) => String(Math.floor(number)).padStart(2, "0");
    if (seconds > 3600) {
        return `${two(seconds / 3600)}:${two((seconds / 60) % 60)}:${two(seconds % 60)}`;
    }
    return seconds > 60 ? `${two(seconds / 60)}:${two(seconds % 60)}` : `${Math.max(0, Math.floor(seconds))}s`;
}

function setTitle(progressText) {
    const wanted = opts.show_progress_in_title && progressText ? `[${progressText.trim()}] ${pageTitle}` : pageTitle;
    if (document.title !== wanted) {
        document.title = wanted;
    }
}
var pageTitle = document.title || "Stable Diffusion";

var wakeLock = null;

async function keepScreenOn(wanted) {
    if (!("wakeLock" in navigator) || !opts.prevent_screen_sleep_during_generation) {
        return;
    }
    try {
        if (wanted && !wakeLock) {
            wakeLock = await navigator.wakeLock.request("screen");
        } else if (!wanted && wakeLock) {
            const held = wakeLock;
            wakeLock = null;
            await held.release();
        }
    } catch (error) {
        wakeLock = null; // the browser refuses while the tab is hidden
    }
}

function progressText(answer) {
    let text = "";
    if (answer.progress > 0) {
        text = `${(answer.progress * 100).toFixed(0)}%`;
    }
    if (answer.eta) {
        text += ` ETA: ${formatSeconds(answer.eta)}`;
    }
    if (!text && answer.textinfo && !answer.textinfo.includes("\n")) {
        text = answer.textinfo;
    }
    return text || (answer.active ? "Starting…" : "");
}

/**
 * Show the progress of the task `id_task` until it ends: the bar before `progressbarContainer`, previews over `gallery`.
 * `atEnd` is called once when the display ends, `onProgress` with each answer from the server; `inactivityTimeout` is in seconds.
 * Returns a function that ends the display.
 */
function requestProgress(id_task, progressbarContainer, gallery, atEnd, onProgress, inactivityTimeout = PROGRESS_INACTIVITY_S) {
    const started = Date.now();
    const container = progressbarContainer.parentNode;
    let ended = false;
    let wasActive = false;
    let failures = 0;
    let preview = null;

    const bar = document.createElement("div");
    bar.className = "progressDiv";
    bar.style.display = opts.show_progressbar === false ? "none" : "block";
    const inner = document.createElement("div");
    inner.className = "progress";
    const label = document.createElement("span");
    label.className = "progress-label";
    bar.append(inner, label);
    container.insertBefore(bar, progressbarContainer);
    keepScreenOn(true);

    const end = () => {
        if (ended) {
            return;
        }
        ended = true;
        setTitle("");
        bar.remove();
        if (preview) {
            preview.remove();
        }
        keepScreenOn(false);
        if (atEnd) {
            atEnd();
        }
    };

    const showPreview = (source) => {
        if (!gallery) {
            return;
        }
        if (!preview) {
            preview = document.createElement("div");
            preview.className = "livePreview";
            preview.append(document.createElement("img"));
            gallery.insertBefore(preview, gallery.firstElementChild);
        }
        preview.firstElementChild.src = source;
    };

    const isOver = (answer) => {
        const seconds = (Date.now() - started) / 1000;
        if (answer.completed) {
            return true;
        }
        if (answer.active || answer.queued) {
            return false;
        }
        return wasActive || seconds > inactivityTimeout;
    };

    const ask = (knownPreview) => {
        if (ended) {
            return;
        }
        const again = (next) => setTimeout(() => ask(next), opts.live_preview_refresh_period || 500);
        const wantPreview = opts.live_previews_enable !== false && Boolean(gallery);
        const question = {id_task: id_task, id_live_preview: knownPreview, live_preview: wantPreview};
        request(
            serverUrl("internal/progress"),
            question,
            (answer) => {
                if (ended) {
                    return;
                }
                failures = 0;
                wasActive = wasActive || answer.active;
                if (isOver(answer)) {
                    end();
                    return;
                }
                inner.style.width = `${((answer.progress || 0) * 100).toFixed(1)}%`;
                const text = progressText(answer);
                label.textContent = text;
                setTitle(text);
                if (answer.live_preview) {
                    showPreview(answer.live_preview);
                }
                if (onProgress) {
                    onProgress(answer);
                }
                again(answer.live_preview ? answer.id_live_preview : knownPreview);
            },
            () => {
                failures += 1;
                if (failures > PROGRESS_FAILURES_MAX) {
                    end();
                } else {
                    again(knownPreview);
                }
            },
        );
    };
    ask(-1);
    return end;
}
