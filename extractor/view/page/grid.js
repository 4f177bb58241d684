// A grid of thumbnails over any number of images. Only rows near the window exist as elements.

import { element, fileName } from "./dom.js";

const MAX_HEIGHT = 15_000_000; // pixels; Firefox ends at 17.8 million, Chromium at 33 million
const GAP = 6;
const AHEAD = 1.5; // windows that are made ready in the direction of scrolling
const BEHIND = 0.5; // and in the other one
const JUMP = 2; // windows; a longer move is a drag of the scroll bar
const HURRY_MS = 60; // during a long drag, thumbnails wait until it rests
const DRAG_MS = 300; // between two jumps of one drag

export class Grid {
  /**
   * @param scroller Element that scrolls. It keeps the focus.
   * @param options thumbnail(image) returns an address, thumbnails(images) resolves to files that
   *   are at hand or null, open(image) shows an image, isSelected(image), toggle(image),
   *   select(images), problem().
   */
  constructor(scroller, options) {
    this.scroller = scroller;
    this.options = options;
    this.listing = null;
    this.rows = new Map(); // number of a row to its element
    this.current = 0;
    this.anchor = 0;
    this.top = 0; // position in the whole list, in pixels
    this.base = 0; // position of the first row in the spacer
    this.scrolled = 0;
    this.lastJump = -1000;
    this.isDragged = false;
    this.isUpward = false;
    this.spacer = element("div", { class: "spacer", role: "presentation" });
    scroller.append(this.spacer);
    scroller.addEventListener("scroll", () => this.onScroll(), { passive: true });
    scroller.addEventListener("keydown", (event) => this.onKey(event));
    this.spacer.addEventListener("click", (event) => this.onClick(event));
    new ResizeObserver(() => this.layout()).observe(scroller);
  }

  show(listing) {
    this.listing = listing;
    this.current = this.anchor = 0;
    this.top = 0;
    this.clear();
    this.layout(true);
  }

  clear() {
    for (const row of this.rows.values()) discard(row);
    this.rows.clear();
  }

  layout(atTop = false) {
    const width = this.scroller.clientWidth;
    if (!this.listing || width === 0) return;
    const style = getComputedStyle(this.scroller);
    const wanted = parseFloat(style.getPropertyValue("--tile"));
    const inner = width - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const columns = Math.max(1, Math.floor((inner + GAP) / (wanted + GAP)));
    const size = Math.floor((inner - GAP * (columns - 1)) / columns);
    if (columns !== this.columns || size !== this.size) {
      const first = this.columns ? Math.floor(this.top / (this.size + GAP)) * this.columns : 0;
      this.columns = columns;
      this.size = size;
      this.clear();
      this.top = Math.floor(first / columns) * (size + GAP);
    }
    if (atTop) this.top = 0;
    this.count = Math.ceil(this.listing.total / columns);
    this.full = this.count * this.pitch + GAP;
    this.height = Math.min(this.full, MAX_HEIGHT);
    this.spacer.style.height = `${this.height}px`;
    this.spacer.style.setProperty("--size", `${size}px`);
    this.scroller.setAttribute("aria-rowcount", this.count);
    this.scroller.setAttribute("aria-colcount", columns);
    this.moveTo(this.top);
  }

  get pitch() {
    return this.size + GAP;
  }

  get window() {
    return this.scroller.clientHeight;
  }

  /** Whether the list is higher than an element can be. */
  get isScaled() {
    return this.full > this.height;
  }

  /** Scroll to a position in the whole list. */
  moveTo(top) {
    const most = Math.max(this.full - this.window, 0);
    this.top = Math.min(Math.max(top, 0), most);
    const range = Math.max(this.height - this.window, 1);
    this.scrolled = this.isScaled ? Math.round((this.top / most) * range) : this.top;
    this.base = this.scrolled - this.top;
    this.scroller.scrollTop = this.scrolled;
    this.scrolled = this.scroller.scrollTop;
    this.render();
  }

