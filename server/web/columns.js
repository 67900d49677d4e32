// A model's side of the playground: its answer to a prompt, or its conversation.

import { Answer } from "/page/answer.js";
import { make } from "/page/dom.js";

class Side {
  constructor(title, model, path) {
    this.title = title;
    this.path = path;
    this.element = make("article", { class: "answer", "data-side": title.toLowerCase() },
      make("h3", {}, title, make("span", { title: model }, model)));
  }

  async during(work) {
    this.element.classList.add("running");
    try {
      return await work;
    } finally {
      this.element.classList.remove("running");
    }
  }
}

// The prompt is sent as it stands. Every answer takes the place of the last answer.
export class PromptSide extends Side {
  constructor(title, model, path) {
    super(title, model, path);
    const text = make("p", { class: "text", tabindex: "0", role: "region", "aria-label": `${title}: answer` });
    this.answer = new Answer(text, text);
    this.element.append(text, this.answer.problem, this.answer.figures);
  }

  clear() {
    this.answer.clear();
  }

  run(asked, settings, signal) {
    return this.during(this.answer.run(this.path, { prompt: asked.text, ...settings }, signal));
  }
}

// Every message joins the conversation of this model: two models that answer differently have different conversations.
export class ChatSide extends Side {
  constructor(title, model, path) {
    super(title, model, path);
    this.turns = [];
    this.log = make("div", { class: "log", tabindex: "0", role: "region", "aria-label": `${title}: conversation` });
    this.element.append(this.log);
  }

  clear() {
    this.turns = [];
    this.log.replaceChildren();
  }

  async run(asked, settings, signal) {
    const text = make("p", { class: "said" });
    const answer = new Answer(text, this.log);
    const turn = make("div", { class: "turn" },
      make("p", { class: "who" }, "You"), make("p", { class: "asked" }, asked.text),
      make("p", { class: "who" }, this.title), text, answer.problem, answer.figures);
    this.log.append(turn);
    this.log.scrollTop = this.log.scrollHeight;
    const question = { role: "user", content: asked.text };
    const system = asked.system ? [{ role: "system", content: asked.system }] : [];
    const end = await this.during(answer.run(this.path, { messages: [...system, ...this.turns, question], ...settings }, signal));
    // A message without an answer is no part of the conversation, so it can be sent again.
    if (text.textContent) this.turns.push(question, { role: "assistant", content: text.textContent });
    else turn.classList.add("dropped");
    return end;
  }
}
