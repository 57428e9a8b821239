// One answer as it converges: text, meters and end.

import { Convergence } from "./convergence.js";

const MARKS = { fast: "fast-forwarded", stationary: "stationary" };

export class Lane {
  #convergence = new Convergence();
  #draft = document.createElement("span");
  #started = null;

  constructor(title) {
    this.element = document.getElementById("lane").content.firstElementChild.cloneNode(true);
    this.element.querySelector("h2").textContent = title;
    this.element.setAttribute("aria-label", title);
    this.answer = this.element.querySelector(".answer");
    this.answer.setAttribute("aria-label", `${title}: text`);
    this.#draft.className = "token draft";
    this.#draft.setAttribute("aria-hidden", "true"); // it changes with every pass: read aloud it would be noise
    this.answer.append(this.#draft);
    this.tokens = this.passes = 0;
    this.seconds = 0;
    this.text = "";
  }

  /** Shows an event of the stream. */
  show(event) {
    this.#started ??= performance.now();
    this.#count(event.usage);
    const choice = event.choices[0];
    if (!choice) return;
    const text = choice.delta ? (choice.delta.content ?? choice.delta.reasoning_content ?? "") : (choice.text ?? "");
    const texts = choice.logprobs?.content?.map(({ token }) => token) ?? choice.logprobs?.tokens ?? [];
    const tokens = texts.join("") === text ? texts : [text];
    if (text || choice.draft !== undefined) {
      for (const token of this.#convergence.step(tokens.filter(Boolean), choice.draft ?? null)) this.#add(token);
    }
    for (const call of choice.delta?.tool_calls ?? []) this.#addCall(call);
    if (choice.draft !== undefined || text) this.#draft.textContent = choice.draft ?? "";
    if (choice.finish_reason) this.end(choice.finish_reason);
    this.answer.scrollTop = this.answer.scrollHeight;
  }

  end(reason) {
    this.#draft.textContent = "";
    const titles = { stop: "Ended by itself.", length: "Ended at the most tokens.", tool_calls: "Ended with a call.", stopped: "Stopped.", error: "Broken off." };
    this.element.querySelector(".end").textContent = titles[reason] ?? reason;
  }

  #add({ text, kind }) {
    const span = document.createElement("span");
    span.className = `token ${kind === "accepted" ? "" : kind} fresh`;
    if (MARKS[kind]) span.title = MARKS[kind];
    span.textContent = text;
    this.#draft.before(span);
    this.text += text;
  }

  #addCall(call) {
    const span = document.createElement("span");
    span.className = "token call";
    span.textContent = (call.function?.name ? `${call.function.name} ` : "") + (call.function?.arguments ?? "");
    this.#draft.before(span);
    this.text += span.textContent;
  }

  #count(usage) {
    if (!usage) return;
    this.tokens = usage.completion_tokens;
    this.passes = usage.decoding?.forward_passes ?? this.passes;
    this.seconds = (performance.now() - this.#started) / 1000;
    this.#meter("tokens", this.tokens);
    this.#meter("passes", this.passes);
    if (this.passes) this.#meter("tpf", (this.tokens / this.passes).toFixed(2));
    // The first pass has no beginning that could be measured here.
    if (this.seconds > 0.05 && this.tokens > 1) this.#meter("speed", this.speed.toFixed(0));
  }

  get speed() {
    return this.seconds ? this.tokens / this.seconds : 0;
  }

  #meter(name, value) {
    this.element.querySelector(`[data-meter=${name}]`).textContent = value;
  }
}
