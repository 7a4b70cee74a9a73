// The latest decisions, and why each was made.
"use strict";

const MOST_DECISIONS = 20;

const decisions = { shown: [], waiting: [], paused: false };

function addDecisions(fresh) {
  decisions.waiting = merged(decisions.waiting, fresh);
  if (decisions.paused) return;
  decisions.shown = merged(decisions.shown, decisions.waiting);
  decisions.waiting = [];
  drawDecisions();
}

/** Return both, the newest first; a decision that is told again has ended since. */
function merged(old, fresh) {
  const byNumber = new Map([...old, ...fresh].map((decision) => [decision.number, decision]));
  return [...byNumber.values()].sort((a, b) => b.number - a.number).slice(0, MOST_DECISIONS);
}

function routeOf(decision) {
  const [prefill, decode] = ROLES.map((role) => decision[role]?.picked);
  return prefill && decode ? `${prefill} → ${decode}` : prefill ?? decode ?? NONE;
}

/** Return tone and words of how a request ended. */
function endOf(decision) {
  if (decision.served === "rejected") return ["bad", `${decision.status} ${decision.reason ?? ""}`.trim()];
  if (decision.served && !decision.outcome) return ["idle", "running"];
  if (!decision.served || decision.outcome === "left") return ["warn", "client left"];
  if (decision.outcome !== "ok") return ["bad", `${decision.outcome} ${decision.status ?? ""}`.trim()];
  const tries = ROLES.reduce((total, role) => total + Math.max(0, (decision[role]?.attempts?.length ?? 0) - 1), 0);
  return tries ? ["warn", `ok at try ${tries + 1}`] : ["ok", "ok"];
}

function drawDecisions() {
  const heads = ["Request", "Served", "Went to", "First token", "Predicted", "End"];
  const row = (decision) => {
    const [kind, text] = endOf(decision);
    const open = h("button", { type: "button", class: "link", "data-number": decision.number, click: () => explain(decision) }, clock(decision.time));
    const cells = [decision.served, routeOf(decision), seconds(decision.ttft_s), seconds(decision.predicted_ttft_s)];
    return h(
      "tr",
      { role: "row" },
      h("th", { scope: "row", role: "rowheader" }, open, h("small", {}, [decision.path, decision.model].filter(Boolean).join(" "))),
      ...cells.map((cell, index) => h("td", { role: "cell", class: index > 1 ? "number" : null, "data-label": heads[index + 1] }, cell)),
      h("td", { role: "cell", "data-label": "End" }, h("span", { class: "badge", "data-tone": kind }, text)),
    );
  };
  const focused = document.activeElement?.dataset?.number;
  const head = heads.map((text, index) => h("th", { scope: "col", role: "columnheader", class: index > 2 && index < 5 ? "number" : null }, text));
  const table = h(
    "table",
    { role: "table" },
    h("caption", { class: "hidden" }, "Latest decisions, the newest first"),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...head)),
    h("tbody", { role: "rowgroup" }, ...decisions.shown.map(row)),
  );
  byId("decisions").replaceChildren(decisions.shown.length ? h("div", { class: "card" }, table) : h("p", { class: "none muted" }, "There was no request yet."));
  if (focused) byId("decisions").querySelector(`[data-number="${focused}"]`)?.focus();
}

