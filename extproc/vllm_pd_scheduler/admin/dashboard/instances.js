// The instances by role, each a row whose cells change in place.
"use strict";

const ROLES = ["prefill", "decode"];
const CAPTIONS = { prefill: "Prefill", decode: "Decode", encode: "Encode" };
const MOST_ROWS = 100;
const TONES = { healthy: "ok", unhealthy: "bad", ejected: "bad", trial: "warn", draining: "warn", starting: "idle" };
const RANKS = { bad: 0, warn: 1, idle: 2, ok: 3 };

const fleet = { instances: new Map(), roles: {}, showAll: false };

const tone = (instance) => TONES[instance.shown_state] ?? "idle";
const addressOf = (instance) => instance.address ?? `${instance.host}:${instance.port}`;

/** Whether it serves, but what is known of its load is too old to be believed. */
const isOld = (instance) => instance.state === "healthy" && instance.age !== null && instance.kv_cache_usage === null;

function stateOf(instance) {
  return instance.drained ? "drained" : instance.shown_state;
}

/** Say why an instance is not well, or what it has left to do. */
function reasonOf(instance) {
  if (instance.state === "draining") {
    return instance.drained ? "nothing left on it" : `${many(instance.in_flight + instance.pending_handoffs, "request")} left`;
  }
  if (instance.state !== "healthy") return instance.reason ?? "";
  return instance.failures ? `${instance.failures} failed in a row` : "";
}

const COLUMNS = [
  { name: "State", cell: stateCell },
  { name: "In flight", number: true, cell: inFlightCell },
  { name: "Running", number: true, cell: (instance) => number(instance.running) },
  { name: "Queued", number: true, cell: (instance) => number(instance.waiting) },
  { name: "KV cache", number: true, cell: cacheCell },
  { name: "Predicted", number: true, cell: predictedCell },
  { name: "Scraped", number: true, cell: (instance) => (instance.age === null ? "never" : `${age(instance.age)} ago`) },
];

function stateCell(instance) {
  const badge = h("span", { class: "badge", "data-tone": tone(instance) }, stateOf(instance));
  const reason = reasonOf(instance);
  return [badge, reason ? h("small", {}, reason) : ""];
}

/** The requests on an instance, and how many of them other replicas of the scheduler have sent. */
function inFlightCell(instance) {
  const elsewhere = instance.in_flight_elsewhere;
  return elsewhere ? [number(instance.in_flight), h("small", {}, `${number(elsewhere)} elsewhere`)] : number(instance.in_flight);
}

function cacheCell(instance) {
  const share = instance.kv_cache_usage;
  if (share === null) return NONE;
  const bar = h("i", {});
  bar.style.width = `${Math.round(share * 100)}%`;
  return [h("span", { class: share >= 0.9 ? "share full" : "share" }, bar), percent(share)];
}

function predictedCell(instance) {
  const { prefill_left_s: left, decode_step_s: step } = instance.predicted;
  if (instance.role === "encode") return NONE;
  return instance.role === "prefill" ? `${seconds(left)} left` : `${seconds(step)} a token`;
}

