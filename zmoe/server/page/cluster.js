// The cluster: what /v1/cluster tells, every second while somebody looks.

import { ask } from "./api.js";
import { $, duration, figure, make, size } from "./dom.js";

const EVERY_MS = 1000;
const POINTS = 60;
const PARTS = ["experts", "exchange", "wait", "other"];
const COLOURS = { ready: "good", loading: "warn", closing: "warn" };
// As the leader sees the others:
const STATES = { up: "linked", down: "link down", lost: "lost" };
const speeds = [];
let last = null; // {at, tokens}: of the answer before

export async function begin() {
  for (;;) {
    if (!document.hidden) {
      try {
        show(await (await ask("/v1/cluster")).json());
      } catch (error) {
        showStatus("unreachable", error.message);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function showStatus(status, reason) {
  setText($("status"), status);
  $("status").className = `pill ${COLOURS[status] ?? "bad"}`;
  $("trouble").hidden = !reason;
  setText($("trouble"), reason ?? "");
}

/** Only what changes is written: a screen reader speaks of what is. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function show(cluster) {
  showStatus(cluster.status, cluster.reason);
  setText($("model"), cluster.model.id);
  document.title = `${cluster.model.id} · zmoe`;
  const count = cluster.nodes.length;
  const running = `${cluster.model.id} runs on ${count === 1 ? "one node" : `${count} nodes`}.`;
  setText($("empty-text"), count ? running : "The model is loading.");
  if (cluster.queue) {
    showLoad(cluster);
    showLayer(cluster);
  }
  showNodes(cluster);
  showRun(cluster);
}

function showLoad({ recent, queue, cache, counts }) {
  const now = performance.now();
  if (last && counts.generated_tokens >= last.tokens && now - last.at < 5 * EVERY_MS) {
    speeds.push((1e3 * (counts.generated_tokens - last.tokens)) / (now - last.at));
    speeds.splice(0, speeds.length - POINTS);
  }
  last = { at: now, tokens: counts.generated_tokens };
  setText($("speed"), figure(recent.generated_tokens_per_second));
  drawTrend();
  setText($("running"), figure(queue.running));
  setText($("waiting"), `running, ${figure(queue.waiting)} waiting`);
  const share = cache.blocks ? (100 * cache.used) / cache.blocks : 0;
  setText($("cache"), `${figure(share)}%`);
  setText($("cache-of"), `of ${figure(cache.blocks * cache.tokens_per_block)} tokens`);
}

function drawTrend() {
  const top = Math.max(1, ...speeds);
  const points = speeds.map((speed, at) => {
    const x = 120 - (120 * (speeds.length - 1 - at)) / (POINTS - 1);
    return `${x.toFixed(1)},${(30 - (28 * speed) / top).toFixed(1)}`;
  });
  const [area, line] = $("trend").children;
  line.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  const first = points[0]?.split(",")[0];
  area.setAttribute("d", points.length > 1 ? `M${first},32L${points.join("L")}L120,32Z` : "");
}

function showLayer({ recent, total: sinceStart }) {
  const busy = recent.steps > 0;
  const parts = busy ? recent.layer_us : sinceStart.layer_us;
  const total = PARTS.reduce((sum, part) => sum + (parts[part] ?? 0), 0);
  if (total === 0) return;
  setText($("layer-total"), `${duration(total)} ${busy ? "in the last seconds" : "since the start"}`);
  for (const part of PARTS) {
    const share = (100 * parts[part]) / total;
    $("bar").querySelector(`[data-part=${part}]`).style.width = `${share}%`;
    const text = document.querySelector(`.legend [data-part=${part}] dd`);
    write(text, duration(parts[part]), `${Math.round(share)}%`);
  }
}

function showNodes({ nodes, model }) {
  const machines = new Set(nodes.map((node) => node.machine)).size;
  const where = machines === 1 ? "on one machine" : `on ${machines} machines`;
  setText($("nodes-note"), nodes.length > 1 ? where : "");
  const table = $("nodes");
  while (table.rows.length > nodes.length) table.deleteRow(-1);
  nodes.forEach((node, rank) => fillRow(table.rows[rank] ?? makeRow(table), node, model));
}

function makeRow(table) {
  const row = table.insertRow();
  row.append(make("th", { scope: "row" }, make("span"), make("small")));
  row.append(make("td", {}, make("span"), make("small"), make("meter", { max: 1 })));
  row.append(make("td", {}, make("span"), make("small")));
  row.append(make("td", {}, make("span", { className: "pill" })));
  return row;
}

function fillRow(row, node, model) {
  const [name, experts, memory, state] = row.cells;
  const ports = node.listens.length > 0 ? `\nports ${node.listens.join(", ")}` : "";
  write(name, `${node.rank} ${node.role}`, `${node.host}${ports}`);
  const each = node.experts / model.moe_layers;
  write(experts, `${figure(each)} of ${model.experts}`, `${figure(100 * node.expert_share)}% of all`);
  experts.querySelector("meter").value = node.expert_share;
  experts.querySelector("meter").ariaLabel = "Share of all experts";
  write(memory, size(node.peak_memory), `of ${size(node.memory)}`);
  const taken = node.link === "lost" ? `, taken over by ${node.computed_by ?? "the others"}` : "";
  const slow = node.slow ? ", slow" : "";
  setText(state.firstChild, `${STATES[node.link] ?? "leads"}${taken}${slow}`);
  state.firstChild.title = node.slow ?? "";
  const isBad = ["down", "lost"].includes(node.link) || node.slow;
  state.firstChild.className = `pill ${isBad ? "bad" : "good"}`;
}

function write(cell, text, small) {
  setText(cell.querySelector("span"), text);
  setText(cell.querySelector("small"), small);
}

function showRun(cluster) {
  const { model, counts } = cluster;
  const rows = [];
  if (model.type) {
    const shape = `${model.layers} layers, ${model.top_k} of ${model.experts} experts`;
    rows.push(["Model", `${model.type}, ${model.dtype}`, shape]);
    if (model.quantization !== "none") rows.push(["Weights", model.quantization]);
    if (model.context) rows.push(["Context", `${figure(model.context)} tokens`]);
    rows.push(["Placement", cluster.placement.name, cluster.placement.reason]);
    rows.push(["Schedule", cluster.schedule]);
    rows.push(["On the wire", cluster.wire_dtype]);
    rows.push(["Compute", cluster.compute]);
  }
  if (counts) {
    const cached = counts.prompt_tokens ? (100 * counts.cached_tokens) / counts.prompt_tokens : 0;
    const prompts = `${figure(counts.prompt_tokens)} tokens`;
    rows.push(["Prompts", prompts, `${figure(cached)}% from the cache`]);
    const drafts = counts.drafted_tokens
      ? `${figure(counts.accepted_tokens)} of ${figure(counts.drafted_tokens)} drafted tokens were right`
      : "";
    rows.push(["Generated", `${figure(counts.generated_tokens)} tokens`, drafts]);
    if (counts.preemptions) rows.push(["Preempted", `${figure(counts.preemptions)} times`]);
    rows.push(...ofExchange(counts.exchange));
  }
  if (cluster.restarts) rows.push(["Restarts", figure(cluster.restarts)]);
  fillList($("about"), rows);
}

function ofExchange(counters) {
  if (counters.exchanges === undefined) return [];
  const bad = Object.entries(counters).filter(([name, count]) => name.startsWith("bad_") && count);
  const notes = [
    [counters.resend_asked, "frames asked for again"],
    [bad.reduce((sum, [, count]) => sum + count, 0), "frames dropped"],
    [counters.link_drops, "links broke"],
  ];
  const seen = notes.filter(([count]) => count > 0).map(([count, what]) => `${figure(count)} ${what}`);
  return [["Exchanges", figure(counters.exchanges), seen.join(", ") || "nothing lost"]];
}

function fillList(list, rows) {
  while (list.children.length < 2 * rows.length) {
    list.append(make("dt"), make("dd", {}, make("span"), make("small")));
  }
  while (list.children.length > 2 * rows.length) list.lastChild.remove();
  rows.forEach(([term, text, small], at) => {
    setText(list.children[2 * at], term);
    write(list.children[2 * at + 1], text, small ?? "");
  });
}
