// A picture to paint on: masks (shown half transparent and patterned) and sketches. Needs nothing but a 2D canvas.
// The paint lies in a canvas of the picture's own size; what is seen is another one, scaled and moved by CSS. The value goes into a hidden text box.
"use strict";

var PAINT_SIZE = {min: 1, max: 500, start: 24};
var PAINT_ZOOM = {step: 1.15, min: 0.05, max: 40};
var PAINT_UNDO_BYTES = 256 << 20;
var PAINT_BLANK_PX = 512;
var PAINT_MAX_SIDE = 16384;
var paintCanvases = {}; // by the id of the frame's block

function paintElement(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
}

class PaintCanvas {
    constructor(frame) {
        this.frame = frame;
        this.isMask = frame.dataset.kind === "mask";
        this.color = frame.dataset.color;
        this.tool = "brush";
        this.size = PAINT_SIZE.start;
        this.view = {scale: 1, x: 0, y: 0};
        this.background = null; // {path, width, height}
        this.undone = [];
        this.done = [];
        this.hasPaint = false;
        this.lastPoint = null;
        this.shownValue = "";
        this.build();
        this.listen();
        this.reset();
    }

    // ---- the page ----

    build() {
        this.layer = document.createElement("canvas");
        this.seen = paintElement("canvas", {className: "paint-seen"});
        this.picture = paintElement("img", {className: "paint-picture", alt: "", draggable: false});
        this.cursor = paintElement("div", {className: "paint-cursor"});
        this.content = paintElement("div", {className: "paint-content"}, this.picture, this.seen);
        this.container = paintElement("div", {className: "forge-image-container"}, this.content);
        this.file = paintElement("input", {type: "file", accept: "image/*", className: "paint-file", tabIndex: -1});
        this.file.setAttribute("aria-label", "Picture to paint on");
        this.hint = paintElement("button", {type: "button", className: "paint-hint", textContent: "Drop, paste or click to put a picture here"});
        this.area = paintElement("div", {className: "paint-area", tabIndex: 0}, this.container, this.cursor, this.hint);
        this.area.setAttribute("aria-label", "Canvas. B brush, E eraser, square brackets size, Ctrl+Z undo, wheel zooms, Space or right button drags");
        this.area.setAttribute("role", "application");
        this.tools = this.buildTools();
        this.frame.append(this.tools, this.area, this.file);
        this.frame.classList.add("paint-ready");
    }

    buildTools() {
        const button = (name, icon, title, action) => {
            const made = paintElement("button", {type: "button", className: `paint-${name} icon icon-${icon}`, title: title});
            made.setAttribute("aria-label", title);
            made.addEventListener("click", action);
            return made;
        };
        this.slider = paintElement("input", {type: "range", className: "paint-size", ...{min: PAINT_SIZE.min, max: PAINT_SIZE.max}, value: this.size});
        this.slider.title = "Brush size in pixels of the picture ([ and ], Ctrl+wheel)";
        this.slider.setAttribute("aria-label", this.slider.title);
        this.slider.addEventListener("input", () => this.setSize(Number(this.slider.value)));
        this.sizeText = paintElement("span", {className: "paint-size-text"});
        this.brush = button("brush", "brush", "Brush (B)", () => this.setTool("brush"));
        this.eraser = button("eraser", "eraser", "Eraser (E)", () => this.setTool("eraser"));
        this.undoButton = button("undo", "undo", "Undo (Ctrl+Z)", () => this.undo());
        this.redoButton = button("redo", "redo", "Redo (Ctrl+Y)", () => this.redo());
        const parts = [this.brush, this.eraser, this.slider, this.sizeText];
        if (!this.isMask) {
            this.colorField = paintElement("input", {type: "color", className: "paint-color", value: this.color, title: "Color"});
            this.colorField.setAttribute("aria-label", "Color");
            this.colorField.addEventListener("input", () => {
                this.color = this.colorField.value;
            });
            parts.push(this.colorField);
        }
        parts.push(
            this.undoButton,
            this.redoButton,
            button("clear", "trash", "Take all paint away (Delete)", () => this.clearPaint()),
            button("fit", "fit", "See the whole picture (R)", () => this.fit()),
            button("large", "large", "As large as the window, or as before (F)", () => this.toggleLarge()),
            button("load", "picture", "Put a picture here", () => this.file.click()),
            button("remove", "remove", "Take the picture away", () => this.remove()),
        );
        return paintElement("div", {className: "paint-tools"}, ...parts);
    }

