// The charts, and the same as a table.
"use strict";

const MAX_POINTS = 180;

const past = { points: [], intervalMs: 5000 };

const percentiles = (key) => () =>
  ["p50", "p90", "p99"].map((name) => ({ name, value: (point) => point[key]?.[name] ?? null }));

const perSecond = (value) => (value === null ? NONE : `${number(value)}/s`);

/** Return lines for the two reasons that there was most of, and one for all others. */
function errorLines(points) {
  const totals = new Map();
  for (const point of points) {
    for (const [reason, rate] of Object.entries(point.errors_per_s)) totals.set(reason, (totals.get(reason) ?? 0) + rate);
  }
  const reasons = [...totals].sort((a, b) => b[1] - a[1]).map(([reason]) => reason);
  const sum = (some) => (point) => some.reduce((total, reason) => total + (point.errors_per_s[reason] ?? 0), 0);
  if (reasons.length <= 1) return reasons.map((name) => ({ name, value: sum([name]) }));
  const lines = [{ name: "all", value: sum(reasons) }, ...reasons.slice(0, 2).map((name) => ({ name, value: sum([name]) }))];
  return reasons.length === 2 ? lines : [...lines.slice(0, 2), { name: "others", value: sum(reasons.slice(1)) }];
}

const charts = [
  new Chart({ title: "Requests", lines: () => [{ name: "requests", value: (point) => point.requests_per_s }], format: perSecond }),
  new Chart({ title: "Time to first token", note: "p50", lines: percentiles("ttft_s"), format: seconds, least: 0.01 }),
  new Chart({ title: "Time per output token", note: "p50", lines: percentiles("tpot_s"), format: seconds, least: 0.001 }),
  new Chart({ title: "Errors", kind: "errors", lines: errorLines, format: perSecond }),
  new Chart({
    title: "Queue",
    lines: () => [
      { name: "waiting here", value: (point) => point.queue },
      { name: "on prefill", value: (point) => point.in_flight.prefill ?? 0 },
      { name: "on decode", value: (point) => point.in_flight.decode ?? 0 },
    ],
    format: number,
    least: 4,
  }),
  new Chart({
    title: "Prefix hits", note: "of prompt tokens",
    lines: () => [{ name: "share", value: (point) => point.prefix_hit_share }],
    format: percent,
  }),
];

function setHistory({ interval_s, points }) {
  past.intervalMs = interval_s * 1000;
  past.points = points.map(timed);
  drawHistory();
}

/** Add a point, unless it is there already. */
function addPoint(point) {
  if (!point || (past.points.length && Date.parse(point.time) <= past.points.at(-1).at)) return;
  past.points = [...past.points, timed(point)].slice(-MAX_POINTS);
  drawHistory();
}

function timed(point) {
  return { ...point, at: Date.parse(point.time) };
}

function drawHistory() {
  for (const chart of charts) chart.show(past.points, past.intervalMs);
  if (byId("history").open) drawTable();
}

function drawTable() {
  const heads = ["Time", "Requests", "Errors", "TTFT p50", "p90", "p99", "Per token p50", "p90", "p99", "Queue", "Cached"];
  const row = (point) => {
    const errors = Object.entries(point.errors_per_s).map(([reason, rate]) => `${reason} ${perSecond(rate)}`);
    const times = [point.ttft_s, point.tpot_s].flatMap((each) => ["p50", "p90", "p99"].map((name) => seconds(each?.[name])));
    const cells = [perSecond(point.requests_per_s), errors.join(", ") || "0", ...times, number(point.queue), percent(point.prefix_hit_share)];
    return h("tr", {}, h("th", { scope: "row" }, clock(point.at)), ...cells.map((text) => h("td", { class: "number" }, text)));
  };
  const head = heads.map((text, index) => h("th", { scope: "col", class: index ? "number" : null }, text));
  const body = h("tbody", {}, ...past.points.toReversed().map(row));
  byId("history").querySelector("div").replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, ...head)), body));
}

function startHistory() {
  byId("charts").append(...charts.map((chart) => chart.element));
  byId("history").addEventListener("toggle", drawHistory);
}
