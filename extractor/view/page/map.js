// The map: every image a point, near to what is like it. Zoom, drag, and a lasso.

import { element, plural } from "./dom.js";

const THUMBNAIL = 54; // pixels
const MOST_THUMBNAILS = 140;
const REACH = 12; // pixels from a point that still mean it
const ROUND_POINTS = 20_000; // more than that are drawn as single pixels

// Colors that are told apart by most people with a color vision deficiency, too (after Okabe, Ito).
const COLORS = ["#3b7dd8", "#e08a00", "#00966b", "#c94f7c", "#8a63d2", "#b08d00", "#22a7c4", "#d2552d", "#5f8f2f", "#8c6d5a"];
const OTHER = "#8d9399";

/** Read a map as the server packs it. */
export function readMap(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const start = 4 + length;
  const { count } = head;
  return {
    ...head,
    ids: new Float64Array(buffer, start, count),
    points: new Float32Array(buffer, start + 8 * count, 2 * count),
    colors: new Uint8Array(buffer, start + 16 * count, count),
  };
}

export class MapView {
  /**
   * @param panel Element of the view.
   * @param map What readMap() returns.
   * @param options thumbnail(id), open(id), select(ids), isSelected(id), list(ids), choose(method).
   */
  constructor(panel, map, options) {
    this.map = map;
    this.options = options;
    this.pictures = new Map(); // thumbnails by id
    this.pointers = new Map();
    this.lasso = null;
    this.showsThumbnails = map.count <= 5000;
    this.selected = new Uint8Array(map.count);
    this.canvas = element("canvas", {
      tabindex: "0",
      role: "application",
      "aria-roledescription": "map",
      "aria-label":
        `Map of ${plural(map.count, "image")}. Arrow keys move, plus and minus zoom, ` +
        "Enter opens the image nearest to the center, L begins a lasso around the window.",
    });
    this.tip = element("div", { class: "tip", hidden: true });
    panel.replaceChildren(this.tools(), element("div", { class: "map" }, this.canvas, this.tip, this.legend()));
    this.listen();
    this.reset();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.canvas);
  }

  close() {
    this.observer.disconnect();
  }

  tools() {
    const { method, explained, left_out: leftOut } = this.map;
    const methods = element("select", { "aria-label": "Method of the map" });
    methods.disabled = Boolean(this.map.isFixed);
    for (const [value, text] of [["pca", "PCA"], ["umap", "UMAP"]]) {
      methods.append(element("option", { value, text, selected: value === method }));
    }
    methods.addEventListener("change", () => this.options.choose(methods.value));
    this.lassoButton = element("button", {
      type: "button",
      "aria-pressed": "false",
      title: "Draw around images to select them; or hold Shift",
      onclick: () => this.toggleLasso(),
      text: "Lasso",
    });
    const thumbnails = element("button", {
      type: "button",
      "aria-pressed": String(this.showsThumbnails),
      onclick: () => {
        this.showsThumbnails = !this.showsThumbnails;
        thumbnails.setAttribute("aria-pressed", this.showsThumbnails);
        this.drawSoon();
      },
      text: "Thumbnails",
    });
    const facts = [`${plural(this.map.count, "image")}`];
    if (explained && this.map.count > 1) facts.push(`${Math.round(100 * (explained[0] + explained[1]))} % of the variance`);
    if (leftOut) facts.push(`${plural(leftOut, "image")} left out`);
    return element(
      "div",
      { class: "map-tools" },
      methods,
      this.lassoButton,
      thumbnails,
      element("button", { type: "button", onclick: () => this.zoom(1.5), "aria-label": "Zoom in", text: "+" }),
      element("button", { type: "button", onclick: () => this.zoom(1 / 1.5), "aria-label": "Zoom out", text: "−" }),
      element("button", { type: "button", onclick: () => this.reset(true), text: "Whole map" }),
      element("button", { type: "button", class: "quiet", onclick: () => this.options.list(this.inView()), text: "List what is in view" }),
      element("span", { class: "facts", text: facts.join(" · ") }),
    );
  }

  legend() {
    const { names, others } = this.map;
    if (!names.length) return null;
    const shown = [...names.map((name, at) => [name || "(no folder)", COLORS[at]])];
    if (others) shown.push(["others", OTHER]);
    const items = shown.map(([name, color]) => {
      const dot = element("span", { class: "dot", "aria-hidden": "true" });
      dot.style.background = color;
      return element("li", { title: name }, dot, name);
    });
    return element("ul", { class: "legend", "aria-label": "Colors by folder" }, ...items);
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    canvas.addEventListener("pointermove", (event) => this.onMove(event));
    canvas.addEventListener("pointerup", (event) => this.onUp(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.hover(-1));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY);
      },
      { passive: false },
    );
  }

  reset(isAsked = false) {
    this.scale = 1; // of the whole map in the window
    this.x = this.y = 0.5; // point of the map in the center
    if (isAsked) this.drawSoon();
  }

  resize() {
    const ratio = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    [this.width, this.height, this.ratio] = [width, height, ratio];
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.drawSoon();
  }

  get size() {
    return (Math.min(this.width, this.height) - 48) * this.scale;
  }

  /** Position of a point in the window, in pixels. The y of the map points up. */
  at(index) {
    const { points } = this.map;
    return [
      (points[2 * index] - this.x) * this.size + this.width / 2,
      (this.y - points[2 * index + 1]) * this.size + this.height / 2,
    ];
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const before = this.size;
    this.scale = Math.min(Math.max(this.scale * factor, 0.5), 5000);
    const change = 1 / before - 1 / this.size;
    this.x += (x - this.width / 2) * change;
    this.y -= (y - this.height / 2) * change;
    this.drawSoon();
  }

  pan(x, y) {
    this.x -= x / this.size;
    this.y += y / this.size;
    this.drawSoon();
  }

  drawSoon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  mark() {
    this.map.ids.forEach((id, index) => (this.selected[index] = this.options.isSelected(id) ? 1 : 0));
    this.drawSoon();
  }

  draw() {
    if (!this.width) return;
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.map.count > ROUND_POINTS) this.drawPixels(context);
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    if (this.map.count <= ROUND_POINTS) this.drawPoints(context);
    if (this.showsThumbnails) this.drawThumbnails(context);
    this.drawSelected(context);
    if (this.lasso) this.drawLasso(context);
    if (document.activeElement === this.canvas && this.usesKeys) this.drawCross(context);
  }

  drawPoints(context) {
    const radius = Math.min((this.map.count < 2000 ? 3.5 : 2.2) * Math.sqrt(this.scale) ** 0.5, 6);
    for (let index = 0; index < this.map.count; index++) {
      const [x, y] = this.at(index);
      if (!this.isInWindow(x, y)) continue;
      context.fillStyle = COLORS[this.map.colors[index]] || OTHER;
      if (this.map.names.length === 0) context.fillStyle = COLORS[0];
      context.globalAlpha = 0.8;
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  /** Draw each point as a few pixels, which is quick for a million of them. */
  drawPixels(context) {
    const { width, height } = this.canvas;
    const picture = context.createImageData(width, height);
    const pixels = new Uint32Array(picture.data.buffer);
    const codes = [...COLORS, OTHER].map(packed);
    const { points, colors, names, count } = this.map;
    const [size, left, top] = [this.size * this.ratio, width / 2, height / 2];
    const side = Math.min(Math.max(Math.round(this.ratio * Math.sqrt(this.scale)), 1), 5);
    for (let index = 0; index < count; index++) {
      const x = ((points[2 * index] - this.x) * size + left) | 0;
      const y = ((this.y - points[2 * index + 1]) * size + top) | 0;
      if (x < 0 || y < 0 || x + side > width || y + side > height) continue;
      const color = names.length ? codes[Math.min(colors[index], COLORS.length)] : codes[0];
      for (let down = 0; down < side; down++) pixels.fill(color, (y + down) * width + x, (y + down) * width + x + side);
    }
    context.putImageData(picture, 0, 0);
  }

  /** Draw thumbnails where they do not cover each other. */
  drawThumbnails(context) {
    const taken = new Set();
    let shown = 0;
    for (let index = 0; index < this.map.count && shown < MOST_THUMBNAILS; index++) {
      const [x, y] = this.at(index);
      if (!this.isInWindow(x, y)) continue;
      const [column, row] = [Math.floor(x / THUMBNAIL), Math.floor(y / THUMBNAIL)];
      let isFree = true;
      for (let dx = -1; dx <= 1; dx++) for (let dy = -1; dy <= 1; dy++) isFree &&= !taken.has(`${column + dx},${row + dy}`);
      if (!isFree) continue;
      taken.add(`${column},${row}`);
      shown++;
      const picture = this.picture(this.map.ids[index]);
      if (!picture.complete || !picture.naturalWidth) continue;
      const fit = THUMBNAIL / Math.max(picture.naturalWidth, picture.naturalHeight);
      const [width, height] = [picture.naturalWidth * fit, picture.naturalHeight * fit];
      const box = [x - width / 2, y - height / 2, width, height];
      context.save();
      context.beginPath();
      context.roundRect(...box, 5);
      context.lineWidth = 3;
      context.strokeStyle = this.map.names.length ? COLORS[this.map.colors[index]] || OTHER : "#ffffff";
      context.stroke();
      context.clip();
      context.drawImage(picture, ...box);
      context.restore();
    }
  }

  drawSelected(context) {
    context.strokeStyle = getComputedStyle(this.canvas).color;
    context.lineWidth = 2;
    for (let index = 0; index < this.map.count; index++) {
      if (!this.selected[index]) continue;
      const [x, y] = this.at(index);
      if (!this.isInWindow(x, y)) continue;
      context.beginPath();
      context.arc(x, y, 5.5, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  drawLasso(context) {
    context.beginPath();
    for (const [x, y] of this.lasso) context.lineTo(x, y);
    context.closePath();
    context.fillStyle = "rgb(60 140 140 / 15%)";
    context.fill();
    context.setLineDash([5, 4]);
    context.strokeStyle = getComputedStyle(this.canvas).color;
    context.lineWidth = 1.5;
    context.stroke();
    context.setLineDash([]);
  }

  drawCross(context) {
    const [x, y] = [this.width / 2, this.height / 2];
    context.strokeStyle = getComputedStyle(this.canvas).color;
    context.lineWidth = 1.5;
    context.beginPath();
    for (const [dx, dy] of [[9, 0], [0, 9]]) {
      context.moveTo(x - dx, y - dy);
      context.lineTo(x + dx, y + dy);
    }
    context.stroke();
  }

  picture(id) {
    if (!this.pictures.has(id)) {
      const picture = new Image();
      picture.addEventListener("load", () => this.drawSoon());
      picture.src = this.options.thumbnail(id);
      this.pictures.set(id, picture);
      if (this.pictures.size > 1000) this.pictures.delete(this.pictures.keys().next().value);
    }
    return this.pictures.get(id);
  }

  isInWindow(x, y) {
    return x > -THUMBNAIL && y > -THUMBNAIL && x < this.width + THUMBNAIL && y < this.height + THUMBNAIL;
  }

  /** Index of the nearest point within reach; -1 for none. */
  nearest(x, y, reach = REACH) {
    let [best, at] = [reach * reach, -1];
    for (let index = 0; index < this.map.count; index++) {
      const [px, py] = this.at(index);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < best) [best, at] = [distance, index];
    }
    return at;
  }

  inView() {
    const ids = [];
    for (let index = 0; index < this.map.count; index++) {
      const [x, y] = this.at(index);
      if (x >= 0 && y >= 0 && x <= this.width && y <= this.height) ids.push(this.map.ids[index]);
    }
    return ids;
  }

  toggleLasso() {
    this.isLasso = !this.isLasso;
    this.lassoButton.setAttribute("aria-pressed", String(this.isLasso));
    this.canvas.classList.toggle("lasso", this.isLasso);
  }

  onDown(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.usesKeys = false;
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.moved = 0;
    if (this.pointers.size === 1 && (this.isLasso || event.shiftKey)) this.lasso = [[event.offsetX, event.offsetY]];
  }

  onMove(event) {
    const before = this.pointers.get(event.pointerId);
    const now = [event.offsetX, event.offsetY];
    if (!before) {
      this.hovered = now;
      this.hovering ||= requestAnimationFrame(() => {
        this.hovering = 0;
        this.hover(this.nearest(...this.hovered));
      });
      return;
    }
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    this.moved += Math.abs(dx) + Math.abs(dy);
    if (this.lasso) {
      this.lasso.push(now);
      this.drawSoon();
    } else if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const distance = (at) => Math.hypot(at[0] - other[0], at[1] - other[1]) || 1;
      this.zoom(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else this.pan(dx, dy);
    this.pointers.set(event.pointerId, now);
  }

  onUp(event) {
    const wasOne = this.pointers.size === 1;
    this.pointers.delete(event.pointerId);
    if (this.lasso) {
      const inside = this.inside(this.lasso);
      this.lasso = null;
      if (inside.length) this.options.select(inside);
      this.drawSoon();
    } else if (wasOne && this.moved < 5) {
      const at = this.nearest(event.offsetX, event.offsetY, this.showsThumbnails ? THUMBNAIL / 2 : REACH);
      if (at >= 0) this.options.open(this.map.ids[at]);
    }
  }

  /** Ids of the points inside a polygon in the window. */
  inside(polygon) {
    const path = new Path2D();
    for (const [x, y] of polygon) path.lineTo(x, y);
    path.closePath();
    const xs = polygon.map(([x]) => x);
    const ys = polygon.map(([, y]) => y);
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const context = element("canvas").getContext("2d"); // without a scale of its own
    const ids = [];
    for (let index = 0; index < this.map.count; index++) {
      const [x, y] = this.at(index);
      if (x < left || x > right || y < top || y > bottom) continue;
      if (context.isPointInPath(path, x, y)) ids.push(this.map.ids[index]);
    }
    return ids;
  }

  hover(index) {
    this.tip.hidden = index < 0;
    if (index < 0) return;
    const id = this.map.ids[index];
    const [x, y] = this.at(index);
    const picture = element("img", { src: this.options.thumbnail(id), alt: "" });
    picture.addEventListener("error", () => (this.tip.hidden = true));
    this.tip.replaceChildren(picture);
    this.tip.style.left = `${Math.min(x + 14, this.width - 150)}px`;
    this.tip.style.top = `${Math.min(y + 14, this.height - 150)}px`;
  }

  onKey(event) {
    const step = 60;
    const actions = {
      ArrowLeft: () => this.pan(step, 0),
      ArrowRight: () => this.pan(-step, 0),
      ArrowUp: () => this.pan(0, step),
      ArrowDown: () => this.pan(0, -step),
      "+": () => this.zoom(1.4),
      "=": () => this.zoom(1.4),
      "-": () => this.zoom(1 / 1.4),
      0: () => this.reset(true),
      l: () => this.options.select(this.inView()),
      Enter: () => {
        const at = this.nearest(this.width / 2, this.height / 2, Infinity);
        if (at >= 0) this.options.open(this.map.ids[at]);
      },
    };
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    this.usesKeys = true;
    action();
    this.drawSoon();
    event.preventDefault();
  }
}

/** Return a color as the four bytes of a pixel. */
function packed(color) {
  const number = parseInt(color.slice(1), 16);
  const [red, green, blue] = [number >> 16, (number >> 8) & 255, number & 255];
  return ((235 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
