// Views that are lists: duplicates, outliers, and images without a row.

import { thumbnail } from "./detail.js";
import { element, plural } from "./dom.js";

/**
 * Return groups of images that are equal or nearly so. The first of a group is the one to keep, or
 * the image of the store whose matches are in the other store.
 */
export async function duplicatesBox(panel, app) {
  const { source, store, stores } = app;
  const percent = panel.dataset.percent || "95";
  const isAgainst = stores[store].comparable && panel.dataset.against === "yes";
  const content = await source.duplicates(store, percent, 0, isAgainst);
  const box = element("div", { class: "list" });
  box.append(duplicatesTools(box, panel, app, content, percent, isAgainst));
  if (!content.total) box.append(element("p", { class: "empty", text: "No duplicates." }));
  const show = (groups) => groups.map((group) => duplicateGroup(group, app, store, isAgainst));
  box.append(...show(content.groups));
  more(app, box, content.groups.length, content.total, async (start) => {
    const next = await source.duplicates(store, percent, start, isAgainst);
    return show(next.groups);
  });
  return box;
}

function duplicatesTools(box, panel, app, content, percent, isAgainst) {
  const { source, store, stores, selection } = app;
  const least = ["90", "95", "98", "99", "100"].map((value) => [value, `similarity ${value} %`]);
  const similarity = choice("Least similarity", least, percent, (value) => {
    panel.dataset.percent = value;
    app.refresh();
  });
  similarity.disabled = !source.canSearch; // an exported page holds one
  const { name } = stores[store];
  const other = stores[1 - store]?.name;
  const scopes = [["no", `within ${name}`], ["yes", `${name} against ${other}`]];
  const scope = choice("Where duplicates are", scopes, isAgainst ? "yes" : "no", (value) => {
    panel.dataset.against = value;
    app.refresh();
  });
  const selectAll = element("button", {
    type: "button",
    text: isAgainst ? "Select the first of each shown group" : "Select all but the first of each shown group",
    onclick: () => {
      const shown = [...box.querySelectorAll(".group")].flatMap((group) => group.chosen);
      selection.set(store, shown, true);
    },
  });
  const found = isAgainst
    ? `${plural(content.total, "image")} of ${name} also in ${other}`
    : `${plural(content.total, "group")}, ${plural(content.redundant, "redundant image")}`;
  const recall = content.recall === null || content.method === "exact" ? "" : `, recall ${content.recall.toFixed(3)}`;
  return element(
    "div",
    { class: "list-tools" },
    similarity,
    stores[store].comparable ? scope : null,
    content.total ? selectAll : null,
    element("span", { class: "facts", text: `${found} · ${content.method}${recall}` }),
  );
}

function choice(label, options, chosen, change) {
  const box = element("select", { "aria-label": label, onchange: () => change(box.value) });
  for (const [value, text] of options) box.append(element("option", { value, text, selected: value === chosen }));
  return box;
}

function duplicateGroup({ kind, images, omitted }, app, store, isAgainst) {
  const count = images.length + omitted;
  const isSame = kind === "identical";
  const title = isAgainst
    ? `${isSame ? "The same file" : "Nearly the same"} as ${plural(count - 1, "image")} of ${app.stores[1 - store].name}`
    : `${plural(count, "image")}, ${isSame ? "the same file" : "nearly the same"}`;
  const [first, ...others] = images;
  const tiles = [
    tile(first, isAgainst ? app.stores[store].name : "keep", app, store),
    ...others.map((image) => {
      const [, , , , similarity, isInOther] = image;
      return tile(image, similarity === null ? "" : similarity.toFixed(3), app, isInOther ? 1 - store : store);
    }),
  ];
  const group = element("section", { class: "group" }, element("h3", { text: title }), element("ol", { class: "strip" }, ...tiles));
  group.chosen = (isAgainst ? [first] : others).map(([id]) => id);
  return group;
}

