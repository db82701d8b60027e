"use strict";
// The browser of rollouts. Whatever a model wrote is data: it enters the page through textContent alone.
const data = JSON.parse(document.getElementById("rollouts").textContent);
const $ = id => document.getElementById(id);
const PAGE = 20;
const all = data.runs.flatMap((run, number) => run.responses.map(response => ({...response, run: number})));
const state = {page: 0, found: all, panes: [null, null]};

const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};

// Characters that move, hide or are no text are written as their code points. Line breaks and tabs stay.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const visible = text => String(text).replace(HIDDEN, found => "⟨U+" + found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
const start = (text, count) => { const flat = visible(text.slice(0, 2 * count)).replace(/\s+/g, " "); return flat.length > count || text.length > 2 * count ? flat.slice(0, count) + "…" : flat; };
const number = value => value === null || value === undefined ? "–" : Number.isInteger(value) ? String(value) : Number(value).toPrecision(4).replace(/\.?0+$/, "");
const exact = value => Number.isFinite(value) ? Number(value).toPrecision(4) : String(value);

// ---- numbers of tokens: base64 of little-endian columns
const bytesOf = text => Uint8Array.from(atob(text), character => character.charCodeAt(0));
const half = bits => {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
};
const halves = text => { const view = new DataView(bytesOf(text).buffer); return Array.from({length: view.byteLength / 2}, (_, i) => half(view.getUint16(2 * i, true))); };
const tokensOf = response => {
  if (!response.tokens) return [];
  const view = new DataView(bytesOf(response.tokens.ids).buffer), engine = halves(response.tokens.engine);
  const difference = response.tokens.trainer_minus_engine === undefined ? null : halves(response.tokens.trainer_minus_engine);
  const vocabulary = data.runs[response.run].vocabulary;
  return engine.map((logprob, i) => {
    const id = view.getInt32(4 * i, true), known = Object.hasOwn(vocabulary, id) ? vocabulary[id] : null;
    const place = i < response.tokens.first ? i : response.tokens.count - engine.length + i;
    const text = known === null ? "⟨" + id + "⟩" : typeof known === "string" ? visible(known) : "⟨" + known.map(byte => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ") + "⟩";
    return {id, text, place, bytes: known !== null && typeof known !== "string", known: known !== null, engine: logprob, difference: difference ? difference[i] : null};
  });
};

// ---- colours: five steps to each side, the same for every response, so that two can be compared
const SCALES = {
  difference: {bounds: [1e-4, 1e-3, 1e-2, 1e-1, 1], of: token => token.difference, sides: ["trainer lower", "trainer higher"]},
  engine: {bounds: [0.1, 0.7, 2.3, 4.6, 6.9], of: token => token.engine, sides: ["log-prob", ""]},
  advantage: {bounds: [0.01, 0.5, 1, 1.5, 2], of: (_, response) => response.advantage, sides: ["negative", "positive"]},
};
const levelOf = (value, bounds) => {
  if (value === null || value === undefined) return "";
  if (Number.isNaN(value)) return "nan";
  const level = bounds.filter(bound => Math.abs(value) >= bound).length;
  return level ? (value > 0 ? "m" : "l") + level : "";
};
const colourOf = (token, response) => { const scale = SCALES[$("colour").value]; return scale ? levelOf(scale.of(token, response), scale.bounds) : ""; };
const showLegend = () => {
  const scale = SCALES[$("colour").value], items = [];
  if (scale) {
    const mark = (name, text) => { const item = make("li", text); if (name) item.classList.add(name); items.push(item); };
    for (let i = 5; i > 0; i--) mark("l" + i, `${scale.sides[0]} ≤ -${scale.bounds[i - 1]}`);
    mark("", `within ${scale.bounds[0]}: no colour`);
    if (scale.sides[1]) scale.bounds.forEach((bound, i) => mark("m" + (i + 1), `${scale.sides[1]} ≥ ${bound}`));
    mark("nan", "not a number");
  }
  $("legend").replaceChildren(...items);
};

// ---- filters
const isRight = response => {
  if (Object.hasOwn(response.outcomes, "accuracy")) return response.outcomes.accuracy === "correct" ? "right" : response.outcomes.accuracy === "wrong" ? "wrong" : "unknown";
  const accuracy = Object.hasOwn(response.parts, "accuracy") ? response.parts.accuracy : null;
  return accuracy === null ? "unknown" : accuracy > 0 ? "right" : "wrong";
};
const rewardOf = response => { const part = $("part").value; return part === "" ? response.reward : Object.hasOwn(response.parts, part.slice(1)) ? response.parts[part.slice(1)] : null; };
const above = (value, id) => $(id).value === "" || (value !== null && value >= Number($(id).value));
const below = (value, id) => $(id).value === "" || (value !== null && value <= Number($(id).value));
const same = (value, id) => $(id).value === "" || String(value) === $(id).value;
const matches = response => {
  const words = $("search").value.toLowerCase();
  return same(response.run, "run") && same(response.step, "step") && same(isRight(response), "right") && same(response.finished ? "yes" : "no", "finished")
    && same(response.kind, "kind") && above(response.length, "shortest") && below(response.length, "longest")
    && above(rewardOf(response), "least") && below(rewardOf(response), "most")
    && (!words || [response.id, response.question, response.answer, response.response].some(text => text.toLowerCase().includes(words)));
};
const descending = value => (a, b) => (value(b) ?? -Infinity) - (value(a) ?? -Infinity) || 0;
const ORDERS = {step: (a, b) => a.run - b.run || a.step - b.step || a.index - b.index, reward: descending(rewardOf), length: descending(r => r.length),
  lowest: (a, b) => (rewardOf(a) ?? Infinity) - (rewardOf(b) ?? Infinity) || 0, difference: descending(r => r.largest)};

const cell = (row, text) => row.append(make("td", text));
const showList = () => {
  const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const rows = state.found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(response => {
    const row = make("tr");
    row.setAttribute("aria-current", state.panes.includes(response));
    [number(response.step), number(rewardOf(response)), isRight(response), number(response.length), number(response.largest)].forEach(text => cell(row, text));
    cell(row, start(response.question, 120));
    cell(row, start(response.response, 160));
    ["left", "right"].forEach((side, pane) => {
      const button = make("button", pane ? "Compare" : "Show"), place = make("td");
      button.type = "button";
      button.setAttribute("aria-label", `${button.textContent} response ${response.index} of step ${response.step} on the ${side}`);
      button.addEventListener("click", () => open(pane, response));
      place.append(button);
      row.append(place);
    });
    return row;
  });
  $("list").tBodies[0].replaceChildren(...rows);
  $("count").textContent = `${state.found.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} responses in this page match`;
  $("page").textContent = `page ${state.page + 1} of ${pages}`;
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page === pages - 1;
};
const filter = () => { state.found = all.filter(matches).sort(ORDERS[$("sort").value]); state.page = 0; showList(); };

// ---- one response
const open = (pane, response) => { state.panes[pane] = response; showPanes(); showList(); $("panes").scrollIntoView({block: "nearest"}); };
const describe = (token, response) => {
  const trainer = token.difference === null ? null : token.engine + token.difference;
  const lines = [`Token ${token.place + 1} of ${response.tokens.count}: id ${token.id}, ${token.bytes ? "bytes " + token.text + " of a character" : token.known ? JSON.stringify(token.text) : "text not known"}`];
  lines.push(trainer === null ? `log-prob: engine ${exact(token.engine)}, trainer not known` : `log-prob: engine ${exact(token.engine)}, trainer ${exact(trainer)}, difference ${exact(token.difference)}, ratio ${exact(Math.exp(token.difference))}`);
  lines.push(`advantage ${number(response.advantage)}`);
  return lines.join("\n");
};
const showTokens = (place, detail, response) => {
  const tokens = tokensOf(response), spans = [];
  let here = -1;
  const go = (at, scroll) => {
    if (at < 0 || at >= tokens.length) return;
    if (here >= 0) spans[here].classList.remove("here");
    here = at;
    spans[here].classList.add("here");
    if (scroll) spans[here].scrollIntoView({block: "nearest"});
    detail.textContent = describe(tokens[here], response);
  };
  tokens.forEach((token, i) => {
    if (i === response.tokens.first) place.append(make("span", `\n[... ${response.tokens.count - tokens.length} tokens are not in this page ...]\n`, "gap"));
    // A line break has no width: a mark before it can be pointed at.
    const span = make("span", token.text.replace(/\n/g, "↵\n"), `token ${colourOf(token, response)}`);
    span.dataset.number = i;
    spans.push(span);
    place.append(span);
  });
  const at = event => event.target.dataset && event.target.dataset.number !== undefined ? Number(event.target.dataset.number) : -1;
  for (const kind of ["mouseover", "click"]) place.addEventListener(kind, event => go(at(event), false));
  const large = i => Math.abs(tokens[i].difference ?? 0) >= 0.01;
  const moves = {ArrowRight: () => here + 1, ArrowLeft: () => here - 1, Home: () => 0, End: () => tokens.length - 1,
    d: () => { let i = here + 1; while (i < tokens.length && !large(i)) i++; return i; }};
  place.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    go(moves[event.key](), true);
  });
};
const paneOf = (response, pane) => {
  const side = pane ? "Right" : "Left", article = make("article", undefined, "pane"), run = data.runs[response.run];
  article.setAttribute("aria-label", `${side} response`);
  article.append(make("h3", `${side}: ${data.runs.length > 1 ? visible(run.name) + ", " : ""}step ${response.step}, response ${response.index}`));
  const parts = Object.entries(response.parts).map(([name, value]) => `${visible(name)} ${value === null ? "not scored" : number(value)}${Object.hasOwn(response.outcomes, name) ? " (" + visible(response.outcomes[name]) + ")" : ""}`);
  const about = [`reward ${number(response.reward)}: ${parts.join(", ") || "no parts"}`, `advantage ${number(response.advantage)}`,
    `${number(response.length)} tokens, ${response.finished ? "finished" : "cut at the limit"}`, `chosen as: ${response.kind}`];
  if (response.response_left_out) about.push(`${response.response_left_out} characters of the text are not in this page`);
  article.append(make("p", about.join("; "), "about"));
  for (const [name, why] of Object.entries(response.details)) article.append(make("p", `${visible(name)}: ${visible(why)}`, "about"));
  article.append(make("div", visible(response.question), "text question"), make("p", `Reference answer: ${visible(response.answer)}`, "about"));
  const others = all.filter(other => other !== response && other.run === response.run && other.id === response.id);
  if (others.length) {
    const label = make("label", "The same prompt on the other side "), select = make("select");
    select.append(make("option", `${others.length} more responses`));
    others.forEach((other, i) => { const option = make("option", `step ${other.step}, response ${other.index}, reward ${number(other.reward)}`); option.value = i; select.append(option); });
    select.addEventListener("change", () => { if (others[select.value]) open(1 - pane, others[select.value]); });
    label.append(select);
    article.append(label);
  }
  const text = make("div", undefined, "text response"), detail = make("div", undefined, "detail");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `Tokens of the ${side.toLowerCase()} response`);
  detail.setAttribute("role", "status");
  detail.setAttribute("aria-live", "polite");
  if (response.tokens) showTokens(text, detail, response);
  else { text.textContent = visible(response.response); detail.textContent = "The tokens of this response were not kept."; }
  article.append(text, detail);
  if (response.tokens) {
    const decoded = make("details"), content = make("div", visible(response.response), "text");
    decoded.append(make("summary", "Decoded text"), content);
    article.append(decoded);
  }
  const close = make("button", "Close");
  close.type = "button";
  close.addEventListener("click", () => open(pane, null));
  article.append(close);
  return article;
};
const showPanes = () => $("panes").replaceChildren(...state.panes.map((response, pane) => response && paneOf(response, pane)).filter(Boolean));