    listen() {
        const area = this.area;
        this.file.addEventListener("change", () => this.file.files.length && this.loadFile(this.file.files[0]));
        this.hint.addEventListener("click", () => this.file.click());
        area.addEventListener("pointerdown", (event) => this.press(event));
        area.addEventListener("pointermove", (event) => this.move(event));
        area.addEventListener("pointerup", () => this.release());
        area.addEventListener("pointercancel", () => this.release());
        area.addEventListener("pointerleave", () => this.cursor.classList.remove("shown"));
        area.addEventListener("contextmenu", (event) => event.preventDefault());
        area.addEventListener("wheel", (event) => this.wheel(event), {passive: false});
        this.frame.addEventListener("keydown", (event) => this.key(event));
        this.frame.addEventListener("keyup", (event) => {
            this.spaceIsDown = event.key === " " ? false : this.spaceIsDown;
        });
        new ResizeObserver(() => this.fit()).observe(area);
    }

    // ---- the picture ----

    /** An empty canvas: nothing to paint a mask on; white paper for a sketch. */
    reset() {
        this.background = null;
        this.picture.removeAttribute("src");
        this.frame.classList.remove("has-picture");
        this.resize(PAINT_BLANK_PX, PAINT_BLANK_PX);
    }

    resize(width, height) {
        for (const canvas of [this.layer, this.seen]) {
            canvas.width = width;
            canvas.height = height;
        }
        Object.assign(this.seen.dataset, {pictureWidth: this.background ? width : "", pictureHeight: this.background ? height : ""});
        Object.assign(this.content.style, {width: `${width}px`, height: `${height}px`});
        [this.done, this.undone, this.hasPaint, this.lastPoint] = [[], [], false, null];
        this.paper = null;
        this.fit();
        this.drawTools();
    }

    async loadFile(file) {
        const form = new FormData();
        form.append("files", file);
        try {
            const response = await fetch(serverUrl("gradio_api/upload"), {method: "POST", body: form, credentials: "same-origin"});
            const [path] = await response.json();
            await this.show(path, URL.createObjectURL(file));
            this.tell();
            gradioApp().getElementById(this.frame.dataset.loaded)?.click();
        } catch (error) {
            console.error("the picture cannot be put on the canvas", error);
            this.hint.textContent = "This file cannot be shown as a picture. Put another one here";
        }
        this.file.value = "";
    }

    /** Show the picture that the server knows as `path`, without paint. Throws for what the browser cannot show. */
    async show(path, address) {
        const image = new Image();
        image.src = address;
        await image.decode();
        if (Math.max(image.naturalWidth, image.naturalHeight) > PAINT_MAX_SIDE) {
            throw new Error(`a side is longer than ${PAINT_MAX_SIDE} pixels`);
        }
        URL.revokeObjectURL(this.picture.src);
        this.background = {path: path, width: image.naturalWidth, height: image.naturalHeight};
        this.picture.src = address;
        this.frame.classList.add("has-picture");
        this.resize(image.naturalWidth, image.naturalHeight);
    }

    remove() {
        this.reset();
        this.tell();
    }

    /** The server has set the value. */
    async take(text) {
        if (text === this.shownValue) {
            return;
        }
        this.shownValue = text;
        const value = text ? JSON.parse(text) : {};
        if (value.background) {
            await this.show(value.background, serverUrl(value.url));
        } else {
            this.reset();
        }
    }

