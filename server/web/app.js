// The page asks for a key where the server wants one, then starts its parts.

import { ApiError, getJson, getText, key } from "/page/api.js";
import { startCharts } from "/page/charts.js";
import { $, make } from "/page/dom.js";
import { render } from "/page/markdown.js";
import { startPlayground } from "/page/playground.js";
import { startSpeedup } from "/page/speedup.js";

let stopCharts = () => {};

function state(kind, text) {
  $("state").className = `state ${kind}`;
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
}

function askForKey(note) {
  stopCharts();
  $("key-form").hidden = false;
  $("key-note").textContent = note;
  state("", "waiting for a key");
  $("key").focus();
}

async function start() {
  let model;
  try {
    model = await getJson("/page/model");
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 401) state("down", error.message);
    return;
  }
  $("key-form").hidden = true;
  $("main").hidden = false;
  const name = model.model.replace(/\/+$/, "").split("/").pop();
  document.title = `${name} · pat-serve`;
  const ready = model.baseline ? `${name}, beside its baseline` : name;
  state("ready", ready);
  $("card-text").replaceChildren(...(model.card ? render(model.card) : [make("p", { class: "note" }, "This model has no card (README.md).")]));
  $("forms-text").replaceChildren(...render(await getText("/page/what_to_serve.md")));
  startPlayground(model);
  stopCharts = startCharts((fine, message) => state(fine ? "ready" : "down", fine ? ready : message));
  await startSpeedup(model);
}

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  start();
};
document.addEventListener("key-refused", () => askForKey("The server refused this key."));

const access = await getJson("/page/access");
if (access.key_needed && !key.get()) askForKey("This server wants a key. It stays in this tab and goes to this server only.");
else await start();
