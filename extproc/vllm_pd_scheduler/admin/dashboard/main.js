// Watches the scheduler, and shows what it says.
"use strict";

const THEME = "pd-scheduler-theme";
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;

const watched = { status: null, lost: null, pause: FIRST_PAUSE_MS };

const lastStatus = () => watched.status;

const HANDLERS = {
  snapshot(data) {
    setInstances(data.instances, data.metrics_age_s);
    HANDLERS.changes({ ...data, instances: [] });
  },
  changes(data) {
    watched.status = data.status;
    changeInstances(data.instances, data.metrics_age_s);
    addPoint(data.point);
    draw();
  },
  events: addEvents,
  decisions: addDecisions,
};

function draw() {
  const { status } = watched;
  const role = status.roles.decode.routable === 0 ? "cannot serve" : "shutting down";
  say(byId("state"), status.ready ? "serving" : role, status.ready ? "ok" : "bad");
  say(byId("about"), `version ${status.version}, up ${age(status.uptime_s)}`);
  drawProblems(status, fleet.instances, past.points.at(-1));
  drawInstances(status);
  strategies.show(status.strategy, status.shadow);
}

/** Read what was before, as far as this scheduler tells it; a part that it does not is said to be missing. */
async function loadPast() {
  const known = new Set((await ask("GET", "/")).endpoints.map((each) => each.path));
  const parts = [
    ["/strategy", "strategy", () => strategies.load()],
    ["/history", "charts", async () => setHistory(await ask("GET", "/history"))],
    ["/decisions", "decisions", loadDecisions],
    ["/events", "events", loadEvents],
  ];
  const missing = (id) => byId(id).replaceChildren(h("p", { class: "none muted" }, "Not available in this version of the scheduler."));
  await Promise.all(parts.map(([path, id, load]) => (known.has(path) ? load() : missing(id))));
}

/** Follow the scheduler for ever. While the page is hidden it is left in peace. */
async function watch() {
  for (;;) {
    await visible();
    const abort = new AbortController();
    const hidden = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", hidden);
    let problem = "The scheduler has ended the connection.";
    try {
      let begun = false;
      for await (const [name, data] of streamOf("/live", abort)) {
        found();
        HANDLERS[name]?.(data);
        if (!begun) loadPast().catch((error) => abort.abort(error)); // not before: between the two something may happen
        begun = true;
      }
    } catch (error) {
      problem = error.message;
    }
    abort.abort();
    document.removeEventListener("visibilitychange", hidden);
    if (document.hidden) continue;
    lose(problem);
    await new Promise((resolve) => setTimeout(resolve, watched.pause));
    watched.pause = Math.min(LONGEST_PAUSE_MS, watched.pause * 2);
  }
}

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function lose(problem) {
  watched.lost ??= Date.now();
  say(byId("state"), "no connection", "bad");
  const since = watched.status ? ` What is shown is from ${clock(watched.lost)}.` : "";
  showProblems([["bad", `${problem}${since}`]]);
}

function found() {
  watched.lost = null;
  watched.pause = FIRST_PAUSE_MS;
  byId("forget").hidden = sessionStorage.getItem(TOKEN) === null;
}

function startTheme() {
  const select = byId("theme");
  const use = () => {
    if (select.value) document.documentElement.dataset.theme = select.value;
    else delete document.documentElement.dataset.theme;
  };
  select.value = localStorage.getItem(THEME) ?? "";
  select.addEventListener("change", () => {
    localStorage.setItem(THEME, select.value);
    use();
  });
  use();
}

startTheme();
startHistory();
startInstances();
startSteering();
startDecisions();
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});
watch();