    /** Put what is painted into the hidden box. */
    tell() {
        const layer = this.hasPaint ? this.layer.toDataURL("image/png") : null;
        const path = this.background ? this.background.path : null;
        this.shownValue = path || layer ? JSON.stringify({background: path, layer: layer}) : "";
        setInputValue(this.frame.dataset.value, this.shownValue);
    }

    // ---- view ----

    fit() {
        const box = this.area.getBoundingClientRect();
        if (!box.width || !box.height) {
            return;
        }
        const scale = Math.min(box.width / this.layer.width, box.height / this.layer.height, 8);
        this.view = {scale: scale, x: (box.width - this.layer.width * scale) / 2, y: (box.height - this.layer.height * scale) / 2};
        this.drawView();
    }

    drawView() {
        const {scale, x, y} = this.view;
        this.content.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
        this.content.classList.toggle("enlarged", scale > 2);
    }

    zoom(factor, event) {
        const box = this.area.getBoundingClientRect();
        const scale = Math.min(PAINT_ZOOM.max, Math.max(PAINT_ZOOM.min, this.view.scale * factor));
        const [x, y] = [event.clientX - box.left, event.clientY - box.top];
        const ratio = scale / this.view.scale;
        this.view = {scale: scale, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio};
        this.drawView();
        this.drawCursor(event);
    }

    toggleLarge() {
        this.frame.classList.toggle("as-large-as-the-window");
        this.fit();
        this.area.focus();
    }

    point(event) {
        const box = this.area.getBoundingClientRect();
        return {x: (event.clientX - box.left - this.view.x) / this.view.scale, y: (event.clientY - box.top - this.view.y) / this.view.scale};
    }

    drawCursor(event) {
        const box = this.area.getBoundingClientRect();
        const side = Math.max(3, this.size * this.view.scale);
        this.cursor.classList.add("shown");
        Object.assign(this.cursor.style, {
            width: `${side}px`,
            height: `${side}px`,
            transform: `translate(${event.clientX - box.left - side / 2}px, ${event.clientY - box.top - side / 2}px)`,
        });
    }

    // ---- painting ----

    press(event) {
        if (event.target === this.hint) {
            return;
        }
        this.area.focus({preventScroll: true});
        this.area.setPointerCapture(event.pointerId);
        if (event.button !== 0 || this.spaceIsDown) {
            this.grip = {x: event.clientX - this.view.x, y: event.clientY - this.view.y};
            event.preventDefault();
            return;
        }
        if (this.isMask && !this.background) {
            return;
        }
        this.before = this.context().getImageData(0, 0, this.layer.width, this.layer.height);
        this.dirty = null;
        this.isPainting = true;
        const point = this.point(event);
        this.stroke(event.shiftKey && this.lastPoint ? this.lastPoint : point, point, event);
    }

    move(event) {
        this.drawCursor(event);
        if (this.grip) {
            this.view = {...this.view, x: event.clientX - this.grip.x, y: event.clientY - this.grip.y};
            this.drawView();
        } else if (this.isPainting) {
            for (const one of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) {
                this.stroke(this.lastPoint, this.point(one), one);
            }
        }
    }

    release() {
        this.grip = null;
        if (!this.isPainting) {
            return;
        }
        this.isPainting = false;
        this.remember();
        this.tell();
    }

    context() {
        return this.layer.getContext("2d", {willReadFrequently: true});
    }

    stroke(from, to, event) {
        const pressure = event.pointerType === "pen" && event.pressure ? event.pressure : 1;
        const width = Math.max(1, this.size * pressure);
        const context = this.context();
        context.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
        context.strokeStyle = context.fillStyle = this.color;
        context.lineWidth = width;
        context.lineCap = context.lineJoin = "round";
        context.beginPath();
        context.moveTo(from.x, from.y);
        context.lineTo(to.x, to.y);
        context.stroke();
        context.globalCompositeOperation = "source-over";
        this.lastPoint = to;
        const reach = width / 2 + 2;
        this.touch(Math.min(from.x, to.x) - reach, Math.min(from.y, to.y) - reach, Math.max(from.x, to.x) + reach, Math.max(from.y, to.y) + reach);
    }

