// The page runs the speed-up check, and draws each regime's interval with the claim and the ceiling beside it.

import { getJson, postJson } from "/page/api.js";
import { $, draw, make } from "/page/dom.js";
import { runsOneAtATime } from "/page/run.js";

const WIDTH = 340;
const EDGE = 16;

function interval(regime, claim, margin) {
  const { low, high, median } = regime.ratio;
  const threshold = claim * (1 - margin);
  const least = Math.min(1, low, threshold);
  const most = Math.max(1, high, claim, regime.ceiling);
  const pad = (most - least) * 0.06 || 0.05;
  const x = (value) => EDGE + ((value - least + pad) / (most - least + 2 * pad)) * (WIDTH - 2 * EDGE);
  const mark = (value, kind, text, y) => [
    draw("line", { class: kind, x1: x(value), x2: x(value), y1: 22, y2: 62 }),
    draw("text", { class: `${kind}-text`, x: x(value), y, "text-anchor": anchor(x(value)) }, text),
  ];
  const told = `ratio ${median.toFixed(3)}, interval ${low.toFixed(3)} to ${high.toFixed(3)}, claim ${claim} less a margin of ${percent(margin)}, ceiling ${regime.ceiling.toFixed(3)}`;
  return draw("svg", { viewBox: `0 0 ${WIDTH} 82`, role: "img", "aria-label": told },
    draw("line", { class: "axis", x1: EDGE, x2: WIDTH - EDGE, y1: 42, y2: 42 }),
    draw("line", { class: "grid", x1: x(1), x2: x(1), y1: 34, y2: 50 }),
    draw("text", { x: x(1), y: 66, "text-anchor": anchor(x(1)) }, "1×"),
    draw("rect", { class: "margin", x: x(threshold), y: 30, width: x(claim) - x(threshold), height: 24 }),
    draw("line", { class: "interval", x1: x(low), x2: Math.max(x(high), x(low) + 2), y1: 42, y2: 42 }),
    ...mark(claim, "claim", `claim ${claim}`, 16),
    ...mark(regime.ceiling, "ceiling", `ceiling ${regime.ceiling.toFixed(2)}`, 76),
    draw("circle", { class: "median", cx: x(median), cy: 42, r: 5 }));
}

const anchor = (x) => (x < 60 ? "start" : x > WIDTH - 60 ? "end" : "middle");

function regimeCard(regime, claim, margin) {
  const { low, high, median } = regime.ratio;
  return make("article", { class: "regime" },
    make("h3", {}, name(regime), make("span", { class: `badge ${regime.verdict}` }, regime.verdict)),
    make("p", { class: "ratio" }, `${median.toFixed(2)}×`, make("small", {}, ` [${low.toFixed(3)}, ${high.toFixed(3)}]`)),
    interval(regime, claim, margin),
    make("p", {}, `Dense ${milli(regime.baseline.median)}, pruned ${milli(regime.candidate.median)}` +
      ` (${regime.regime === "prefill" ? "to the first tokens" : "a token"}); ${Math.round(regime.of_ceiling * 100)} % of the ceiling.`),
    make("p", {}, `${regime.verdict}: ${regime.reason}.`));
}