/** Return images that are unlike all others, and labels that the neighbors do not share. */
export async function outliersBox(panel, app) {
  const { source, store } = app;
  const content = await source.outliers(store, 0);
  const box = element("div", { class: "list" });
  if (content.label_errors.length) {
    const tiles = content.label_errors.map((image) => {
      const [, , , , agreement, ...labels] = image;
      const [label, suggested] = labels.map((name) => (name === "." ? "(no folder)" : name));
      return tile(image, `${label} → ${suggested}?  ${Math.round(100 * agreement)}\u00a0%`, app, store);
    });
    box.append(
      element("h2", { text: `${plural(content.errors_total, "probable label error")}` }),
      element("p", { class: "facts", text: "The neighbors agree on another folder. The share of them that do is shown." }),
      element("ol", { class: "strip" }, ...tiles),
    );
  }
  box.append(
    element("h2", { text: "Unlike all others" }),
    element("p", { class: "facts", text: `Mean cosine distance to the nearest images, the largest first · ${content.method}` }),
  );
  const show = (images) => images.map((image) => tile(image, image[4].toFixed(3), app, store));
  const list = element("ol", { class: "strip" }, ...show(content.outliers));
  box.append(list);
  more(app, box, content.outliers.length, content.total, async (start) => {
    list.append(...show((await source.outliers(store, start)).outliers));
    return [];
  });
  return box;
}

function tile(image, caption, app, store) {
  const [id, path] = image;
  const { selection } = app;
  const button = element(
    "button",
    {
      type: "button",
      class: "hit",
      title: path,
      "data-id": id,
      "data-store": store,
      "aria-label": caption ? `${path}, ${caption}` : path,
      onclick: (event) => {
        if (event.ctrlKey || event.metaKey) selection.toggle(store, id);
        else app.open(store, id);
      },
    },
    thumbnail(app.source.thumbnail(store, id)),
    element("span", { class: "score", text: caption }),
  );
  markTile(button, selection.has(store, id));
  return element("li", {}, button);
}

/** Show which tiles of the lists are selected. */
export function markTiles(app) {
  for (const button of document.querySelectorAll(".list .hit[data-id]")) {
    markTile(button, app.selection.has(Number(button.dataset.store), Number(button.dataset.id)));
  }
}

function markTile(button, isSelected) {
  button.classList.toggle("selected", isSelected);
  button.setAttribute("aria-pressed", isSelected);
}

/** Add a button that shows the next part of a list. */
function more(app, box, shown, total, next) {
  if (shown >= total) return;
  let count = shown;
  const button = element("button", { type: "button", class: "more", text: "Show more" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    await app.guarded(async () => {
      const before = box.querySelectorAll("li").length;
      const added = await next(count);
      button.before(...added);
      count += added.length || box.querySelectorAll("li").length - before;
    });
    button.disabled = false;
    if (count >= total) button.remove();
  });
  box.append(button);
}

/** Return failures with their reasons, and images that moved or changed since. */
export async function failuresBox(panel, app) {
  const content = await app.source.failures(app.store);
  const box = element("div", { class: "list" });
  if (content.problems.length) {
    box.append(
      element("h2", { text: `${plural(content.problems.length, "image")} cannot be shown` }),
      table(["path", "reason", "message"], content.problems),
    );
  }
  if (content.total) {
    const reasons = Object.entries(content.reasons).sort((a, b) => b[1] - a[1]);
    const counts = reasons.map(([reason, count]) => `${count.toLocaleString("en-US")} ${reason}`);
    box.append(
      element("h2", { text: `${plural(content.total, "image")} could not be embedded` }),
      element("p", { class: "facts", text: counts.join(", ") }),
      table(["path", "reason", "message"], content.failures),
    );
    if (content.failures.length < content.total) {
      const shown = content.failures.length.toLocaleString("en-US");
      box.append(element("p", { class: "facts", text: `The first ${shown} are shown.` }));
    }
  }
  if (!box.firstChild) box.append(element("p", { class: "empty", text: "No failures." }));
  return box;
}

function table(heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })));
  const body = rows.map((row) => element("tr", {}, ...row.map((text) => element("td", { text }))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}