    /** Redraw the paint of this part, and remember that the stroke has changed it. */
    touch(left, top, right, bottom) {
        const [x, y] = [Math.max(0, Math.floor(left)), Math.max(0, Math.floor(top))];
        const [endX, endY] = [Math.min(this.layer.width, Math.ceil(right)), Math.min(this.layer.height, Math.ceil(bottom))];
        if (endX <= x || endY <= y) {
            return;
        }
        const old = this.dirty;
        this.dirty = old
            ? {x: Math.min(old.x, x), y: Math.min(old.y, y), endX: Math.max(old.endX, endX), endY: Math.max(old.endY, endY)}
            : {x: x, y: y, endX: endX, endY: endY};
        this.drawPaint(x, y, endX - x, endY - y);
    }

    drawPaint(x, y, width, height) {
        const context = this.seen.getContext("2d");
        context.clearRect(x, y, width, height);
        context.drawImage(this.layer, x, y, width, height, x, y, width, height);
        if (this.isMask) {
            context.globalCompositeOperation = "source-in";
            context.fillStyle = this.pattern(context);
            context.save();
            context.beginPath();
            context.rect(x, y, width, height);
            context.clip(); // source-in would clear everything else
            context.fillRect(x, y, width, height);
            context.restore();
            context.globalCompositeOperation = "source-over";
            this.seen.style.opacity = String((opts.img2img_inpaint_mask_scribble_alpha ?? 75) / 100);
        }
    }

    /** What a mask is filled with: stripes of the brush's color, which are seen on any picture; the plain color if the setting says so. */
    pattern(context) {
        if (opts.img2img_inpaint_mask_high_contrast === false) {
            return this.color;
        }
        if (!this.paper) {
            const tile = paintElement("canvas", {width: 16, height: 16});
            const paper = tile.getContext("2d");
            paper.fillStyle = this.color;
            paper.fillRect(0, 0, 16, 16);
            paper.fillStyle = "#000";
            for (let line = 0; line < 16; line += 1) {
                for (let column = 0; column < 16; column += 1) {
                    if ((line + column) % 16 < 6) {
                        paper.fillRect(column, line, 1, 1);
                    }
                }
            }
            this.paper = context.createPattern(tile, "repeat");
        }
        return this.paper;
    }

    // ---- undo ----

    /** Keep what the part looked like before the stroke. */
    remember() {
        if (!this.dirty) {
            return;
        }
        const {x, y, endX, endY} = this.dirty;
        const part = document.createElement("canvas");
        [part.width, part.height] = [endX - x, endY - y];
        part.getContext("2d").putImageData(this.before, -x, -y);
        this.done.push({x: x, y: y, data: part.getContext("2d").getImageData(0, 0, part.width, part.height)});
        this.undone = [];
        this.before = null;
        let bytes = 0;
        const kept = this.done.findLastIndex((step) => (bytes += step.data.data.length) > PAINT_UNDO_BYTES);
        this.done = this.done.slice(Math.min(kept + 1, this.done.length - 1));
        this.hasPaint = this.tool === "eraser" ? this.anyPaint() : true;
        this.drawTools();
    }

    anyPaint() {
        const data = this.context().getImageData(0, 0, this.layer.width, this.layer.height).data;
        for (let index = 3; index < data.length; index += 4) {
            if (data[index]) {
                return true;
            }
        }
        return false;
    }

    swap(from, to) {
        const step = from.pop();
        if (!step) {
            return;
        }
        const context = this.context();
        to.push({...step, data: context.getImageData(step.x, step.y, step.data.width, step.data.height)});
        context.putImageData(step.data, step.x, step.y);
        this.drawPaint(step.x, step.y, step.data.width, step.data.height);
        this.hasPaint = this.anyPaint();
        this.drawTools();
        this.tell();
    }

