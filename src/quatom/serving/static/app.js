// The chat: a conversation, one answer under way, what went wrong. Nothing comes from elsewhere.
import { Answer } from "./answer.js";
import { poll } from "./charts.js";
import { element } from "./dom.js";
import { reason, stream } from "./stream.js";

const $ = (id) => document.getElementById(id);
const messages = $("messages");
const hint = $("hint");
let conversation = [];
let running = null; // AbortController of the answer under way
let answer = null; // the last one

// The end of the conversation stays in view while it grows, unless somebody has scrolled up.
let following = true;
const follow = () => {
  if (following) messages.scrollTop = messages.scrollHeight;
};
messages.addEventListener("scroll", () => {
  following = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
});
new MutationObserver(follow).observe(messages, { childList: true, subtree: true, characterData: true });
new ResizeObserver(follow).observe(messages);

function show(node) {
  following = true;
  messages.append(node);
}

// Throws where the fields are no request.
function request() {
  const system = $("system").value.trim();
  const tools = $("tools").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("max-tokens").value !== "") body.max_completion_tokens = Number($("max-tokens").value);
  if (tools) {
    try {
      body.tools = JSON.parse(tools);
    } catch (error) {
      throw new Error(`the tools are no JSON: ${error.message}`);
    }
  }
  return body;
}

async function ask() {
  running = new AbortController();
  $("send").textContent = "Stop";
  messages.querySelectorAll(".message.error").forEach((old) => old.remove());
  answer?.settle();
  answer = new Answer();
  const mine = answer;
  const controller = running;
  show(mine.root);
  const start = performance.now();
  let ending = "";
  let usage = null;
  let failure = null;
  try {
    for await (const chunk of stream("/v1/chat/completions", request(), controller.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      mine.add(choice.delta);
      ending = choice.finish_reason ?? ending;
    }
  } catch (error) {
    if (error.name === "AbortError") ending = "stopped";
    else failure = error.message;
  }
  if (answer !== mine) return; // the conversation was cleared
  running = null;
  $("send").textContent = "Send";
  finish(failure, ending, usage, (performance.now() - start) / 1000);
}

function finish(failure, ending, usage, seconds) {
  const parts = usage ? [`${usage.completion_tokens} tokens`, `${(usage.completion_tokens / seconds).toFixed(1)} per second`] : [];
  if (ending === "length") parts.push("ended at the limit of tokens");
  if (ending === "stopped") parts.push("stopped");
  answer.finish({ note: parts.join(", "), onRetry: retry, onResult: giveResult });
  if (answer.empty) answer.root.remove();
  else conversation.push(answer.message);
  if (failure) {
    const again = element("button", { text: "Retry", type: "button", className: "retry", onclick: retry });
    const shown = element("div", { className: "message error" }, element("span", { text: failure }), again);
    shown.setAttribute("role", "alert");
    show(shown);
  }
}

// The last answer, whole or not, is dropped and asked for again.
function retry() {
  if (running) return;
  if (conversation.at(-1)?.role === "assistant") conversation.pop();
  answer?.root.remove();
  ask();
}

// Goes on when every call of the answer has its result.
function giveResult(call, text) {
  call.result = text;
  if (running || answer.calls.some((one) => one.result === undefined)) return;
  for (const { id, result } of answer.calls) {
    conversation.push({ role: "tool", tool_call_id: id, content: result });
  }
  ask();
}

function say(text) {
  hint.hidden = true;
  if (conversation.at(-1)?.role === "user") {
    conversation.pop(); // it has no answer, and many templates want roles in turns
    [...messages.querySelectorAll(".user")].at(-1)?.classList.add("unanswered");
  }
  conversation.push({ role: "user", content: text });
  show(element("div", { className: "message user", text }));
  ask();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const text = $("input").value.trim();
  if (!text) return;
  $("input").value = "";
  say(text);
});

$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});

$("suggestions").addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON" && !running) say(event.target.textContent);
});

$("clear").addEventListener("click", () => {
  running?.abort();
  running = null;
  $("send").textContent = "Send";
  conversation = [];
  answer = null;
  messages.replaceChildren(hint);
  hint.hidden = false;
});

$("toggle-charts").addEventListener("click", () => {
  const open = document.body.classList.toggle("with-charts");
  $("toggle-charts").setAttribute("aria-expanded", String(open));
});

async function describe() {
  const response = await fetch("/v1/models");
  if (!response.ok) throw new Error(await reason(response));
  const { id, max_model_len } = (await response.json()).data[0];
  $("model").textContent = `${id}, ${max_model_len} tokens`;
}

describe().catch((error) => {
  $("state").textContent = error.message;
});
poll();
