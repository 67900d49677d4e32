// A model card as elements: headings, paragraphs, lists, tables, code. Everything else stays text.

import { make } from "/page/dom.js";

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\[([^\]]+)\]\(([^)\s]+)\)/g;

function inline(text) {
  const parts = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(from, found.index));
    from = found.index + found[0].length;
    const [, code, strong, label, target] = found;
    if (code) parts.push(make("code", {}, code));
    else if (strong) parts.push(make("strong", {}, strong));
    else if (/^https?:\/\//i.test(target)) parts.push(make("a", { href: target, rel: "noopener noreferrer", target: "_blank" }, label));
    else parts.push(label);
  }
  parts.push(text.slice(from));
  return parts;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  return make("table", { tabindex: "0" },
    make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", { scope: "col" }, ...inline(cell))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, ...inline(cell)))))));
}

export function render(text) {
  const lines = text.replace(/^---\n[\s\S]*?\n---\n/, "").split("\n");
  const out = [];
  const take = (fits) => {
    const taken = [];
    while (lines.length && fits(lines[0])) taken.push(lines.shift());
    return taken;
  };
  while (lines.length) {
    const line = lines[0];
    const heading = /^(#{1,6}) +(.*)$/.exec(line);
    if (!line.trim()) {
      lines.shift();
    } else if (line.startsWith("```")) {
      lines.shift();
      out.push(make("pre", { tabindex: "0" }, make("code", {}, take((next) => !next.startsWith("```")).join("\n"))));
      lines.shift();
    } else if (heading) {
      lines.shift();
      out.push(make(heading[1].length < 3 ? "h3" : "h4", {}, ...inline(heading[2])));
    } else if (line.trimStart().startsWith("|") && /^[\s|:-]+$/.test(lines[1] ?? "")) {
      out.push(table(take((next) => next.trimStart().startsWith("|"))));
    } else if (/^\s*([-*]|\d+\.) /.test(line)) {
      const items = take((next) => /^\s*([-*]|\d+\.) /.test(next) || (/^\s+\S/.test(next)))
        .join("\n").split(/^\s*(?:[-*]|\d+\.) /m).slice(1);
      out.push(make("ul", {}, ...items.map((item) => make("li", {}, ...inline(item.trim())))));
    } else if (/^( {4}|\t)/.test(line)) {
      const code = take((next) => /^( {4}|\t)/.test(next) || !next.trim()).map((next) => next.replace(/^( {4}|\t)/, ""));
      out.push(make("pre", { tabindex: "0" }, make("code", {}, code.join("\n").trimEnd())));
    } else {
      const first = lines.shift();
      const more = take((next) => next.trim() && !/^(#{1,6} |```|\s*\||\s*[-*] )/.test(next));
      out.push(make("p", {}, ...inline([first, ...more].join(" "))));
    }
  }
  return out;
}
