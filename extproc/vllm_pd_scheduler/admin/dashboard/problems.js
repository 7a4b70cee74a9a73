// What needs attention, in words, the worst first.
"use strict";

const MOST_NAMED = 5;
const CLIENTS_OWN = new Set(["client_error", "bad_body", "bad_header", "not_public", "too_large"]); // reasons that are a client's mistake
const WORDS = { bad: "Problem", warn: "Notice", ok: "All well" };

/** Return [tone, text] of each thing that an operator should know. */
function problemsOf(status, instances, point) {
  const all = [...instances.values()];
  const found = [];
  if (!status.ready) {
    found.push(
      status.roles.decode.routable === 0
        ? ["bad", "No decode instance can serve: clients get errors."]
        : ["bad", "The scheduler is shutting down: it takes no new requests."],
    );
  }
  const { total, routable } = status.roles.prefill;
  if (total > 0 && routable === 0) found.push(["bad", "No prefill instance can serve: decode instances prefill, if they may."]);
  const errors = Object.entries(point?.errors_per_s ?? {}).filter(([, rate]) => rate > 0);
  const serious = errors.some(([reason]) => !CLIENTS_OWN.has(reason));
  if (errors.length) found.push([serious ? "bad" : "warn", `Clients get errors: ${errors.map(([reason, rate]) => `${reason} ${perSecond(rate)}`).join(", ")}.`]);
  found.push(...named("bad", all.filter((each) => tone(each) === "bad"), "cannot serve", (each) => `${each.shown_state}: ${each.reason ?? "?"}`));
  found.push(...status.misfits.map((text) => ["warn", `${text}.`]));
  if (status.queue.requests) found.push(["warn", `${many(status.queue.requests, "request")} wait in the queue.`]);
  found.push(...named("warn", all.filter((each) => each.shown_state === "trial"), "on trial after an ejection"));
  found.push(...named("warn", all.filter(isOld), "not scraped for long, so their load is not known"));
  found.push(...named("warn", all.filter((each) => each.state === "draining" && !each.drained), "draining"));
  found.push(...named("warn", all.filter((each) => each.drained), "drained, and can be stopped"));
  found.push(...named("warn", all.filter((each) => each.state === "starting"), "not probed yet"));
  return found;
}

/** Say of one instance what is wrong with it, and of many how many they are. */
function* named(tone, instances, what, why) {
  if (!instances.length) return;
  if (instances.length <= 2 && why) {
    for (const each of instances) yield [tone, `${each.id} (${each.role}) is ${why(each)}.`];
    return;
  }
  const ids = instances.slice(0, MOST_NAMED).map((each) => each.id).join(", ");
  const more = instances.length > MOST_NAMED ? ` and ${number(instances.length - MOST_NAMED)} more` : "";
  const verb = what === "cannot serve" ? "" : instances.length === 1 ? "is " : "are ";
  yield [tone, instances.length === 1 ? `${ids} ${verb}${what}.` : `${number(instances.length)} instances ${verb}${what}: ${ids}${more}.`];
}

function drawProblems(status, instances, point) {
  const found = problemsOf(status, instances, point);
  if (!found.length) {
    const { prefill, decode } = status.roles;
    found.push(["ok", `${prefill.routable} of ${prefill.total} prefill and ${decode.routable} of ${decode.total} decode instances can serve.`]);
  }
  showProblems(found);
}

function showProblems(found) {
  const list = byId("problems");
  found.forEach(([kind, text], index) => {
    const item = list.children[index] ?? list.appendChild(h("li", {}, h("strong", {}), h("span", {})));
    say(item.firstChild, WORDS[kind]);
    say(item.lastChild, text);
    item.dataset.tone = kind;
  });
  while (list.children.length > found.length) list.lastChild.remove();
}