// All regimes of a grid in one picture: how much of its ceiling each reached, with its interval.
function surface(regimes) {
  const row = 24;
  const left = 118;
  const shares = regimes.map((one) => ({ name: name(one), verdict: one.verdict, ...shareOfCeiling(one) }));
  const least = Math.min(0.9, ...shares.map((one) => one.low));
  const most = Math.max(1.05, ...shares.map((one) => one.high));
  const x = (value) => left + ((value - least) / (most - least)) * (WIDTH - left - EDGE);
  const height = 30 + row * shares.length;
  const told = shares.map((one) => `${one.name}: ${percent(one.median)}`).join(", ");
  return draw("svg", { id: "surface", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": `Share of the ceiling: ${told}` },
    draw("line", { class: "ceiling", x1: x(1), x2: x(1), y1: 16, y2: height - 6 }),
    draw("text", { class: "ceiling-text", x: x(1), y: 12, "text-anchor": anchor(x(1)) }, "ceiling"),
    ...shares.flatMap((one, at) => {
      const y = 34 + row * at;
      return [
        draw("text", { x: 4, y: y + 4 }, one.name),
        draw("line", { class: "axis", x1: left, x2: WIDTH - EDGE, y1: y, y2: y }),
        draw("line", { class: "interval", x1: x(one.low), x2: Math.max(x(one.high), x(one.low) + 2), y1: y, y2: y }),
        draw("circle", { class: "median", cx: x(one.median), cy: y, r: 4 }),
      ];
    }));
}

const shareOfCeiling = ({ ratio, ceiling }) => ({ low: ratio.low / ceiling, median: ratio.median / ceiling, high: ratio.high / ceiling });

const cell = (one) => `${one.batch_size}x${one.prompt_tokens}`;

const name = (regime) => (regime.prompt_tokens ? `${regime.regime}, ${cell(regime)}` : regime.regime);

const cells = (text) => text.split(",").filter((word) => word.trim()).map((word) => {
  const [batch, prompt] = word.split("x").map(Number);
  return { batch_size: batch, prompt_tokens: prompt };
});

const percent = (share) => `${Number((share * 100).toPrecision(3))} %`;

const milli = (value) => `${(value * 1000).toPrecision(3)} ms`;

function show(result) {
  const { claim, margin } = result.settings;
  $("verdict").replaceChildren(make("div", { class: "result" },
    make("div", { class: "headline" },
      make("span", { class: `badge ${result.verdict}`, id: "verdict-word" }, result.verdict),
      make("strong", {}, `Claim ${claim}×`),
      make("span", { class: "note" }, `margin ${percent(margin)}; strictly: ${result.strict_verdict}`),
      make("span", { class: "note" }, `${result.settings.rounds} paired rounds, ${batches(result.settings)}, ${result.dtype}, ${new Date(result.date).toLocaleString()}`)),
    make("p", {}, result.reason + "."),
    ...(result.settings.grid.length ? [make("figure", { class: "surface" }, surface(result.regimes), make("figcaption", { class: "note" }, "Share of its ceiling that each batch and prompt reached."))] : []),
    make("div", { class: "regimes" }, ...result.regimes.map((regime) => regimeCard(regime, claim, margin)))));
}

const batches = (settings) =>
  settings.grid.length ? `batches of ${settings.grid.map(cell).join(", ")}` : `batch ${settings.batch_size}`;

function problem(message) {
  $("verdict").replaceChildren(make("p", { class: "problem", role: "alert" }, message));
}

export async function startSpeedup(model) {
  if (!model.baseline) {
    $("speed-intro").textContent = "This server has no baseline. Start it with --baseline and the dense parent, and the claimed speed-up can be checked here.";
    $("check").hidden = true;
    return;
  }
  runsOneAtATime($("check"), $("check-run"), $("check-stop"), async (signal) => {
    const body = {
      claim: $("claim").valueAsNumber,
      margin: $("margin").valueAsNumber / 100,
      batch_size: $("batch").valueAsNumber,
      prompt_tokens: $("prompt-tokens").valueAsNumber,
      grid: cells($("grid").value),
      output_tokens: $("output-tokens").valueAsNumber,
      rounds: $("rounds").valueAsNumber,
    };
    const begun = performance.now();
    // The passing seconds are for the eye. A screen reader hears the beginning and the end.
    const passed = make("span", { "aria-hidden": "true" }, "0 s");
    $("verdict").replaceChildren(make("p", { class: "busy" }, "Both models run in turns.", passed));
    const clock = setInterval(() => { passed.textContent = `${Math.round((performance.now() - begun) / 1000)} s`; }, 1000);
    try {
      show(await postJson("/benchmark/speedup", body, signal));
    } catch (error) {
      if (error.name === "AbortError") $("verdict").replaceChildren(make("p", { class: "note" }, "Stopped."));
      else problem(error.message);
    } finally {
      clearInterval(clock);
    }
  });
  if (model.has_speedup) show(await getJson("/benchmark/speedup"));
}
