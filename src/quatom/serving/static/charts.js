// The server's metrics, once a second, as three charts.
import { Chart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const charts = {
  rate: new Chart($("rate"), 2),
  requests: new Chart($("requests"), 2),
  kv: new Chart($("kv"), 1, 1),
};
let last = null;

// Prometheus text -> {name: value}; one model, so labels do not matter.
function parse(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const match = /^vllm:(\w+)(?:\{[^}]*\})? (\S+)$/.exec(line);
    if (match) values[match[1]] = Number(match[2]);
  }
  return values;
}

function show(now) {
  if (last) {
    const seconds = now.time - last.time;
    const rate = (name) => Math.max(0, now[name] - last[name]) / seconds;
    charts.rate.add([rate("generation_tokens_total"), rate("prompt_tokens_total")]);
    $("rate-now").value = rate("generation_tokens_total").toFixed(1);
  }
  charts.requests.add([now.num_requests_running, now.num_requests_waiting]);
  charts.kv.add([now.kv_cache_usage_perc]);
  $("requests-now").value = `${now.num_requests_running} + ${now.num_requests_waiting}`;
  $("kv-now").value = `${(100 * now.kv_cache_usage_perc).toFixed(1)} %`;
  last = now;
}

export async function poll() {
  try {
    const response = await fetch("/metrics", { cache: "no-store" });
    show({ time: performance.now() / 1000, ...parse(await response.text()) });
    $("state").textContent = "";
  } catch {
    $("state").textContent = "the server does not answer";
  }
  setTimeout(poll, 1000);
}
