// The conversation: messages, the answer that is being written, and its errors.

import { Refusal, ask, eventsOf } from "./api.js";
import { $, duration, figure, make, marked } from "./dom.js";
import { settings, systemPrompt } from "./settings.js";

let messages = []; // {role, content} of the conversation so far
let running = null; // the AbortController of the answer that is being written

/** An answer on the screen. */
class Answer {
  constructor() {
    this.content = "";
    this.reasoning = "";
    this.begun = performance.now();
    this.firstAt = null;
    this.tokens = null;
    this.thoughts = make("div");
    this.details = make("details", { className: "reasoning", hidden: true });
    this.details.append(make("summary", {}, "Reasoning"), this.thoughts);
    this.text = make("div", { className: "text" });
    this.meta = make("div", { className: "meta" });
    this.element = make("article", { className: "message assistant busy", "aria-label": "Answer" });
    this.element.setAttribute("aria-busy", "true");
    this.element.append(this.details, this.text, this.meta);
    this.drawing = false;
  }

  take(chunk) {
    if (chunk.error) throw new Refusal(chunk.error.message);
    if (chunk.usage) this.tokens = chunk.usage;
    const delta = chunk.choices[0]?.delta ?? {};
    const isText = Boolean(delta.content || delta.reasoning_content);
    if (isText) this.firstAt ??= performance.now();
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? "";
    this.reason = chunk.choices[0]?.finish_reason ?? this.reason;
    if (isText && !this.drawing) {
      this.drawing = true;
      requestAnimationFrame(() => this.draw());
    }
  }

  draw() {
    this.drawing = false;
    const follows = isAtEnd();
    this.details.hidden = this.reasoning === "";
    this.thoughts.textContent = this.reasoning;
    this.text.replaceChildren(...marked(this.content.trim()));
    if (follows) scrollToEnd();
  }

  end(problem) {
    this.draw();
    const took = performance.now() - (this.firstAt ?? this.begun);
    this.element.classList.remove("busy");
    this.element.removeAttribute("aria-busy");
    const facts = [];
    if (this.tokens) {
      const count = this.tokens.completion_tokens;
      const cached = this.tokens.prompt_tokens_details?.cached_tokens ?? 0;
      facts.push(`${figure(count)} tokens`);
      if (count > 1 && took > 0) facts.push(`${figure((1e3 * (count - 1)) / took)} tokens/s`);
      if (cached > 0) facts.push(`${figure(cached)} cached`);
    }
    if (this.firstAt) facts.push(`first after ${duration(1e3 * (this.firstAt - this.begun))}`);
    if (this.reason === "length") facts.push("ended at the limit");
    if (problem === "stopped") facts.push("stopped");
    this.meta.append(...facts.map((fact) => make("span", {}, fact)));
    if (this.content) this.meta.append(copyButton(() => this.content));
    this.meta.append(retryButton());
    if (problem && problem !== "stopped") {
      this.meta.before(make("p", { className: "error", role: "alert" }, problem));
    }
    scrollToEnd();
  }
}

function copyButton(text) {
  const button = make("button", { type: "button", className: "quiet" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

function retryButton() {
  const button = make("button", { type: "button", className: "quiet retry" }, "Try again");
  button.addEventListener("click", () => {
    if (running) return;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    $("log").lastElementChild.remove();
    answer();
  });
  return button;
}

function isAtEnd() {
  const { scrollTop, clientHeight, scrollHeight } = $("scroller");
  return scrollTop + clientHeight > scrollHeight - 80;
}

function scrollToEnd() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
}

/** Have the model answer the messages so far. */
async function answer() {
  document.querySelectorAll(".retry").forEach((button) => button.remove());
  const shown = new Answer();
  $("log").append(shown.element);
  scrollToEnd();
  const controller = new AbortController();
  setRunning(controller);
  let problem = "";
  try {
    await write(shown, controller.signal);
  } catch (error) {
    problem = controller.signal.aborted ? "stopped" : error.message;
    if (!(error instanceof Refusal) && problem !== "stopped") console.error(error);
  }
  setRunning(null);
  shown.end(problem);
  if (shown.content) messages.push({ role: "assistant", content: shown.content });
  $("spoken").textContent = problem || "The answer is complete.";
}

async function write(shown, signal) {
  const system = systemPrompt();
  const before = system ? [{ role: "system", content: system }] : [];
  const body = {
    messages: [...before, ...messages],
    stream: true,
    stream_options: { include_usage: true },
    ...settings(),
  };
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    shown.take(JSON.parse(data));
  }
  throw new Refusal("The answer broke off.");
}

function send() {
  const content = $("prompt").value.trim();
  if (content === "" || running) return;
  $("empty").hidden = true;
  $("prompt").value = "";
  messages.push({ role: "user", content });
  $("log").append(make("article", { className: "message user", "aria-label": "You" }, content));
  answer();
}

function clear() {
  running?.abort();
  messages = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
}

export function begin() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", () => {
    running?.abort();
    $("prompt").focus();
  });
  $("new").addEventListener("click", clear);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("settings").open) running?.abort();
  });
  if (matchMedia("(min-width: 60rem)").matches) $("prompt").focus();
}
