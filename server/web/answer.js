// One answer as it comes: its text, its error, and its figures.

import { events } from "/page/api.js";
import { make } from "/page/dom.js";

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`);

export class Answer {
  // text: the element in which the answer grows; scroller: the element that scrolls to keep the answer's end in sight.
  constructor(text, scroller) {
    this.text = text;
    this.scroller = scroller;
    this.problem = make("p", { class: "problem", role: "alert" });
    this.values = Object.fromEntries(["TTFT", "Tokens/s", "Tokens"].map((name) => [name, make("dd", {}, "–")]));
    const list = Object.entries(this.values).map(([name, value]) => make("div", {}, make("dt", {}, name), value));
    this.figures = make("dl", { class: "figures" }, ...list);
  }

  clear() {
    this.text.textContent = this.problem.textContent = "";
    for (const value of Object.values(this.values)) value.textContent = "–";
  }

  // Returns "finished", "stopped" or "failed".
  async run(path, body, signal) {
    const seen = { sent: performance.now(), first: 0, last: 0, tokens: 0, text: "" };
    let frame = 0;
    const flush = () => {
      cancelAnimationFrame(frame);
      frame = 0;
      this.draw(seen);
    };
    try {
      for await (const event of events(path, { ...body, stream: true }, signal)) {
        if (event.finish_reason) {
          flush();
          // The figures of the server's own clock, once they have come.
          const { ttft_s: ttft, tpot_s: tpot } = event.timings;
          if (ttft !== null) this.values.TTFT.textContent = seconds(ttft);
          if (tpot) this.values["Tokens/s"].textContent = (1 / tpot).toFixed(1);
          this.values.Tokens.textContent = `${event.usage.completion_tokens} · ${event.finish_reason}`;
          continue;
        }
        seen.tokens += event.token_ids.length;
        seen.text += event.text;
        seen.last = performance.now();
        if (seen.tokens) seen.first ||= seen.last;
        // The page is drawn once a frame: drawing each token of a fast model would leave no time for anything else.
        frame ||= requestAnimationFrame(flush);
      }
      return "finished";
    } catch (error) {
      flush();
      if (error.name === "AbortError") {
        this.values.Tokens.textContent = `${seen.tokens} · stopped`;
        return "stopped";
      }
      this.problem.textContent = error.message;
      return "failed";
    }
  }

  draw(seen) {
    if (seen.first) this.values.TTFT.textContent = seconds((seen.first - seen.sent) / 1000);
    if (seen.tokens) this.values.Tokens.textContent = String(seen.tokens);
    if (seen.tokens > 1) this.values["Tokens/s"].textContent = ((seen.tokens - 1) / Math.max((seen.last - seen.first) / 1000, 1e-3)).toFixed(1);
    const { scroller } = this;
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
    this.text.append(seen.text);
    seen.text = "";
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  }
}