  onScroll() {
    const now = this.scroller.scrollTop;
    const moved = now - this.scrolled;
    if (moved === 0 || !this.listing) return;
    this.scrolled = now;
    this.isUpward = moved < 0;
    if (Math.abs(moved) > JUMP * this.window) {
      this.isDragged = performance.now() - this.lastJump < DRAG_MS;
      this.lastJump = performance.now();
    }
    if (!this.isScaled) {
      this.top = now;
    } else if (Math.abs(moved) > JUMP * this.window || this.isAtEnd(now)) {
      const share = now / Math.max(this.height - this.window, 1);
      this.top = share * Math.max(this.full - this.window, 0);
      this.base = now - this.top;
    } else {
      this.top += moved; // a wheel moves by what it says, in a long list, too
    }
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.isScaled && this.moveTo(this.top), 250);
    this.renderSoon();
  }

  isAtEnd(now) {
    return now <= 0 || now >= this.height - this.window - 1;
  }

  renderSoon() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.render();
    });
  }

  render() {
    if (!this.listing || !this.columns) return;
    const above = this.window * (this.isUpward ? AHEAD : BEHIND);
    const below = this.window * (this.isUpward ? BEHIND : AHEAD);
    const first = Math.max(Math.floor((this.top - above) / this.pitch), 0);
    const last = Math.min(Math.ceil((this.top + this.window + below) / this.pitch), this.count) - 1;
    for (const [number, row] of this.rows) {
      if (number >= first && number <= last) continue;
      discard(row);
      this.rows.delete(number);
    }
    for (let number = first; number <= last; number++) {
      if (!this.rows.has(number)) this.rows.set(number, this.makeRow(number));
      this.rows.get(number).style.transform = `translateY(${this.base + number * this.pitch}px)`;
    }
    this.fill();
    this.load(first * this.columns, (last + 1) * this.columns - 1);
  }

  async load(first, last) {
    const listing = this.listing;
    try {
      if (await listing.want(first, last)) if (listing === this.listing) this.fill();
    } catch (error) {
      this.options.failed(error);
    }
  }

  makeRow(number) {
    const row = element("div", { class: "row", role: "row", "aria-rowindex": number + 1 });
    const start = number * this.columns;
    for (let index = start; index < Math.min(start + this.columns, this.listing.total); index++) {
      const cell = element("div", {
        class: "tile",
        role: "gridcell",
        id: `tile-${index}`,
        "data-index": index,
        "aria-colindex": index - start + 1,
      });
      row.append(cell);
    }
    this.spacer.append(row);
    return row;
  }

  /** Give images to the tiles that have none. Those in the window come first. */
  fill() {
    const rests = !this.isDragged || performance.now() - this.lastJump > HURRY_MS;
    if (!rests) {
      clearTimeout(this.hurry);
      this.hurry = setTimeout(() => this.fill(), HURRY_MS);
    }
    const middle = (this.top + this.window / 2) / this.pitch;
    const rows = [...this.rows].sort(([a], [b]) => Math.abs(a - middle) - Math.abs(b - middle));
    const wanted = [];
    for (const [, row] of rows) {
      for (const tile of row.children) {
        const image = this.listing.at(Number(tile.dataset.index));
        if (!image) continue;
        if (!tile.firstChild && rests) wanted.push([this.fillTile(tile, image), image, this.options.thumbnail(image)]);
        this.mark(tile, image);
      }
    }
    const shown = this.columns * Math.ceil(this.window / this.pitch + 1);
    this.loadPictures(wanted.slice(0, shown));
    this.loadPictures(wanted.slice(shown));
  }

  /** Load the thumbnails that are at hand at once, and then the others one by one. */
  async loadPictures(wanted) {
    if (!wanted.length) return;
    const files = await this.options.thumbnails(wanted.map(([, image]) => image)).catch(() => []);
    wanted.forEach(([picture, , address], at) => {
      if (!picture.isConnected) return; // scrolled past
      picture.src = files[at] ? URL.createObjectURL(files[at]) : address;
    });
  }

  /** Give an image to a tile; return its picture, which has no address yet. */
  fillTile(tile, image) {
    const [, path] = image;
    const picture = element("img", { alt: "", draggable: "false", decoding: "async" });
    picture.addEventListener("load", () => {
      tile.classList.add("ready");
      URL.revokeObjectURL(picture.src);
    });
    picture.addEventListener("error", () => {
      if (!picture.isConnected) return;
      picture.remove();
      tile.classList.add("missing");
      tile.append(element("span", { class: "why", text: fileName(path) }));
      tile.setAttribute("aria-label", `${path}, cannot be shown`);
      this.options.problem();
    });
    tile.title = path;
    tile.setAttribute("aria-label", path);
    tile.append(picture, element("span", { class: "check", "aria-hidden": "true" }));
    return picture;
  }

  mark(tile, image) {
    const isSelected = this.options.isSelected(image);
    tile.classList.toggle("selected", isSelected);
    tile.setAttribute("aria-selected", isSelected);
    const isCurrent = Number(tile.dataset.index) === this.current;
    tile.classList.toggle("current", isCurrent);
    if (isCurrent) this.scroller.setAttribute("aria-activedescendant", tile.id);
  }

  onClick(event) {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    const index = Number(tile.dataset.index);
    const image = this.listing.at(index);
    if (!image) return;
    this.current = index;
    if (event.shiftKey) this.selectRange(this.anchor, index);
    else if (event.ctrlKey || event.metaKey || event.target.closest(".check")) {
      this.options.toggle(image);
    } else this.options.open(image);
    if (!event.shiftKey) this.anchor = index;
    this.fill();
  }

  /** Select a range, and load those of its images that were never in the window. */
  async selectRange(from, to) {
    const { listing } = this;
    try {
      const images = await listing.range(Math.min(from, to), Math.max(from, to));
      if (listing === this.listing) this.options.select(images);
    } catch (error) {
      this.options.failed(error);
    }
  }

  onKey(event) {
    if (!this.listing || event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(Math.floor(this.window / this.pitch), 1) * this.columns;
    const moves = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns,
      PageUp: -page,
      PageDown: page,
      Home: -this.listing.total,
      End: this.listing.total,
    };
    const image = this.listing.at(this.current);
    if (event.key in moves) this.moveCurrent(moves[event.key], event.shiftKey);
    else if (event.key === "Enter" && image) this.options.open(image);
    else if (event.key === " " && image) this.options.toggle(image);
    else return;
    event.preventDefault();
  }

  moveCurrent(by, extends_) {
    const last = this.listing.total - 1;
    const target = Math.min(Math.max(this.current + by, 0), Math.max(last, 0));
    this.current = target;
    if (extends_) this.selectRange(this.anchor, target);
    else this.anchor = target;
    const y = Math.floor(target / this.columns) * this.pitch;
    if (y < this.top) this.moveTo(y);
    else if (y + this.pitch > this.top + this.window) this.moveTo(y + this.pitch + GAP - this.window);
    else this.fill();
  }
}

/** Remove a row, and stop what it still loads. */
function discard(row) {
  for (const picture of row.querySelectorAll("img")) {
    if (picture.complete) continue;
    URL.revokeObjectURL(picture.src);
    picture.src = "data:,";
  }
  row.remove();
}