/** Rows of one role. */
class RoleTable {
  constructor(role) {
    this.role = role;
    this.rows = new Map();
    this.count = h("span", {});
    this.body = h("tbody", { role: "rowgroup" });
    this.note = h("p", { hidden: true });
    const heads = ["Instance", ...COLUMNS.map((column) => column.name)];
    const isNumber = (index) => index > 0 && COLUMNS[index - 1].number;
    const head = heads.map((text, index) => h("th", { scope: "col", role: "columnheader", class: isNumber(index) ? "number" : null }, text));
    head.push(h("th", { scope: "col", role: "columnheader" }, h("span", { class: "hidden" }, "Actions")));
    // The roles are those that the elements have anyway; on a phone they are laid out as cards, and would lose them.
    this.table = h(
      "table",
      { role: "table" },
      h("caption", {}, CAPTIONS[role], this.count),
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...head)),
      this.body,
    );
    this.element = h("div", { class: "card" }, this.table, this.note);
  }

  draw(status) {
    const all = [...fleet.instances.values()].filter((instance) => instance.role === this.role);
    const sought = byId("filter").value.trim().toLowerCase();
    const texts = (instance) => [instance.id, addressOf(instance), stateOf(instance)];
    let shown = all.filter((instance) => texts(instance).some((text) => text.toLowerCase().includes(sought)));
    const found = shown.length;
    if (found > MOST_ROWS && !fleet.showAll) {
      shown = shown.toSorted((a, b) => RANKS[tone(a)] - RANKS[tone(b)]).slice(0, MOST_ROWS);
    }
    if (all.length === 0 && !ROLES.includes(this.role)) this.element.remove();
    else if (!this.element.isConnected) byId("roles").append(this.element);
    const counts = status?.roles?.[this.role];
    say(this.count, counts ? `${counts.routable} of ${counts.total} can serve` : "");
    this.place(shown);
    this.tellMore(all.length, found, shown.length);
  }

  /** Put rows in their order; one that is in its place already is not touched, so it keeps the focus. */
  place(shown) {
    const ids = new Set(shown.map((instance) => instance.id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      row.element.remove();
      this.rows.delete(id);
    }
    let next = this.body.firstElementChild;
    for (const instance of shown) {
      let row = this.rows.get(instance.id);
      if (!row) this.rows.set(instance.id, (row = new InstanceRow(instance)));
      row.show(instance);
      if (row.element === next) next = next.nextElementSibling;
      else this.body.insertBefore(row.element, next);
    }
  }

  tellMore(all, found, shown) {
    const more = shown < found ? h("button", { type: "button", class: "link", click: showAll }, "Show all") : null;
    this.note.hidden = shown === all && all > 0;
    if (all === 0) this.note.replaceChildren("There is none.");
    else if (found === 0) this.note.replaceChildren("None is like this.");
    else this.note.replaceChildren(`${number(shown)} of ${number(all)} are shown${more ? ", those in trouble first. " : "."}`, more ?? "");
  }
}

/** One instance. */
class InstanceRow {
  constructor(instance) {
    this.cells = COLUMNS.map((column) => h("td", { role: "cell", class: column.number ? "number" : null, "data-label": column.name }));
    this.texts = [];
    const id = instance.id;
    this.drain = h("button", { type: "button", click: () => this.toggleDrain() }, "Drain");
    const remove = h("button", { type: "button", "aria-label": `Remove ${id}`, click: () => removeInstance(this.instance) }, "Remove");
    this.address = h("small", {});
    this.element = h(
      "tr",
      { role: "row", "data-id": id },
      h("th", { scope: "row", role: "rowheader" }, id, this.address),
      ...this.cells,
      h("td", { role: "cell", class: "actions" }, this.drain, remove),
    );
  }

  show(instance) {
    this.instance = instance;
    say(this.address, addressOf(instance));
    COLUMNS.forEach((column, index) => {
      const content = column.cell(instance);
      const parts = Array.isArray(content) ? content : [content];
      const text = parts.map((part) => part.textContent ?? part).join("|") + (index ? "" : tone(instance));
      if (this.texts[index] !== text) {
        this.texts[index] = text;
        this.cells[index].replaceChildren(...parts);
      }
    });
    const verb = instance.state === "draining" ? "Undrain" : "Drain";
    say(this.drain, verb);
    this.drain.setAttribute("aria-label", `${verb} ${instance.id}`);
    this.element.dataset.tone = tone(instance);
    this.element.classList.toggle("old", isOld(instance));
  }

  toggleDrain() {
    if (this.instance.state === "draining") undrainInstance(this.instance);
    else drainInstance(this.instance);
  }
}

const tables = Object.keys(CAPTIONS).map((role) => new RoleTable(role));

function showAll() {
  fleet.showAll = true;
  drawInstances(lastStatus());
}

/** Take all instances anew. */
function setInstances(instances, ages) {
  fleet.instances = new Map(instances.map((instance, index) => [instance.id, { ...instance, age: ages[index] }]));
}

/** Take what is new of some instances, and the age of the last scrape of each. */
function changeInstances(changes, ages) {
  for (const change of changes) Object.assign(fleet.instances.get(change.id) ?? {}, change);
  let index = 0;
  for (const instance of fleet.instances.values()) instance.age = ages[index++];
}

function drawInstances(status) {
  for (const table of tables) table.draw(status);
}

function startInstances() {
  byId("roles").append(...tables.filter((table) => ROLES.includes(table.role)).map((table) => table.element));
  byId("filter").addEventListener("input", () => drawInstances(lastStatus()));
}
