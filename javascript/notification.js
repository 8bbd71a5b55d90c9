// When a job ends: a sound, and a notification of the browser if the window is in the background and the user has allowed it.
"use strict";

var NOTIFICATION_TONES = [[880, 0, 0.16], [1174.66, 0.13, 0.3]]; // Hz, start and length in seconds
var NOTIFICATION_RATE_HZ = 22050;
var notificationButton = null;
var lastHeadImg = null;

/** A short chime as the address of a WAV file. */
function chimeAddress() {
    const count = Math.ceil(NOTIFICATION_RATE_HZ * 0.45);
    const view = new DataView(new ArrayBuffer(44 + 2 * count));
    const word = (offset, text) => Array.from(text).forEach((sign, index) => view.setUint8(offset + index, sign.charCodeAt(0)));
    word(0, "RIFF");
    view.setUint32(4, 36 + 2 * count, true);
    word(8, "WAVEfmt ");
    view.setUint32(16, 16, true);
    view.setUint16(20, 1, true);
    view.setUint16(22, 1, true);
    view.setUint32(24, NOTIFICATION_RATE_HZ, true);
    view.setUint32(28, 2 * NOTIFICATION_RATE_HZ, true);
    view.setUint16(32, 2, true);
    view.setUint16(34, 16, true);
    word(36, "data");
    view.setUint32(40, 2 * count, true);
    for (let index = 0; index < count; index += 1) {
        const time = index / NOTIFICATION_RATE_HZ;
        const level = NOTIFICATION_TONES.reduce((sum, [tone, start, length]) => {
            const age = time - start;
            return age < 0 || age > length ? sum : sum + Math.sin(2 * Math.PI * tone * age) * (1 - age / length) * 0.3;
        }, 0);
        view.setInt16(44 + 2 * index, Math.round(32767 * level), true);
    }
    return URL.createObjectURL(new Blob([view], {type: "audio/wav"}));
}

function notificationAudio() {
    const box = gradioApp().getElementById("audio_notification");
    let audio = box ? box.querySelector("audio") : null;
    if (box && !audio) {
        audio = document.createElement("audio");
        audio.src = chimeAddress();
        box.append(audio);
    }
    return audio;
}

function playNotification() {
    const audio = opts.notification_audio === false ? null : notificationAudio();
    if (audio) {
        audio.volume = Math.min(1, Math.max(0, (opts.notification_volume ?? 100) / 100));
        audio.currentTime = 0;
        audio.play().catch((error) => console.info("the browser does not play the sound of a finished job:", error.message));
    }
}

function notifyInBackground(numPictures) {
    if (document.visibilityState === "visible" || !("Notification" in window) || Notification.permission !== "granted") {
        return;
    }
    const note = new Notification(pageTitle, {body: numPictures === 1 ? "The picture is done." : `${numPictures} pictures are done.`});
    note.onclick = () => {
        window.focus();
        note.close();
    };
}

/** The answer of a job is on the page: say so if it brought pictures. */
function notifyOfPictures() {
    const pictures = all_gallery_buttons().map((button) => button.querySelector("img")).filter(Boolean);
    const head = pictures.length ? pictures[0].src : null;
    if (!head || head === lastHeadImg) {
        return;
    }
    lastHeadImg = head;
    playNotification();
    notifyInBackground(pictures.length);
}

onUiLoaded(() => {
    const begin = () => {
        notificationButton = gradioApp().getElementById("request_notifications");
        if (notificationButton && !notificationButton.dataset.isConnected) {
            notificationButton.dataset.isConnected = "yes";
            notificationButton.addEventListener("click", () => {
                if ("Notification" in window) {
                    Notification.requestPermission();
                }
            });
        }
    };
    begin();
    onAfterUiUpdate(begin);
});
