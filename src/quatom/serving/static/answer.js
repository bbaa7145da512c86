// One answer as it comes: reasoning, text, tool calls, and a line about how it ended.
import { element } from "./dom.js";
import { markdown } from "./markdown.js";

export class Answer {
  constructor() {
    this.reasoning = "";
    this.content = "";
    this.calls = [];
    this.root = element("div", { className: "message assistant streaming" });
    this.thought = null;
    this.text = element("div", { className: "markdown" });
    this.end = element("p", { className: "end quiet" });
    this.root.append(this.text);
  }

  get empty() {
    return !this.content && !this.reasoning && !this.calls.length;
  }

  // What the next request tells the model of this answer.
  get message() {
    const message = { role: "assistant", content: this.content };
    if (this.calls.length) {
      message.tool_calls = this.calls.map(({ id, name, text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
    }
    return message;
  }

  add(delta) {
    this.reasoning += delta.reasoning_content ?? "";
    this.content += delta.content ?? "";
    for (const { index, id, function: part } of delta.tool_calls ?? []) {
      const call = (this.calls[index] ??= { id: "", name: "", text: "" });
      call.id = id ?? call.id;
      call.name += part?.name ?? "";
      call.text += part?.arguments ?? "";
    }
    this.drawing ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = undefined;
    if (this.reasoning) {
      if (!this.thought) {
        this.thought = element("details", { className: "reasoning", open: true });
        this.thought.append(element("summary", { text: "Reasoning" }), element("div"));
        this.root.prepend(this.thought);
      }
      this.thought.lastChild.textContent = this.reasoning;
      // Once the answer begins, its reasoning folds, unless somebody has opened or closed it.
      if (this.content && !this.folded) {
        this.thought.open = false;
        this.folded = true;
      }
    }
    this.text.replaceChildren(markdown(this.content));
    for (const call of this.calls) this.drawCall(call);
  }

  drawCall(call) {
    if (!call.root) {
      call.root = element("details", { className: "call", open: true });
      call.root.append(element("summary"), element("pre", {}, element("code")));
      this.root.append(call.root);
    }
    call.root.firstChild.textContent = `Calls ${call.name}`;
    call.root.querySelector("code").textContent = indented(call.text);
  }

  // onRetry: ask again; onResult(call, text): what a called function returned, where that is known.
  finish({ note, onRetry, onResult }) {
    this.draw();
    this.root.classList.remove("streaming");
    for (const call of this.calls) {
      const input = element("input", { placeholder: `What ${call.name} returns`, className: "result" });
      input.setAttribute("aria-label", input.placeholder);
      input.addEventListener("change", () => onResult(call, input.value));
      call.root.append(input);
    }
    this.end.append(note, element("button", { text: "Retry", type: "button", className: "retry", onclick: onRetry }));
    this.root.append(this.end);
  }

  // An answer that is no longer the last one cannot be asked for again.
  settle() {
    this.end.querySelector("button")?.remove();
    for (const input of this.root.querySelectorAll("input")) input.disabled = true;
  }
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet
  }
}
