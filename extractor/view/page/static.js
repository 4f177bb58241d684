// The source of an exported page: everything is in data.js, and nothing has to be asked for.

import { Listing } from "./source.js";

export class StaticSource {
  canSearch = false;

  constructor(data) {
    this.stores = data.stores;
    for (const store of this.stores) {
      store.byId = new Map(store.images.map((image, at) => [image[0], at]));
      store.byPath = new Map(store.images.map((image, at) => [image[1], at]));
    }
  }

  /** Views that the page has no data for. */
  get absent() {
    return ["map", "duplicates", "outliers"].filter((name) => !this.stores[0][name]);
  }

  async state() {
    const known = ({ name, model, rows, of, failed }) => ({ name, model, rows, of, failed, newer: null, problems: 0 });
    return { stores: this.stores.map(known) };
  }

  listingOfImages(images) {
    return new Listing(images.length, async (start, count) => images.slice(start, start + count));
  }

  async listing(store, filter) {
    const text = filter.trim();
    const wildcards = { "*": ".*", "?": "." };
    const escaped = [...text].map((char) => wildcards[char] || char.replace(/[\\^$.|+()[\]{}/]/, "\\$&"));
    const pattern = new RegExp(escaped.join(""), "is");
    return this.listingOfImages(this.stores[store].images.filter(([, path]) => !text || pattern.test(path)));
  }

  listingOf(store, ids) {
    const { images, byId } = this.stores[store];
    return this.listingOfImages(ids.filter((id) => byId.has(id)).map((id) => images[byId.get(id)]));
  }

  thumbnail(store, id) {
    return `thumbnails/${store}/${id}.jpg`;
  }

  /** No thumbnail has to be asked for. */
  async thumbnails(store, ids) {
    return ids.map(() => null);
  }

  picture(store, id) {
    return this.thumbnail(store, id);
  }

  async neighbors(store, id, count) {
    const image = this.stores[store].images[this.stores[store].byId.get(id)];
    if (!image) throw new Error("This image is not on the page.");
    const results = this.stores.map((other, number) => {
      const at = other.byPath.get(image[1]);
      if (at === undefined) return { store: number, error: "This store does not hold the image.", hits: [] };
      const found = other.neighbors[at];
      const hits = [];
      for (let next = 0; next < found.length && hits.length < count; next += 2) {
        hits.push([...other.images[found[next]], found[next + 1]]);
      }
      return { store: number, method: "among the images on this page", hits };
    });
    return { image, store, results };
  }

  async map(store) {
    const map = this.stores[store].map;
    return { ...map, ids: Float64Array.from(map.ids), points: Float32Array.from(map.points), isFixed: true };
  }

  async duplicates(store) {
    return this.stores[store].duplicates;
  }

  async outliers(store) {
    return this.stores[store].outliers;
  }

  async failures(store) {
    const { failures, failed, reasons } = this.stores[store];
    return { failures, total: failed, reasons, problems: [] };
  }

  /** Paths relative to the folder of the images, since the page does not know where that is. */
  async list(store, ids) {
    const { images, byId } = this.stores[store];
    const paths = ids.map((id) => images[byId.get(id)][1]);
    const end = paths.some((path) => /[\r\n]/.test(path)) ? "\0" : "\n";
    return new Blob(paths.map((path) => path + end));
  }
}
