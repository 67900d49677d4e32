// Live charts of the last two minutes, from the server's own /metrics.

import { getText } from "/page/api.js";
import { $, draw, make } from "/page/dom.js";

const EVERY_MS = 2000;
const POINTS = 60;

// The charts sum over all label sets, because this page shows the whole server.
export function parse(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)$/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return sums;
}

const rate = (name) => (now, last, passed) => (now.get(name) - last.get(name)) / passed;

function meanTtft(now, last) {
  const name = "vllm:time_to_first_token_seconds";
  const count = now.get(`${name}_count`) - last.get(`${name}_count`);
  return count > 0 ? (now.get(`${name}_sum`) - last.get(`${name}_sum`)) / count : null;
}

const CHARTS = [
  { title: "Output tokens/s", value: rate("vllm:generation_tokens_total"), show: (v) => v.toFixed(1) },
  { title: "Requests running", value: (now) => now.get("vllm:num_requests_running"), show: (v) => String(v) },
  { title: "Requests waiting", value: (now) => now.get("vllm:num_requests_waiting"), show: (v) => String(v) },
  { title: "Mean TTFT", value: meanTtft, show: (v) => (v < 1 ? `${Math.round(v * 1000)} ms` : `${v.toFixed(2)} s`) },
  { title: "KV cache in use", value: (now) => 100 * now.get("vllm:kv_cache_usage_perc"), show: (v) => `${v.toFixed(1)} %` },
];

class Chart {
  constructor({ title, value, show }) {
    Object.assign(this, { title, value, show, points: [] });
    this.now = make("div", { class: "now" }, "–");
    this.area = draw("path", { class: "area" });
    this.line = draw("path");
    this.svg = draw("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": title }, this.area, this.line);
    this.scale = make("p", {}, "2 min");
    this.element = make("article", { class: "chart" }, make("h3", {}, title), this.now, this.svg, this.scale);
  }

  add(now, last, passed) {
    const value = this.value(now, last, passed);
    this.points.push(Number.isFinite(value) ? value : null);
    if (this.points.length > POINTS) this.points.shift();
    const known = this.points.filter((point) => point !== null);
    if (!known.length) return;
    const latest = this.show(known[known.length - 1]);
    const most = Math.max(...known);
    this.now.textContent = latest;
    this.scale.textContent = `2 min, peak ${this.show(most)}`;
    this.svg.setAttribute("aria-label", `${this.title}: now ${latest}, at most ${this.show(most)}`);
    const offset = POINTS - this.points.length;
    const places = this.points
      .map((point, i) => [((i + offset) / (POINTS - 1)) * 100, point])
      .filter(([, point]) => point !== null)
      .map(([x, point]) => `${x.toFixed(2)},${(38 - (most > 0 ? point / most : 0) * 34).toFixed(2)}`);
    this.line.setAttribute("d", `M${places.join("L")}`);
    this.area.setAttribute("d", `M${places[0].split(",")[0]},40L${places.join("L")}L100,40Z`);
  }
}

export function startCharts(onState) {
  const charts = CHARTS.map((chart) => new Chart(chart));
  $("charts").replaceChildren(...charts.map((chart) => chart.element));
  let last = null;
  let stopped = false;
  async function tick() {
    if (document.hidden) return;
    try {
      const at = performance.now();
      const now = parse(await getText("/metrics"));
      if (stopped) return;
      if (last) for (const chart of charts) chart.add(now, last.sums, (at - last.at) / 1000);
      last = { sums: now, at };
      onState(true);
    } catch (error) {
      last = null;
      if (!stopped) onState(false, error.message);
    }
  }
  let timer = null;
  (async function loop() {
    await tick();
    // A refused key stops the charts from within a tick.
    if (!stopped) timer = setTimeout(loop, EVERY_MS);
  })();
  return () => {
    stopped = true;
    clearTimeout(timer);
  };
}
