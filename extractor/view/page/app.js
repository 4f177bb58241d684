// The page: head, tabs, filter, selection, and what the address says.

import { announce, debounced, element, plural, saveFile } from "./dom.js";
import { Detail } from "./detail.js";
import { Grid } from "./grid.js";
import { duplicatesBox, failuresBox, markTiles, outliersBox } from "./lists.js";
import { MapView } from "./map.js";
import { Selection } from "./selection.js";
import { ServerSource } from "./source.js";
import { StaticSource } from "./static.js";

const LOOK_MS = 5000; // between questions whether a store grew
const FILTER_MS = 150;

const find = (id) => document.getElementById(id);

class App {
  source = globalThis.EXTRACT_VIEW ? new StaticSource(globalThis.EXTRACT_VIEW) : new ServerSource();
  selection = new Selection();
  stores = [];
  store = 0; // whose images are shown
  tab = "images";
  subset = null; // ids that are shown instead of all images

  async start() {
    this.detail = new Detail(find("detail"), this);
    this.grid = new Grid(find("grid"), {
      thumbnail: ([id]) => this.source.thumbnail(this.store, id),
      thumbnails: (images) => this.source.thumbnails(this.store, images.map(([id]) => id)),
      open: ([id]) => this.open(this.store, id),
      isSelected: ([id]) => this.selection.has(this.store, id),
      toggle: ([id]) => this.selection.toggle(this.store, id),
      select: (images) => this.selection.set(this.store, images.map(([id]) => id), true),
      problem: debounced(400, () => this.look()),
      failed: (error) => announce(error.message, true),
    });
    this.listen();
    for (const name of this.source.absent || []) find(`tab-${name}`).remove();
    const [state, listing] = await Promise.all([this.source.state(), this.source.listing(0, find("filter").value)]);
    this.take(state);
    this.showListing(listing);
    this.follow();
    if (this.source.canSearch) setInterval(() => this.look(), LOOK_MS);
    document.documentElement.dataset.ready = "true";
  }

