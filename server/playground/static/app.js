// The page's state: what the form asks for, the answers that run, and the code beside them.

import { examplesFor, FILLED } from "./examples.js";
import { Lane } from "./lane.js";
import { asCode, requestOf, watched } from "./requests.js";
import { ApiError, getJson, streamed } from "./stream.js";

const $ = (id) => document.getElementById(id);
const POLL_MS = 1500;

let mode = "chat";
let language = "curl";
let running = null; // AbortController
let needsKey = false;

const optional = (id) => ($(id).value === "" ? null : Number($(id).value));

function form() {
  return {
    mode,
    model: $("model").value,
    system: $("system").value,
    prompt: $("prompt").value,
    temperature: Number($("temperature").value || 0),
    maxTokens: Number($("max-tokens").value || 200),
    blockLength: optional("block-length"),
    seed: optional("seed"),
    schema: $("schema").value,
    tools: $("tools").value,
    prediction: $("prediction").value,
  };
}

// Tabs: arrows move between them, as WAI-ARIA has it.
function makeTabs(list, choose) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (tab) => {
    for (const one of tabs) {
      one.setAttribute("aria-selected", String(one === tab));
      one.tabIndex = one === tab ? 0 : -1;
    }
    choose(tab);
  };
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      next.focus();
      select(next);
    });
  }
}

function setMode(tab) {
  mode = tab.id.replace("tab-", "");
  for (const part of document.querySelectorAll(".chat-only")) part.hidden = mode === "complete";
  for (const part of document.querySelectorAll(".race-only")) part.hidden = mode !== "race";
  $("prompt-label").textContent = mode === "complete" ? "Text to go on with" : "Message";
  $("send").textContent = mode === "race" ? "Race" : "Send";
  showCode();
}

function showExamples() {
  const examples = examplesFor($("model").value);
  $("example").replaceChildren(new Option("Choose one", ""), ...examples.map(({ title }, index) => new Option(title, index)));
  if (!$("prompt").value) useExample(examples[0]);
}

function useExample(example) {
  $("prompt").value = example.prompt;
  showCode();
}

function showCode() {
  try {
    $("snippet").textContent = asCode(language, requestOf(form()), location.origin, needsKey);
  } catch (error) {
    $("snippet").textContent = error.message;
  }
}

async function connect() {
  try {
    const state = await getReady();
    if (!state.ready) {
      $("state").textContent = `${state.detail || state.engine} (${Math.round(100 * state.progress)} %)`;
      setTimeout(connect, POLL_MS);
      return;
    }
    const models = (await getJson("/v1/models", $("key").value)).data;
    const chosen = $("model").value;
    $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
    $("state").textContent = `Ready: ${models.map(({ id }) => id).join(", ")}`;
    $("key-row").hidden = !needsKey;
    showExamples();
    showCode();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      needsKey = true;
      $("key-row").hidden = false;
      $("state").textContent = $("key").value ? "This key is not accepted." : "This server asks for an API key.";
      $("key").focus();
      return;
    }
    $("state").textContent = "The server cannot be reached.";
    setTimeout(connect, POLL_MS);
  }
}

async function getReady() {
  const response = await fetch("/ready");
  return { ready: response.ok, ...(await response.json()) };
}

async function run(lane, { path, body }, signal) {
  try {
    for await (const event of streamed(path, watched(path, body), { key: $("key").value, signal })) lane.show(event);
  } catch (error) {
    lane.end(error.name === "AbortError" ? "stopped" : "error");
    if (error.name !== "AbortError") throw error;
  }
}

async function send() {
  if (running) return;
  $("error").textContent = $("summary").textContent = "";
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  try {
    const request = requestOf(form());
    await (mode === "race" ? race(request) : single(request));
  } catch (error) {
    $("error").textContent = error.message;
    if (error.status === 401) connect();
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

async function single(request) {
  const lane = new Lane(request.body.model);
  $("lanes").replaceChildren(lane.element);
  await run(lane, request, running.signal);
  $("summary").textContent = `${lane.tokens} tokens in ${lane.passes} passes.`;
}

async function race(request) {
  const lanes = [new Lane("Token by token"), new Lane("Jacobi")];
  $("lanes").replaceChildren(...lanes.map(({ element }) => element));
  const requests = [{ ...request, body: { ...request.body, block_length: 1 } }, request];
  const { signal } = running;
  if ($("in-turns").checked) for (const [index, lane] of lanes.entries()) await run(lane, requests[index], signal);
  else await Promise.all(lanes.map((lane, index) => run(lane, requests[index], signal)));
  if (signal.aborted) return;
  const [one, jacobi] = lanes;
  const text = one.text === jacobi.text ? "The same text" : "Another text (sampled without a seed, or rounded otherwise)";
  $("summary").textContent = `${text}: Jacobi took ${jacobi.passes} passes instead of ${one.passes}, ${(one.seconds / jacobi.seconds).toFixed(2)} times as fast.`;
}

function stop() {
  running?.abort();
}

makeTabs(document.querySelector("#request .tabs"), setMode);
makeTabs(document.querySelector("#code .tabs"), (tab) => {
  language = tab.dataset.language;
  showCode();
});
$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("request").addEventListener("input", showCode);
$("model").addEventListener("change", showExamples);
$("example").addEventListener("change", ({ target }) => target.value && useExample(examplesFor($("model").value)[target.value]));
$("key").addEventListener("change", connect);
$("stop").addEventListener("click", stop);
$("copy").addEventListener("click", async ({ target }) => {
  await navigator.clipboard.writeText($("snippet").textContent);
  target.textContent = "Copied";
  setTimeout(() => (target.textContent = "Copy"), 1500);
});
for (const button of document.querySelectorAll("[data-fill]")) {
  button.addEventListener("click", () => {
    $(button.dataset.fill).value = JSON.stringify(FILLED[button.dataset.fill], null, 2);
    showCode();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});
setMode($("tab-chat"));
connect();
