// Requests to the scheduler. The token is kept for this tab alone.
"use strict";

const TOKEN = "pd-scheduler-token";
const SILENCE_MS = 10000; // the scheduler sends something each second

/** What the scheduler answers when it refuses a request. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let tokenAsked = null;

/** Send a request; ask for the token when it is needed, and until it is right. Return the response. */
async function request(method, path, { body, signal, accept = "application/json" } = {}) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const headers = { accept };
    if (token) headers.authorization = `Bearer ${token}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    const sent = { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) };
    const response = await fetch(path, sent).catch(() => {
      throw signal?.reason ?? new Error("The scheduler cannot be reached.");
    });
    if (response.status === 401) {
      if (sessionStorage.getItem(TOKEN) === token) {
        tokenAsked ??= askForToken(token !== null).finally(() => (tokenAsked = null));
        await tokenAsked;
      }
      continue;
    }
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({}));
    throw new Refusal(response.status, answer.error ?? `The scheduler answered ${response.status}.`);
  }
}

/** Send a request and return the JSON of its answer. */
async function ask(method, path, body) {
  const response = await request(method, path, { body });
  return response.status === 204 ? null : response.json();
}

/** Yield the events of a stream as [name, data], until it ends, is silent for long, or is aborted. */
async function* streamOf(path, abort) {
  const wait = () => setTimeout(() => (tokenAsked ? (silence = wait()) : abort.abort(new Error("The scheduler says nothing."))), SILENCE_MS);
  let silence = wait();
  try {
    const response = await request("GET", path, { signal: abort.signal, accept: "text/event-stream" });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read().catch(() => {
        throw abort.signal.reason ?? new Error("The connection to the scheduler broke.");
      });
      if (done) return;
      clearTimeout(silence);
      silence = wait();
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        const fields = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s, 2)));
        if (fields.event) yield [fields.event, JSON.parse(fields.data)];
      }
    }
  } finally {
    clearTimeout(silence);
  }
}
