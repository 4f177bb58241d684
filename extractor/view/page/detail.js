// The panel beside the grid: one image, and its neighbors in every store.

import { element, fileName, whisper } from "./dom.js";

const NEIGHBORS = 24;

export class Detail {
  /**
   * @param panel Element of the panel.
   * @param app What is shown: source, stores, selection, and open(store, id).
   */
  constructor(panel, app) {
    this.panel = panel;
    this.app = app;
    this.shown = 0; // counts what was asked for, so that late answers are dropped
    panel.addEventListener("keydown", (event) => {
      if (event.key === "Escape") app.close();
    });
  }

  close() {
    this.shown++;
    this.panel.hidden = true;
    this.panel.replaceChildren();
  }

  /** Show an image of a store with its neighbors. */
  async image(store, id) {
    const number = ++this.shown;
    this.begin("Image");
    try {
      const answer = await this.app.source.neighbors(store, id, NEIGHBORS);
      if (number !== this.shown) return;
      const [, path, width, height] = answer.image;
      const facts = `${width.toLocaleString("en-US")} × ${height.toLocaleString("en-US")} pixels`;
      this.fill(fileName(path), path, this.app.source.picture(store, id), facts, answer.results, store, id);
    } catch (error) {
      this.fail(number, error);
    }
  }

  /** Show what is like an image that the user brought. */
  async search(blob, name) {
    const number = ++this.shown;
    this.begin(name);
    this.panel.querySelector(".busy").textContent = "Searching. The first search loads the model.";
    try {
      const answer = await this.app.source.search(blob, NEIGHBORS);
      if (number !== this.shown) return;
      this.fill(name, "your image", URL.createObjectURL(blob), "", answer.results);
    } catch (error) {
      this.fail(number, error);
    }
  }

  begin(title) {
    this.panel.hidden = false;
    this.panel.replaceChildren(
      this.head(title),
      element("p", { class: "busy", role: "status", text: "Loading…" }),
    );
  }

  head(title) {
    const close = element("button", {
      class: "icon close",
      type: "button",
      "aria-label": "Close",
      title: "Close (Escape)",
      onclick: () => this.app.close(),
      text: "✕",
    });
    return element("header", {}, element("h2", { text: title, tabindex: "-1" }), close);
  }

  fail(number, error) {
    if (number !== this.shown) return;
    this.panel.querySelector(".busy")?.replaceWith(
      element("p", { class: "problem", role: "alert", text: error.message }),
    );
  }

  fill(title, path, address, facts, results, store, id) {
    const picture = element("img", { src: address, alt: path });
    const why = id === undefined ? "This browser cannot show the image." : "This image moved or changed, or cannot be decoded.";
    picture.addEventListener("error", () => picture.replaceWith(element("p", { class: "problem", text: why })));
    const about = element("div", { class: "about" });
    about.append(element("p", { class: "path", text: path }));
    if (facts) about.append(element("p", { class: "facts", text: facts }));
    if (id !== undefined) about.append(this.selectButton(store, id));
    const lists = element("div", { class: "results" });
    const shared = sharedPaths(results);
    for (const result of results) lists.append(this.results(result, results.length > 1, shared));
    this.panel.replaceChildren(this.head(title), element("figure", {}, picture), about, lists);
    this.panel.querySelector("h2").focus({ preventScroll: true });
    this.panel.scrollTop = 0;
    const hits = results.reduce((sum, result) => sum + result.hits.length, 0);
    whisper(hits ? `${hits} similar images found` : "no similar images");
  }

  selectButton(store, id) {
    const { selection } = this.app;
    const button = element("button", { type: "button", class: "quiet" });
    const show = () => {
      const isSelected = selection.has(store, id);
      button.textContent = isSelected ? "Selected" : "Select";
      button.setAttribute("aria-pressed", isSelected);
    };
    button.addEventListener("click", () => {
      selection.toggle(store, id);
      show();
    });
    show();
    return button;
  }

  results(result, isOneOfTwo, shared) {
    const store = this.app.stores[result.store];
    const title = isOneOfTwo ? `Neighbors in ${store.name}` : "Neighbors";
    const section = element("section", {}, element("h3", { text: title }));
    if (result.error) {
      section.append(element("p", { class: "problem", text: result.error }));
      return section;
    }
    const facts = [store.model, result.method, ...(isOneOfTwo && shared.size ? ["outlined: in both"] : [])];
    section.append(element("p", { class: "facts", text: facts.join(" · ") }));
    const list = element("ol", { class: "hits" });
    for (const [id, path, , , score] of result.hits) {
      const isShared = isOneOfTwo && shared.has(path);
      const label = `${path}, score ${score.toFixed(3)}${isShared ? ", found by both" : ""}`;
      const hit = element(
        "button",
        {
          type: "button",
          class: isShared ? "hit shared" : "hit",
          "aria-label": label,
          title: path,
          onclick: () => this.app.open(result.store, id),
        },
        thumbnail(this.app.source.thumbnail(result.store, id)),
        element("span", { class: "score", text: score.toFixed(3) }),
      );
      list.append(element("li", {}, hit));
    }
    section.append(list);
    return section;
  }
}

/** Return a thumbnail; a plain tile if it cannot be had. */
export function thumbnail(address) {
  const picture = element("img", { alt: "", loading: "lazy", decoding: "async", src: address });
  picture.addEventListener("error", () =>
    picture.replaceWith(element("span", { class: "missing", text: "cannot be shown" })),
  );
  return picture;
}

/** Return the paths that every result has. */
function sharedPaths(results) {
  const [first, ...others] = results.map((result) => new Set(result.hits.map((hit) => hit[1])));
  return new Set([...first].filter((path) => others.every((paths) => paths.has(path))));
}