  listen() {
    find("filter").addEventListener("input", debounced(FILTER_MS, () => this.list()));
    find("filter-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.list();
      find("grid").focus();
    });
    for (const tab of tabs()) tab.addEventListener("click", () => this.go(tab.id.slice(4)));
    find("tabs").addEventListener("keydown", (event) => this.onTabKey(event));
    this.selection.addEventListener("change", () => this.onSelection());
    find("selected-clear").addEventListener("click", () => this.selection.clear());
    find("selected-save").addEventListener("click", () => this.save());
    find("selected-show").addEventListener("click", () => this.showIds([...this.selection.of(this.store)]));
    addEventListener("hashchange", () => this.follow());
    addEventListener("keydown", (event) => this.onKey(event));
    this.listenForImages();
  }

  listenForImages() {
    if (!this.source.canSearch) {
      find("choose").hidden = true;
      return;
    }
    find("choose").addEventListener("click", () => find("file").click());
    find("file").addEventListener("change", (event) => {
      this.searchBy(event.target.files);
      event.target.value = "";
    });
    addEventListener("paste", (event) => this.searchBy(event.clipboardData.files));
    addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("dragging");
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("dragging");
    });
    addEventListener("drop", (event) => {
      event.preventDefault();
      document.body.classList.remove("dragging");
      this.searchBy(event.dataTransfer.files);
    });
  }

  /** Take what the server says about the stores. */
  take(state) {
    const isNew = this.stores.some((store, at) => store.token !== state.stores[at].token);
    const isAnew = this.stores.some((store, at) => store.anew !== state.stores[at].anew);
    this.stores = state.stores;
    if (isAnew) {
      this.forget();
      announce("A store was made anew or changed a lot. The selection is gone.");
    }
    const { name, model, rows, of, folder } = this.stores[this.store];
    document.title = `${name} · extract view`;
    find("title").textContent = name;
    find("title").title = folder || "";
    const all = of && of !== rows ? ` of ${of.toLocaleString("en-US")}` : "";
    const count = all ? `${rows.toLocaleString("en-US")}${all} images` : plural(rows, "image");
    find("facts").textContent = `${model} · ${count}`;
    find("detail").classList.toggle("two", this.stores.length > 1);
    this.showStores();
    this.showNotices();
    if (isNew) {
      find("map").replaceChildren();
      this.refresh();
    }
  }

  /** Forget all ids, which stand for other images now. */
  forget() {
    this.subset = null;
    find("filter").disabled = false;
    this.selection.clear();
    if (!find("detail").hidden) this.close();
  }

  showStores() {
    const box = find("stores");
    box.hidden = this.stores.length < 2;
    const buttons = this.stores.map(({ name, model }, at) =>
      element("button", {
        type: "button",
        "aria-pressed": String(at === this.store),
        title: model,
        text: name,
        onclick: () => this.choose(at),
      }),
    );
    if (!box.hidden && box.children.length === buttons.length) {
      buttons.forEach((button, at) => {
        box.children[at].setAttribute("aria-pressed", button.getAttribute("aria-pressed"));
      });
    } else box.replaceChildren(...buttons);
  }

  showNotices() {
    const notices = [];
    const grown = this.stores.filter(({ newer }) => newer !== null);
    if (grown.length) {
      const more = grown.reduce((sum, { newer, rows }) => sum + newer - rows, 0);
      const what = more > 0 ? `${plural(more, "more image")} in the store.` : "The store changed.";
      const button = element("button", { type: "button", onclick: () => this.reload(), text: "Reload" });
      notices.push(element("p", {}, what, button));
    }
    const { problems } = this.stores[this.store];
    if (problems) {
      const button = element("button", {
        type: "button",
        class: "quiet",
        onclick: () => this.go("failures"),
        text: "Which?",
      });
      const what = `${plural(problems, "image")} moved or changed since, or cannot be decoded.`;
      notices.push(element("p", {}, what, button));
    }
    const text = notices.map((notice) => notice.textContent).join();
    if (find("notices").dataset.text === text) return; // no need to read it out again
    find("notices").dataset.text = text;
    find("notices").replaceChildren(...notices);
  }

  async look() {
    if (document.hidden) return;
    await this.guarded(async () => this.take(await this.source.state()));
  }

  async reload() {
    await this.guarded(async () => this.take(await this.source.reload()));
  }

  async choose(store) {
    this.store = store;
    this.subset = null;
    this.take({ stores: this.stores });
    this.onSelection();
    find("map").replaceChildren();
    await this.refresh();
  }

  /** Show the images that match the filter. */
  async list() {
    const number = (this.listed = (this.listed || 0) + 1);
    await this.guarded(async () => {
      const text = find("filter").value;
      const listing = this.subset
        ? this.source.listingOf(this.store, this.subset)
        : await this.source.listing(this.store, text);
      if (number === this.listed) this.showListing(listing);
    });
  }

  showListing(listing) {
    const all = this.stores[this.store].rows;
    const some = `${listing.total.toLocaleString("en-US")} of ${plural(all, "image")}`;
    const count = find("count");
    count.replaceChildren(...(listing.total === all ? [] : [some]));
    if (this.subset) {
      const button = element("button", {
        type: "button",
        class: "quiet",
        onclick: () => this.showIds(null),
        text: "Show all",
      });
      count.append(" ", button);
    }
    this.grid.show(listing);
  }

  /** Show some images in the grid; null for all. */
  async showIds(ids) {
    this.subset = ids;
    find("filter").disabled = ids !== null;
    await this.go("images");
    await this.list();
  }

  async go(name) {
    this.tab = name;
    for (const tab of tabs()) {
      const isChosen = tab.id === `tab-${name}`;
      tab.setAttribute("aria-selected", isChosen);
      tab.tabIndex = isChosen ? 0 : -1;
      find(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
    if (name === "images") this.grid.layout();
    else if (name !== "map" || !find("map").querySelector("canvas")) await this.refresh();
  }

  async refresh() {
    const number = (this.refreshed = (this.refreshed || 0) + 1);
    if (this.tab === "images") return this.list();
    const { tab } = this;
    const panel = find(tab);
    panel.replaceChildren(element("p", { class: "empty", role: "status", text: "Loading…" }));
    const late = setTimeout(() => {
      const text = "Computing. This takes a while for a large store, once.";
      panel.querySelector(".empty")?.replaceChildren(text);
    }, 1500);
    const boxes = { map: mapShower, duplicates: duplicatesBox, outliers: outliersBox, failures: failuresBox };
    let box;
    try {
      box = await boxes[tab](panel, this);
    } catch (error) {
      box = element("p", { class: "empty problem", role: "alert", text: error.message });
    }
    clearTimeout(late);
    // By now, another store may be shown, whose images have the same ids.
    if (number !== this.refreshed) return;
    if (typeof box === "function") box();
    else panel.replaceChildren(box);
  }

  showMap(panel, store, map) {
    this.map?.close();
    this.map = new MapView(panel, map, {
      thumbnail: (id) => this.source.thumbnail(store, id),
      open: (id) => this.open(store, id),
      isSelected: (id) => this.selection.has(store, id),
      select: (ids) => this.selection.set(store, ids, true),
      list: (ids) => this.showIds(ids),
      choose: (method) => {
        panel.dataset.method = method;
        this.refresh();
      },
    });
    this.map.mark();
  }

  onTabKey(event) {
    const all = tabs();
    const at = all.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || at < 0) return;
    const next = all[(at + step + all.length) % all.length];
    next.focus();
    this.go(next.id.slice(4));
    event.preventDefault();
  }

  onKey(event) {
    const isTyping = ["INPUT", "TEXTAREA"].includes(document.activeElement?.tagName);
    if (event.key === "Escape" && isTyping) find("grid").focus();
    else if (event.key === "Escape" && !find("detail").hidden) this.close();
    else if (event.key === "/" && !isTyping) {
      find("filter").focus();
      event.preventDefault();
    }
  }

  onSelection() {
    const { size } = this.selection;
    find("selected").hidden = size === 0;
    find("selected-count").textContent = `${size.toLocaleString("en-US")} selected`;
    this.grid.fill();
    markTiles(this);
    if (this.tab === "map") this.map?.mark();
  }

  async save() {
    await this.guarded(async () => {
      for (const [store, ids] of this.selection.ids) {
        if (!ids.size) continue;
        const name = this.stores.length > 1 ? `selection-${this.stores[store].name.replaceAll("/", "-")}.txt` : "selection.txt";
        saveFile(name, await this.source.list(store, [...ids]));
      }
      announce("List saved. extract --list takes it.");
    });
  }

  open(store, id) {
    if (!find("detail").contains(document.activeElement)) this.opener = document.activeElement;
    location.hash = `image/${store}/${id}`;
  }

  close() {
    this.detail.close();
    history.replaceState(null, "", location.pathname + location.search);
    const panel = find(this.tab);
    const next = panel.contains(this.opener) ? this.opener : panel.querySelector("[tabindex='0']") || panel;
    next.focus({ preventScroll: true });
  }

  /** Show what the address says. */
  follow() {
    const parts = location.hash.match(/^#image\/(\d+)\/(\d+)$/);
    if (!parts) this.detail.close();
    else if (Number(parts[1]) < this.stores.length) this.detail.image(Number(parts[1]), Number(parts[2]));
  }

  searchBy(files) {
    const image = [...(files || [])].find(({ type }) => type.startsWith("image/")) || files?.[0];
    if (!image) return;
    if (location.hash) history.replaceState(null, "", location.pathname + location.search);
    this.detail.search(image, image.name || "pasted image");
  }

  async guarded(work) {
    try {
      await work();
    } catch (error) {
      announce(error.message, true);
    }
  }
}

/** Return what shows the map in its panel, which has to be in the document. */
async function mapShower(panel, app) {
  const { store } = app;
  const map = await app.source.map(store, panel.dataset.method || "");
  return () => app.showMap(panel, store, map);
}

function tabs() {
  return [...document.querySelectorAll('[role="tab"]')];
}

const app = new App();
app.start().catch((error) => announce(error.message, true));
