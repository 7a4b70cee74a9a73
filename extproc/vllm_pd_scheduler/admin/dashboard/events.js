// The time line: what has happened to the fleet and the scheduler.
"use strict";

const MOST_EVENTS = 100;
const LEVEL_TONES = { WARNING: "warn", ERROR: "bad", CRITICAL: "bad" };

let events = [];

function addEvents(fresh) {
  const byNumber = new Map([...events, ...fresh].map((event) => [event.number, event]));
  events = [...byNumber.values()].sort((a, b) => b.number - a.number).slice(0, MOST_EVENTS);
  const item = (event) =>
    h(
      "li",
      {},
      h("time", { datetime: event.time, title: new Date(event.time).toLocaleString() }, clock(event.time)),
      h("span", { "data-tone": LEVEL_TONES[event.level] ?? null }, event.level === "INFO" ? "" : `${event.level.toLowerCase()}: `, event.text),
      h("small", {}, `${event.kind}, by ${event.by}`),
    );
  const attributes = { class: "scroll", role: "region", tabindex: 0, "aria-label": "Events, the newest first" };
  const list = h("div", attributes, h("ol", {}, ...events.map(item)));
  byId("events").replaceChildren(events.length ? list : h("p", { class: "none muted" }, "Nothing has happened yet."));
}

async function loadEvents() {
  addEvents((await ask("GET", `/events?limit=${MOST_EVENTS}`)).events);
}
