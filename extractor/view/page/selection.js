// Images that the user has picked, by store and id.

export class Selection extends EventTarget {
  ids = new Map(); // store to the set of its ids

  of(store) {
    if (!this.ids.has(store)) this.ids.set(store, new Set());
    return this.ids.get(store);
  }

  get size() {
    let size = 0;
    for (const ids of this.ids.values()) size += ids.size;
    return size;
  }

  has(store, id) {
    return this.of(store).has(id);
  }

  toggle(store, id) {
    this.set(store, [id], !this.has(store, id));
  }

  set(store, ids, isSelected) {
    const chosen = this.of(store);
    for (const id of ids) isSelected ? chosen.add(id) : chosen.delete(id);
    this.dispatchEvent(new Event("change"));
  }

  clear() {
    this.ids.clear();
    this.dispatchEvent(new Event("change"));
  }
}
