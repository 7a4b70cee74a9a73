// The one dialog: it asks before something is changed, and shows why it was refused.
"use strict";

/**
 * Show a form; close it once `run` has succeeded, and show what `run` throws.
 *
 * `run` gets the fields' values, and whether to force it: that is offered when the scheduler says that only
 * force will do.
 */
function showForm({ title, text, fields = [], verb, danger = false, cancel = true, run, done }) {
  const dialog = byId("dialog");
  const error = h("p", { class: "error", role: "alert" });
  const submit = h("button", { type: "submit", class: danger ? "danger" : "primary" }, verb);
  const force = h("button", { type: "button", class: "danger", hidden: true }, `${verb} all the same`);
  const close = h("button", { type: "button", click: () => dialog.close() }, "Cancel");
  const form = h(
    "form",
    { submit: (event) => { event.preventDefault(); attempt(false); } },
    h("h2", { id: "dialog-title" }, title),
    text ? h("p", {}, text) : null,
    fields.length ? h("div", { class: "fields" }, ...fields.map((field) => h("label", {}, field.label, field.input))) : null,
    error,
    h("div", { class: "buttons" }, cancel ? close : null, force, submit),
  );
  force.addEventListener("click", () => attempt(true));

  async function attempt(forced) {
    error.textContent = "";
    submit.disabled = force.disabled = true;
    try {
      await run(Object.fromEntries(new FormData(form)), forced);
      dialog.close();
      done?.();
    } catch (problem) {
      refuse(problem);
    } finally {
      submit.disabled = force.disabled = false;
    }
  }

  function refuse(problem) {
    const forcible = problem.status === 409 && problem.message.includes("force=true");
    error.textContent = forcible ? problem.message.replace(/: add force=true.*/, ".") : problem.message;
    submit.hidden = forcible;
    force.hidden = !forcible;
    if (forcible) close.focus();
  }

  showDialog(form);
  (fields[0]?.input ?? (danger ? close : submit)).focus();
}

/** Show something to read. */
function showText(title, ...content) {
  const close = h("button", { type: "button", click: () => byId("dialog").close() }, "Close");
  showDialog(h("div", { class: "body" }, h("h2", { id: "dialog-title" }, title), ...content, h("div", { class: "buttons" }, close)));
  close.focus();
}

function showDialog(content) {
  const dialog = byId("dialog");
  if (dialog.open) dialog.close();
  dialog.replaceChildren(content);
  dialog.showModal();
}

/** Ask for the admin token until one is given. */
function askForToken(wrong) {
  return new Promise((resolve) => {
    const dialog = byId("dialog");
    const input = h("input", { name: "token", type: "password", required: true, autocomplete: "off" });
    const show = () =>
      showForm({
        title: wrong ? "The token is wrong" : "Admin token",
        text: "The scheduler asks for its admin token, admin_token in its configuration. It is kept until this tab is closed.",
        fields: [{ label: "Token", input }],
        verb: "Continue",
        cancel: false,
        run: async (values) => sessionStorage.setItem(TOKEN, values.token),
        done: () => {
          dialog.removeEventListener("close", shut);
          resolve();
        },
      });
    const shut = () => dialog.open || show(); // Escape: there is nothing to see without
    show();
    dialog.addEventListener("close", shut);
  });
}