    undo() {
        this.swap(this.done, this.undone);
    }

    redo() {
        this.swap(this.undone, this.done);
    }

    clearPaint() {
        this.before = this.context().getImageData(0, 0, this.layer.width, this.layer.height);
        this.context().clearRect(0, 0, this.layer.width, this.layer.height);
        this.dirty = null;
        this.touch(0, 0, this.layer.width, this.layer.height);
        this.remember();
        this.hasPaint = false;
        this.drawTools();
        this.tell();
    }

    // ---- tools and keys ----

    setTool(tool) {
        this.tool = tool;
        this.drawTools();
    }

    setSize(size) {
        this.size = Math.min(PAINT_SIZE.max, Math.max(PAINT_SIZE.min, Math.round(size)));
        this.drawTools();
    }

    drawTools() {
        this.slider.value = String(this.size);
        this.sizeText.textContent = `${this.size} px`;
        this.brush.setAttribute("aria-pressed", String(this.tool === "brush"));
        this.eraser.setAttribute("aria-pressed", String(this.tool === "eraser"));
        this.undoButton.disabled = !this.done.length;
        this.redoButton.disabled = !this.undone.length;
    }

    wheel(event) {
        event.preventDefault();
        if (event.ctrlKey || event.metaKey) {
            this.setSize(this.size * (event.deltaY < 0 ? 1.1 : 1 / 1.1) + (event.deltaY < 0 ? 0.5 : -0.5));
            this.drawCursor(event);
        } else {
            this.zoom(event.deltaY < 0 ? PAINT_ZOOM.step : 1 / PAINT_ZOOM.step, event);
        }
    }

    key(event) {
        if (event.target.matches("input[type=color]") || (event.target !== this.area && !event.ctrlKey && !event.metaKey)) {
            return;
        }
        const withCtrl = event.ctrlKey || event.metaKey;
        const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
        const plain = {
            b: () => this.setTool("brush"),
            e: () => this.setTool(this.tool === "eraser" ? "brush" : "eraser"),
            r: () => this.fit(),
            f: () => this.toggleLarge(),
            "[": () => this.setSize(Math.min(this.size - 1, this.size / 1.2)),
            "]": () => this.setSize(Math.max(this.size + 1, this.size * 1.2)),
            Delete: () => this.clearPaint(),
            " ": () => {
                this.spaceIsDown = true;
            },
            Escape: () => this.frame.classList.contains("as-large-as-the-window") && this.toggleLarge(),
        };
        const controlled = {z: () => (event.shiftKey ? this.redo() : this.undo()), y: () => this.redo()};
        const action = event.altKey ? null : (withCtrl ? controlled : plain)[key];
        if (action) {
            event.preventDefault();
            action();
        }
    }
}

/** The hidden box of the canvas `id` has a value that may come from the server. */
function showPaintValue(id, text) {
    const canvas = paintCanvases[id];
    if (canvas) {
        canvas.take(text || "").catch((error) => console.error("a picture cannot be shown on the canvas", error));
    } else {
        setupPaintCanvases();
        if (paintCanvases[id]) {
            showPaintValue(id, text);
        }
    }
}

function setupPaintCanvases() {
    for (const frame of gradioApp().querySelectorAll(".paint-frame:not(.paint-ready)")) {
        paintCanvases[frame.dataset.value.replace(/_value$/, "")] = new PaintCanvas(frame);
    }
    for (const frame of gradioApp().querySelectorAll(".paint-frame")) {
        frame.classList.toggle("plain", Boolean(opts.forge_canvas_plain));
        frame.classList.toggle("tools-stay", Boolean(opts.forge_canvas_toolbar_always));
    }
}

onUiLoaded(() => {
    setupPaintCanvases();
    onAfterUiUpdate(setupPaintCanvases);
    onOptionsChanged(setupPaintCanvases);
});
