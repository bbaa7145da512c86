// Chat with streaming, and the server's live charts. No dependency, nothing from the network.
import { Chart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const conversation = [];
let running = null; // AbortController of the answer under way

function show(role, text) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  $("messages").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

// Yields the JSON objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  running = new AbortController();
  $("send").textContent = "Stop";
  const element = show("assistant", "");
  element.classList.add("streaming");
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal: running.signal,
      body: JSON.stringify({
        messages: conversation,
        temperature: Number($("temperature").value),
        max_completion_tokens: Number($("max-tokens").value),
        stream: true,
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      element.textContent += chunk.choices[0]?.delta.content ?? "";
      element.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  element.classList.remove("streaming");
  if (element.textContent) conversation.push({ role: "assistant", content: element.textContent });
  else element.remove();
  running = null;
  $("send").textContent = "Send";
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
  conversation.push({ role: "user", content: text });
  show("user", text);
  answer();
});

$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
});

$("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  $("messages").replaceChildren();
});

// Prometheus text -> {name: value}; one model, so labels do not matter.
function parseMetrics(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const match = /^vllm:(\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) values[match[1]] = Number(match[2]);
  }
  return values;
}

const charts = {
  rate: new Chart($("rate"), 2),
  requests: new Chart($("requests"), 2),
  kv: new Chart($("kv"), 1, 1),
};
let last = null;

async function poll() {
  try {
    const response = await fetch("/metrics", { cache: "no-store" });
    const now = { time: performance.now() / 1000, ...parseMetrics(await response.text()) };
    if (last) {
      const seconds = now.time - last.time;
      const generated = (now.generation_tokens_total - last.generation_tokens_total) / seconds;
      const prompt = (now.prompt_tokens_total - last.prompt_tokens_total) / seconds;
      charts.rate.add([generated, prompt]);
      $("rate-now").value = generated.toFixed(1);
    }
    charts.requests.add([now.num_requests_running, now.num_requests_waiting]);
    charts.kv.add([now.kv_cache_usage_perc]);
    $("requests-now").value = `${now.num_requests_running} + ${now.num_requests_waiting}`;
    $("kv-now").value = `${(100 * now.kv_cache_usage_perc).toFixed(1)} %`;
    $("state").textContent = "";
    last = now;
  } catch {
    $("state").textContent = "the server does not answer";
  }
  setTimeout(poll, 1000);
}

const models = await (await fetch("/v1/models")).json();
const { id, max_model_len } = models.data[0];
$("model").textContent = `${id}, ${max_model_len} tokens`;
poll();