/** Show all that is known of a decision. */
async function explain(decision) {
  let whole = decision;
  try {
    const query = new URLSearchParams({ request_id: decision.request_id });
    const found = (await ask("GET", `/decisions?${query}`)).decisions;
    whole = found.find((each) => each.number === decision.number) ?? decision;
  } catch (problem) {
    if (!(problem instanceof Refusal)) throw problem;
  }
  const [kind, end] = endOf(whole);
  const facts = {
    Request: whole.request_id,
    Time: new Date(whole.time).toLocaleString(),
    Path: whole.path,
    Model: whole.model,
    Prompt: whole.prompt_tokens === null || whole.prompt_tokens === undefined ? null : `${number(whole.prompt_tokens)} tokens`,
    Served: whole.not_split ? `${whole.served}, not split: ${whole.not_split}` : whole.served,
    Continues: whole.continues ? `${whole.continues.decode ?? "a D"}, after ${whole.continues.tokens} tokens` : null,
    Waited: whole.waited_s ? seconds(whole.waited_s) : null,
    "First token": whole.ttft_s === null || whole.ttft_s === undefined ? null : `${seconds(whole.ttft_s)}, predicted ${seconds(whole.predicted_ttft_s)}`,
    Lasted: whole.duration_s ? seconds(whole.duration_s) : null,
    End: end,
  };
  const rows = Object.entries(facts).filter(([, value]) => value);
  const list = h("dl", {}, ...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  list.lastChild.dataset.tone = kind;
  showText("Why this request went where it did", list, ...ROLES.flatMap((role) => [...leg(role, whole[role])]));
}

/** Yield one leg: the candidates with their scores, who was left out, and the attempts. */
function* leg(role, found) {
  if (!found) return;
  const took = found.took_s === undefined || found.took_s === null ? "" : `, took ${seconds(found.took_s)}`;
  const predicted = found.predicted_s === undefined || found.predicted_s === null ? "" : `; predicted ${seconds(found.predicted_s)}${took}`;
  const by = found.by && found.by !== "strategy" ? found.by.replace("_", " ") : found.strategy;
  const picked = found.picked ? `${found.picked}, chosen by ${by}` : "nobody";
  yield h("h3", {}, `${role === "prefill" ? "Prefill" : "Decode"}: ${picked}${predicted}`);
  if (found.source) yield h("p", {}, `Told to pull ${number(found.source.tokens)} prompt tokens from ${found.source.instance}.`);
  const terms = [...new Set((found.candidates ?? []).flatMap((each) => Object.keys(each.terms ?? {})))];
  if (found.candidates?.length) {
    const one = (value) => (value === null || value === undefined ? NONE : Number(value.toPrecision(3)).toString());
    const score = (value) => (Array.isArray(value) ? value.map(one).join(", ") : one(value));
    const head = ["Candidate", "Score", ...terms].map((text, index) => h("th", { scope: "col", class: index ? "number" : null }, text));
    const body = found.candidates.map((each) =>
      h(
        "tr",
        { class: each.id === found.picked ? "picked" : null },
        h("th", { scope: "row" }, each.id),
        ...[each.score, ...terms.map((term) => each.terms?.[term])].map((value) => h("td", { class: "number" }, score(value))),
      ),
    );
    const scroll = { class: "scroll", role: "region", tabindex: 0, "aria-label": `Candidates for ${role}` };
    yield h("div", scroll, h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...body)));
  }
  if (found.of > (found.candidates?.length ?? 0)) yield h("p", { class: "muted" }, `The best ${found.candidates.length} of ${found.of}.`);
  for (const [why, ids] of Object.entries(found.left_out ?? {})) {
    if (ids.length) yield h("p", {}, h("span", { class: "muted" }, `Left out, ${why}: `), ids.join(", "));
  }
  const tries = (found.attempts ?? []).map((each) => `${each.instance} ${each.outcome}`);
  if (found.then?.length) yield h("p", {}, h("span", { class: "muted" }, "If that had failed: "), found.then.join(", then "));
  if (tries.length) yield h("p", {}, h("span", { class: "muted" }, "Attempts: "), tries.join(", then "));
}

async function loadDecisions() {
  addDecisions((await ask("GET", `/decisions?limit=${MOST_DECISIONS}`)).decisions);
}

function startDecisions() {
  byId("pause").addEventListener("click", () => {
    decisions.paused = !decisions.paused;
    byId("pause").setAttribute("aria-pressed", decisions.paused);
    say(byId("pause"), decisions.paused ? "Go on" : "Pause");
    addDecisions([]);
  });
}