// ---- start
const choices = (id, first, values, label = value => String(value), key = value => value) =>
  $(id).replaceChildren(...[["", first], ...values.map(value => [key(value), label(value)])].map(([value, text]) => { const option = make("option", visible(text)); option.value = value; return option; }));
const distinct = values => [...new Set(values)];
choices("run", "all", data.runs.map((_, i) => i), i => data.runs[i].name);
choices("step", "all", distinct(all.map(response => response.step)).sort((a, b) => a - b));
choices("kind", "anything", distinct(all.map(response => response.kind)));
choices("part", "total", distinct(all.flatMap(response => Object.keys(response.parts))), name => name, name => "." + name);
$("run").parentElement.hidden = data.runs.length < 2;
$("notes").replaceChildren(...data.runs.map(run => make("p", (data.runs.length > 1 ? visible(run.name) + ": " : "") + visible(run.note))));
$("filters").addEventListener("input", filter);
$("filters").addEventListener("submit", event => event.preventDefault());
$("filters").addEventListener("reset", () => setTimeout(filter));
$("previous").addEventListener("click", () => { state.page--; showList(); });
$("next").addEventListener("click", () => { state.page++; showList(); });
$("colour").addEventListener("change", () => { showLegend(); showPanes(); });
showLegend();
filter();
