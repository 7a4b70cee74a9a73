// What can be changed: instances and strategies.
"use strict";

const pathOf = (instance) => `/instances/${encodeURIComponent(instance.id)}`;

function drainInstance(instance) {
  showForm({
    title: `Drain ${instance.id}?`,
    text: "It gets no new requests. Those that it has go on to their end. You can undo this at any time.",
    verb: "Drain",
    run: (_, force) => ask("POST", `${pathOf(instance)}/drain${force ? "?force=true" : ""}`),
  });
}

async function undrainInstance(instance) {
  try {
    await ask("POST", `${pathOf(instance)}/undrain`);
  } catch (problem) {
    showText(`${instance.id} is still draining`, h("p", { class: "error", role: "alert" }, problem.message));
  }
}

function removeInstance(instance) {
  const left = instance.in_flight ? ` ${many(instance.in_flight, "request")} in flight on it go on, but nobody counts them any more. Drain it first to wait for them.` : "";
  showForm({
    title: `Remove ${instance.id}?`,
    text: `The scheduler forgets it; the server at ${addressOf(instance)} runs on.${left}`,
    verb: "Remove",
    danger: true,
    run: (_, force) => ask("DELETE", `${pathOf(instance)}${force ? "?force=true" : ""}`),
  });
}

function addInstance() {
  const field = (label, name, attributes) => ({ label, input: h("input", { name, required: true, autocomplete: "off", ...attributes }) });
  const role = h("select", { name: "role" }, ...Object.keys(CAPTIONS).map((each) => h("option", {}, each)));
  showForm({
    title: "Add an instance",
    text: "It gets requests once a health check has succeeded.",
    fields: [
      field("Id", "id"),
      { label: "Role", input: role },
      field("Host", "host", { placeholder: "10.0.0.21" }),
      field("Port", "port", { type: "number", min: 1, max: 65535 }),
    ],
    verb: "Add",
    run: (values) => ask("POST", "/instances", { ...values, port: Number(values.port) }),
  });
}

/** The form of the strategies. What the operator has chosen and not sent is left alone. */
const strategies = {
  used: {},

  async load() {
    const found = await ask("GET", "/strategy");
    this.used = {};
    for (const role of ROLES) {
      const select = byId("strategy").elements[role];
      const names = new Set([...found.available, found[`${role}_strategy`]]);
      select.replaceChildren(...[...names].map((name) => h("option", {}, name)));
    }
    this.show({ prefill: found.prefill_strategy, decode: found.decode_strategy }, null);
  },

  show(used, shadow) {
    for (const role of ROLES) {
      const select = byId("strategy").elements[role];
      const touched = this.used[role] !== undefined && select.value !== this.used[role];
      if (![...select.options].some((option) => option.value === used[role])) select.append(h("option", {}, used[role]));
      if (!touched) select.value = used[role];
    }
    this.used = { ...used };
    say(byId("shadow"), shadow ? `Shadow: ${shadow}` : "");
    this.compare();
  },

  compare() {
    const form = byId("strategy");
    form.querySelector("button").disabled = ROLES.every((role) => form.elements[role].value === this.used[role]);
  },

  async use(event) {
    event.preventDefault();
    const form = byId("strategy");
    const result = byId("strategy-result");
    const [prefill, decode] = ROLES.map((role) => form.elements[role].value);
    result.classList.remove("error");
    try {
      await ask("PUT", "/strategy", { prefill_strategy: prefill, decode_strategy: decode });
      this.used = { prefill, decode };
      result.textContent = prefill === decode ? `${prefill} is in use.` : `${prefill} and ${decode} are in use.`;
    } catch (problem) {
      result.classList.add("error");
      result.textContent = problem.message;
    }
    this.compare();
  },
};

function startSteering() {
  byId("add").addEventListener("click", addInstance);
  byId("strategy").addEventListener("submit", (event) => strategies.use(event));
  byId("strategy").addEventListener("change", () => {
    byId("strategy-result").textContent = "";
    strategies.compare();
  });
}
