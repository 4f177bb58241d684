// Where images come from: the server, or the files of an exported page.
// An image is a list: id, path, width, height.

import { readMap } from "./map.js";

const PAGE = 240; // images that are asked for at a time

/** Images in an order, loaded page by page when they are needed. */
export class Listing {
  constructor(total, load) {
    this.total = total;
    this.load = load;
    this.pages = new Map();
  }

  /** Return an image; undefined if it has not been loaded. */
  at(index) {
    const page = this.pages.get(Math.floor(index / PAGE));
    return Array.isArray(page) ? page[index % PAGE] : undefined; // or else it is a promise
  }

  /** Load the images of a range, and resolve to true if any is new. */
  async want(first, last) {
    const wanted = [];
    for (let page = Math.max(Math.floor(first / PAGE), 0); page * PAGE <= last; page++) {
      if (page * PAGE >= this.total) break;
      if (!Array.isArray(this.pages.get(page))) wanted.push(this.page(page));
    }
    await Promise.all(wanted);
    return wanted.length > 0;
  }

  /** Return all images of a range. */
  async range(first, last) {
    const images = [];
    for (let page = Math.floor(first / PAGE); page * PAGE <= last; page++) {
      const start = page * PAGE;
      images.push(...(await this.page(page)).slice(Math.max(first - start, 0), last - start + 1));
    }
    return images;
  }

  /** Return the images of a page, which are asked for once. */
  page(number) {
    if (!this.pages.has(number)) this.pages.set(number, this.loadPage(number));
    return Promise.resolve(this.pages.get(number));
  }

  async loadPage(number) {
    try {
      const images = await this.load(number * PAGE, PAGE);
      this.pages.set(number, images);
      if (this.pages.size > 400) this.pages.delete(this.pages.keys().next().value);
      return images;
    } catch (error) {
      this.pages.delete(number);
      throw error;
    }
  }
}

/** The server that this page came from. */
export class ServerSource {
  canSearch = true;

  async ask(path, options) {
    return (await this.fetch(path, options)).json();
  }

  /** Return an answer; throw what a user can read if there is none. */
  async fetch(path, options) {
    const answer = await fetch(path, options).catch(() => {
      throw new Error("The server does not answer. Is extract view still running?");
    });
    if (answer.ok) return answer;
    // The token of this address is that of an earlier server.
    if (answer.status === 403) throw new Error("extract view was started again. Open the address that it printed.");
    const content = await answer.json().catch(() => ({}));
    throw new Error(content.error || `The server answered ${answer.status}.`);
  }

  state() {
    return this.ask("state");
  }

  reload() {
    return this.ask("reload", { method: "POST" });
  }

  async listing(store, filter) {
    const query = (start, count) =>
      `rows/${store}?start=${start}&count=${count}&filter=${encodeURIComponent(filter)}`;
    const first = await this.ask(query(0, PAGE));
    const load = async (start, count) => (await this.ask(query(start, count))).images;
    const listing = new Listing(first.total, load);
    listing.pages.set(0, first.images);
    return listing;
  }

  listingOf(store, ids) {
    return new Listing(ids.length, (start, count) => this.images(store, ids.slice(start, start + count)));
  }

  async images(store, ids) {
    const body = JSON.stringify(ids);
    return (await this.ask(`images/${store}`, { method: "POST", body })).images;
  }

  thumbnail(store, id) {
    return `thumbnail/${store}/${id}`;
  }

  /** Return the thumbnails that the server has at hand, as files; null for each other one. */
  async thumbnails(store, ids) {
    const answer = await this.fetch(`thumbnails/${store}`, { method: "POST", body: JSON.stringify(ids) });
    const content = await answer.arrayBuffer();
    const view = new DataView(content);
    let end = 0;
    return ids.map(() => {
      const start = end + 4;
      end = start + view.getUint32(end, true);
      return start < end ? new Blob([content.slice(start, end)], { type: "image/jpeg" }) : null;
    });
  }

  picture(store, id) {
    return `picture/${store}/${id}`;
  }

  neighbors(store, id, count) {
    return this.ask(`neighbors/${store}/${id}?k=${count}`);
  }

  search(blob, count) {
    return this.ask(`search?k=${count}`, { method: "POST", body: blob });
  }

  /** Ask for what the server may have to compute first. */
  async wait(path) {
    for (let pause = 200; ; pause = Math.min(pause * 1.5, 2000)) {
      const answer = await this.fetch(path);
      if (answer.status !== 202) return answer;
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  async map(store, method) {
    return readMap(await (await this.wait(`map/${store}?method=${method}`)).arrayBuffer());
  }

  async duplicates(store, percent, start, isAgainst) {
    const query = `percent=${percent}&start=${start}&against=${isAgainst ? 1 : 0}`;
    return (await this.wait(`duplicates/${store}?${query}`)).json();
  }

  async outliers(store, start) {
    return (await this.wait(`outliers/${store}?start=${start}`)).json();
  }

  failures(store) {
    return this.ask(`failures/${store}`);
  }

  async list(store, ids) {
    return (await this.fetch(`list/${store}`, { method: "POST", body: JSON.stringify(ids) })).blob();
  }
}
