// The same prompt to the served model and, where there is one, to its dense parent.

import { events } from "/page/api.js";
import { $, make } from "/page/dom.js";
import { runsOneAtATime } from "/page/run.js";

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

class Column {
  constructor(title, model, path) {
    this.title = title;
    this.path = path;
    this.text = make("p", { class: "text", tabindex: "0", role: "region", "aria-label": `${title}: answer` });
    this.problem = make("p", { class: "problem", role: "alert" });
    this.figures = Object.fromEntries(["TTFT", "Tokens/s", "Tokens"].map((name) => [name, make("dd", {}, "–")]));
    const list = Object.entries(this.figures).map(([name, value]) => make("div", {}, make("dt", {}, name), value));
    this.element = make("article", { class: "answer", "data-side": title.toLowerCase() },
      make("h3", {}, title, make("span", { title: model }, model)), this.text, this.problem, make("dl", { class: "figures" }, ...list));
  }

  clear() {
    this.text.textContent = this.problem.textContent = "";
    for (const value of Object.values(this.figures)) value.textContent = "–";
  }

  async run(body, signal) {
    this.element.classList.add("running");
    const seen = { sent: performance.now(), first: 0, last: 0, tokens: 0, text: "" };
    let frame = 0;
    const flush = () => {
      cancelAnimationFrame(frame);
      frame = 0;
      this.draw(seen);
    };
    try {
      for await (const event of events(this.path, { ...body, stream: true }, signal)) {
        if (event.finish_reason) {
          flush();
          // The server's own clock, once it has told.
          const { ttft_s: ttft, tpot_s: tpot } = event.timings;
          if (ttft !== null) this.figures.TTFT.textContent = seconds(ttft);
          if (tpot) this.figures["Tokens/s"].textContent = (1 / tpot).toFixed(1);
          this.figures.Tokens.textContent = `${event.usage.completion_tokens} · ${event.finish_reason}`;
          continue;
        }
        seen.tokens += event.token_ids.length;
        seen.text += event.text;
        seen.last = performance.now();
        if (seen.tokens) seen.first ||= seen.last;
        // Once a frame: what is drawn for each token of a fast model keeps the page from all else.
        frame ||= requestAnimationFrame(flush);
      }
      return "finished";
    } catch (error) {
      flush();
      if (error.name === "AbortError") {
        this.figures.Tokens.textContent = `${seen.tokens} · stopped`;
        return "stopped";
      }
      this.problem.textContent = error.message;
      return "failed";
    } finally {
      this.element.classList.remove("running");
    }
  }

  draw(seen) {
    if (seen.first) this.figures.TTFT.textContent = seconds((seen.first - seen.sent) / 1000);
    if (seen.tokens) this.figures.Tokens.textContent = String(seen.tokens);
    if (seen.tokens > 1) this.figures["Tokens/s"].textContent = ((seen.tokens - 1) / Math.max((seen.last - seen.first) / 1000, 1e-3)).toFixed(1);
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    this.text.append(seen.text);
    seen.text = "";
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }
}

export function startPlayground(model) {
  const columns = [new Column(model.baseline ? "Pruned" : "Answer", model.model, "/generate")];
  if (model.baseline) columns.push(new Column("Dense", model.baseline, "/baseline/generate"));
  $("columns").replaceChildren(...columns.map((column) => column.element));
  $("turns-field").hidden = $("turns-note").hidden = !model.baseline;
  $("max-tokens").max = model.max_model_len;

  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  };
  runsOneAtATime($("ask"), $("send"), $("stop"), async (signal) => {
    $("play-news").textContent = "Generating.";
    const body = {
      prompt: $("prompt").value,
      max_tokens: $("max-tokens").valueAsNumber,
      temperature: $("temperature").valueAsNumber,
    };
    for (const column of columns) column.clear();
    let ends = [];
    if ($("turns").checked) {
      for (const column of columns) ends.push(signal.aborted ? "stopped" : await column.run(body, signal));
    } else {
      ends = await Promise.all(columns.map((column) => column.run(body, signal)));
    }
    $("play-news").textContent = columns.map((column, i) => `${column.title}: ${ends[i]}.`).join(" ");
  });
}
