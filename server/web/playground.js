// The playground sends the same words to the served model and, where there is one, to its dense parent.

import { ChatSide, PromptSide } from "/page/columns.js";
import { $ } from "/page/dom.js";
import { runsOneAtATime } from "/page/run.js";

const MODES = {
  chat: {
    side: ChatSide, label: "Message", send: "Send",
    placeholder: "Say something. Enter sends, Shift+Enter begins a new line.",
  },
  prompt: {
    side: PromptSide, label: "Prompt", send: "Generate",
    placeholder: "What the model is to continue. It is sent as it stands.",
  },
};

export function startPlayground(model) {
  const models = [[model.baseline ? "Pruned" : "Answer", model.model, "/generate"]];
  if (model.baseline) models.push(["Dense", model.baseline, "/baseline/generate"]);
  // Each mode keeps its texts, so changing the mode loses nothing.
  const sides = Object.fromEntries(
    Object.entries(MODES).map(([name, mode]) => [name, models.map((side) => new mode.side(...side))]));
  let mode = "";
  function change(name) {
    mode = name;
    $(`mode-${name}`).checked = true;
    $("prompt-label").textContent = MODES[name].label;
    $("prompt").placeholder = MODES[name].placeholder;
    $("send").textContent = MODES[name].send;
    $("system-field").hidden = $("clear").hidden = name !== "chat";
    $("columns").replaceChildren(...sides[name].map((side) => side.element));
  }
  $("modes").hidden = !model.has_chat;
  for (const name of Object.keys(MODES)) $(`mode-${name}`).onchange = () => change(name);
  change(model.has_chat ? "chat" : "prompt");
  $("turns-field").hidden = $("turns-note").hidden = !model.baseline;
  $("max-tokens").max = model.max_model_len;

  $("prompt").onkeydown = (event) => {
    // Enter also ends the spelling of a word in some scripts.
    if (event.key !== "Enter" || event.isComposing) return;
    if (!(event.ctrlKey || event.metaKey) && (mode !== "chat" || event.shiftKey)) return;
    event.preventDefault();
    $("ask").requestSubmit();
  };
  $("clear").onclick = () => {
    for (const side of sides.chat) side.clear();
    $("play-news").textContent = "The conversations are cleared.";
    $("prompt").focus();
  };
  runsOneAtATime($("ask"), $("send"), $("stop"), async (signal) => {
    const asked = { text: $("prompt").value, system: $("system").value.trim() };
    const settings = { max_tokens: $("max-tokens").valueAsNumber, temperature: $("temperature").valueAsNumber };
    const asking = sides[mode];
    const fixed = [$("clear"), $("mode-chat"), $("mode-prompt")];
    for (const control of fixed) control.disabled = true;
    $("play-news").textContent = "Generating.";
    if (mode === "chat") $("prompt").value = "";
    else for (const side of asking) side.clear();
    let ends = [];
    try {
      if ($("turns").checked) {
        for (const side of asking) ends.push(signal.aborted ? "stopped" : await side.run(asked, settings, signal));
      } else {
        ends = await Promise.all(asking.map((side) => side.run(asked, settings, signal)));
      }
    } finally {
      for (const control of fixed) control.disabled = false;
    }
    $("play-news").textContent = asking.map((side, i) => `${side.title}: ${ends[i]}.`).join(" ");
  });
}
