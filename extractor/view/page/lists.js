// Views that are lists: images without a row.

import { element, plural } from "./dom.js";

/** Show failures with their reasons, and images that moved or changed since. */
export async function showFailures(panel, source, store) {
  const content = await source.failures(store);
  const box = element("div", { class: "list" });
  if (content.problems.length) {
    box.append(
      element("h2", { text: `${plural(content.problems.length, "image")} moved or changed since` }),
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
  panel.replaceChildren(box);
}

function table(heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })));
  const body = rows.map((row) => element("tr", {}, ...row.map((text) => element("td", { text }))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}
