// The page of `rankalign label`. The server holds the truth; this page holds the set in hand and the steps to undo.
// Whatever comes out of the records is put in as text, never as HTML.
import { enableDrag } from "./drag.js";
import { element, textNode } from "./text.js";

const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const ORDINAL = new Intl.PluralRules("en", { type: "ordinal" });
const SUFFIX = { one: "st", two: "nd", few: "rd", other: "th" };
const nth = (n) => `${n}${SUFFIX[ORDINAL.select(n)]}`;

let view = null; // what the server said last
let turn = 0; // how many events it had then
let levels = []; // the ranking in hand: groups of tied answers, best first
let history = []; // rankings before each step on this set
let tie = false; // the next answer ties with the one before
let asked = false; // the annotator has been told that answers are left out
let underway = 0; // requests after which another set is shown; until then keys and presses do nothing
let unsaved = false; // the server does not know the ranking in hand yet
let queue = Promise.resolve();

// --- talking to the server ---------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const request = (path, body, keepalive = false) => {
  const headers = { Authorization: `Bearer ${token}` };
  if (!body) return fetch(path, { headers });
  headers["Content-Type"] = "application/json";
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), keepalive });
};

const call = async (path, body) => {
  let response;
  try {
    response = await request(path, body);
  } catch {
    throw new Refusal(0, "The command does not answer. If it was stopped, start it again and open the address it prints.");
  }
  const value = await response.json();
  if (!response.ok) throw new Refusal(response.status, value.error);
  return value;
};

// One request after the other, so that events reach the journal in the order in which they happened.
const enqueue = (task) => {
  queue = queue.then(task).then(
    () => { $("trouble").hidden = true; },
    async (error) => {
      if (!(error instanceof Refusal)) throw error;
      if (error.status === 409) show(await call(viewPath(view.at)));
      trouble(error.message);
    },
  ).catch((error) => trouble(error.message));
  return queue;
};

const trouble = (message) => {
  $("trouble").textContent = message;
  $("trouble").hidden = false;
  $("trouble").scrollIntoView({ block: "nearest" });
};

const draft = () => ({ turn: turn + 1, at: view.at, levels });

const flush = async () => {
  if (!unsaved) return;
  const sent = levels;
  turn = (await call("api/draft", draft())).turn;
  unsaved = levels !== sent;
};

const act = (task) => {
  underway += 1;
  return enqueue(task).then(() => { underway -= 1; });
};

const viewPath = (at) => (at === null || at === undefined ? "api/view" : `api/view?at=${at}`);
const load = (at) => act(async () => { await flush(); show(await call(viewPath(at))); });

// Leaving in the middle of a step: the request outlives the page.
addEventListener("pagehide", () => {
  if (view && view.at !== null && unsaved) request("api/draft", draft(), true);
});

// --- showing -----------------------------------------------------------------------------------------------------

const show = (found) => {
  view = found;
  turn = found.turn;
  levels = found.levels ?? [];
  history = [];
  tie = asked = unsaved = false;
  const { total, ranked, skipped, left } = found;
  $("annotator").textContent = found.annotator;
  $("progress").max = total;
  $("progress").value = ranked + skipped;
  lay(found.columns);
  $("counts").textContent = `${ranked} ranked, ${skipped} skipped, ${left} to go`;
  const atEnd = found.at === null;
  $("work").hidden = atEnd;
  $("end").hidden = !atEnd;
  $("title").textContent = atEnd ? (total === 1 ? "The set is done" : `All ${total} sets are done`) : `Set ${found.at + 1} of ${total}`;
  document.title = `${ranked + skipped}/${total} rankalign label`;
  if (atEnd) showEnd();
  else showSet();
  update();
  const notes = { ranked: "Ranked already; a new commit replaces it.", skipped: "Skipped already; a commit replaces that." };
  say(notes[found.status] ?? "");
  scrollTo(0, 0);
  $("title").focus({ preventScroll: true });
};

const showSet = () => {
  $("prompt").replaceChildren(...view.prompt.map(({ role, content }) => {
    const node = element("div", "message");
    node.append(element("div", "role", role || "prompt"), textNode(content));
    return node;
  }));
  $("answers").replaceChildren(...view.answers.map((text, index) => {
    const card = element("li", "card");
    const handle = element("button", "handle", `${index + 1}`);
    handle.type = "button";
    handle.dataset.answer = index;
    const place = element("p", "place");
    place.id = `place-${index}`;
    const body = element("div", "body");
    const shown = textNode(text);
    shown.id = `text-${index}`;
    handle.setAttribute("aria-describedby", shown.id);
    body.append(place, shown);
    card.append(handle, body);
    return card;
  }));
};

// One column, or as many as fit.
const lay = (columns) => {
  view.columns = columns;
  $("answers").classList.toggle("one", columns === 1);
  $("columns").setAttribute("aria-pressed", `${columns === 1}`);
};

const showEnd = () => {
  const { ranked, skipped, output, agreement } = view;
  $("summary").textContent = `You ranked ${ranked} and skipped ${skipped}. The scores are written to ${output}.`;
  $("agreement").replaceChildren(agreement ? agreementTable(agreement) : element("p", "note", "No set has been ranked by two annotators yet, so there is no agreement to show."));
};

const agreementTable = ({ metrics, ci95, n, raters }) => {
  const table = element("table");
  table.append(element("caption", "", `Agreement of ${raters.join(", ")} on ${n} ${n === 1 ? "set" : "sets"}`));
  const head = table.createTHead().insertRow();
  head.append(...["measure", "value", "95 % interval"].map((name) => element("th", "", name)));
  for (const cell of head.cells) cell.scope = "col";
  const names = { krippendorff_alpha: "Krippendorff’s alpha", undefined: "rankings all tied, without tau-b" };
  const body = table.createTBody();
  for (const [name, value] of Object.entries(metrics)) {
    const row = body.insertRow();
    const label = element("th", "", Object.hasOwn(names, name) ? names[name] : name.replace(/^tau_b/, "Kendall’s tau-b"));
    label.scope = "row";
    const bounds = Object.hasOwn(ci95, name) ? ci95[name].map((x) => x.toFixed(3)).join(" to ") : "–";
    row.append(label, element("td", "", Number.isInteger(value) && name === "undefined" ? `${value}` : value.toFixed(3)), element("td", "", bounds));
  }
  return table;
};

// What depends on the ranking in hand.
const update = () => {
  const atEnd = view.at === null;
  if (!atEnd) {
    document.querySelectorAll(".card").forEach((card, index) => {
      const where = placed(index);
      const words = where < 0 ? "not placed" : nth(where + 1) + (levels[where].length > 1 ? ", tied" : "");
      card.classList.toggle("placed", where >= 0);
      $(`place-${index}`).textContent = words;
      card.querySelector(".handle").setAttribute("aria-label", `Answer ${index + 1}, ${words}`);
      card.querySelector(".handle").setAttribute("aria-pressed", `${where >= 0}`);
    });
  }
  $("ranking").replaceChildren(...(atEnd ? [] : ranks()));
  $("ranking").hidden = $("skip").hidden = $("commit").hidden = atEnd;
  $("undo").disabled = !levels.length && !history.length && !view.can_undo;
  $("previous").disabled = view.at === 0;
  $("next").disabled = atEnd;
};

const ranks = () => {
  const nodes = [gap(0)];
  levels.forEach((level, depth) => {
    const rank = element("div", "rank");
    rank.dataset.level = depth;
    rank.append(element("span", "note", nth(depth + 1)));
    for (const index of level) {
      const chip = element("button", "chip", `${index + 1}`);
      chip.type = "button";
      chip.dataset.answer = index;
      chip.setAttribute("aria-label", `Take answer ${index + 1} out of the ranking`);
      rank.append(chip);
    }
    nodes.push(rank, gap(depth + 1));
  });
  return nodes;
};

const gap = (depth) => {
  const node = element("div", "gap");
  node.dataset.gap = depth;
  return node;
};

const say = (message, doubt = false) => {
  $("status").textContent = message;
  $("status").classList.toggle("doubt", doubt);
};

// --- ranking -----------------------------------------------------------------------------------------------------

const placed = (index) => levels.findIndex((level) => level.includes(index));

const change = (next, message) => {
  history.push(levels);
  step(next, message);
};

const step = (next, message) => {
  levels = next;
  tie = asked = false;
  unsaved = true;
  const focused = document.activeElement?.classList.contains("chip");
  update();
  if (focused) $("title").focus({ preventScroll: true });
  say(message);
  enqueue(flush);
};

// The ranking without an answer; `at` is the same place in what is left, if the answer's own rank vanishes.
const without = (index, at = 0) => {
  const where = placed(index);
  const gone = where >= 0 && levels[where].length === 1;
  const rest = levels.map((level) => level.filter((other) => other !== index)).filter((level) => level.length);
  return [rest, gone && where < at ? at - 1 : at];
};

const insert = (index, at) => {
  const [rest, place] = without(index, at);
  change([...rest.slice(0, place), [index], ...rest.slice(place)], `Answer ${index + 1} is ${nth(place + 1)}.`);
};

const join = (index, at) => {
  if (levels[at].includes(index)) return;
  const [rest, place] = without(index, at);
  const next = rest.map((level, depth) => (depth === place ? [...level, index] : level));
  change(next, `Answer ${index + 1} is ${nth(place + 1)}, tied.`);
};

const takeOut = (index) => change(without(index)[0], `Answer ${index + 1} is not placed.`);

const place = (index, tied) => {
  if (placed(index) >= 0) takeOut(index);
  else if ((tied || tie) && levels.length) join(index, levels.length - 1);
  else insert(index, levels.length);
};

const tieNext = () => {
  if (!levels.length) return say("Place an answer first; then = and the answer that ties with it.", true);
  tie = !tie;
  return say(tie ? `The next answer ties for ${nth(levels.length)}.` : "");
};

const undo = () => {
  if (view.at !== null && history.length) step(history.pop(), "One step taken back.");
  else if (view.at !== null && levels.length && view.status === "open") {
    const last = levels.at(-1).at(-1); // after a reload the steps are gone, the ranking is not
    step(without(last)[0], `Answer ${last + 1} is not placed.`);
  } else if (view.can_undo) {
    act(async () => {
      await flush();
      show(await call("api/undo", { turn: turn + 1 }));
      say("The last commit is taken back.");
    });
  }
};

const commit = () => {
  const count = levels.flat().length;
  const out = view.answers.length - count;
  if (count < 2) return say("Place two answers or more, or skip the set.", true);
  if (out && !asked) {
    asked = true;
    return say(`${out === 1 ? "1 answer is" : `${out} answers are`} not placed and will get no score. Enter again to commit.`, true);
  }
  return send(levels);
};

const send = (chosen) => act(async () => {
  show(await call("api/commit", { ...draft(), levels: chosen }));
});

const skip = () => send([]);

const switchColumns = () => enqueue(async () => {
  lay((await call("api/columns", { columns: view.columns === 1 ? 0 : 1 })).columns);
});

const finish = () => act(async () => {
  await call("api/finish", {});
  removeEventListener("keydown", onKey);
  $("title").textContent = "Finished";
  $("summary").textContent = `The scores are written to ${view.output}. You can close this page.`;
  for (const button of document.querySelectorAll("button")) button.disabled = true;
});

// --- keys --------------------------------------------------------------------------------------------------------

const move = (by) => {
  const handles = [...document.querySelectorAll(".handle")];
  const here = handles.indexOf(document.activeElement);
  const next = here < 0 ? (by > 0 ? 0 : handles.length - 1) : Math.min(Math.max(here + by, 0), handles.length - 1);
  handles[next]?.focus();
};

const KEYS = {
  ArrowDown: () => move(1), ArrowRight: () => move(1), ArrowUp: () => move(-1), ArrowLeft: () => move(-1),
  "=": tieNext, u: undo, Backspace: undo, s: skip, Enter: commit,
  p: () => load(view.at === null ? view.total - 1 : view.at - 1),
  n: () => load(view.at + 1 < view.total ? view.at + 1 : null),
  c: () => switchColumns(),
  "?": () => $("keys").showModal(),
};
const BUTTONS = { s: "skip", p: "previous", n: "next", Enter: "commit" };

// On most keyboards Shift and a digit give a sign, on some (French) the digit: only the former ties.
const digit = (event) => {
  if (/^[1-9]$/.test(event.key)) return [Number(event.key) - 1, false];
  const code = /^(?:Digit|Numpad)([1-9])$/.exec(event.code);
  return code && event.key.length === 1 && !"=?".includes(event.key) ? [Number(code[1]) - 1, event.shiftKey] : null;
};

const onKey = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("keys").open || !view) return;
  const focus = document.activeElement;
  const onHandle = focus?.classList.contains("handle");
  if (event.key === "Enter" && focus?.tagName === "BUTTON" && !onHandle) return; // the button's own business
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const number = digit(event);
  const space = event.key === " " && onHandle;
  if (!number && !space && !Object.hasOwn(KEYS, name)) return;
  event.preventDefault();
  if (underway || (event.repeat && !name.startsWith("Arrow"))) return;
  if (space || number) {
    const [index, tied] = space ? [Number(focus.dataset.answer), event.shiftKey] : number;
    if (view.at !== null && index < view.answers.length) place(index, tied);
  } else if (view.at !== null || "up?".includes(name) || name === "Backspace") {
    if (!BUTTONS[name] || !$(BUTTONS[name]).disabled) KEYS[name]();
  }
};
addEventListener("keydown", onKey);

// --- pointer -----------------------------------------------------------------------------------------------------

const press = (id, task) => $(id).addEventListener("click", () => { if (!underway) task(); });
press("undo", undo);
press("skip", skip);
press("commit", commit);
press("finish", finish);
press("previous", KEYS.p);
press("next", KEYS.n);
press("columns", switchColumns);
$("help").addEventListener("click", KEYS["?"]);

// Dropped on a rank it ties, between two it goes in between, back among the answers it is out.
const drop = (index, node) => {
  if (node.dataset.gap) insert(index, Number(node.dataset.gap));
  else if (node.dataset.level) join(index, Number(node.dataset.level));
  else if (placed(index) >= 0) takeOut(index);
};

enableDrag("[data-answer]", "[data-gap], [data-level], #answers", {
  free: () => !underway,
  drop: (from, to) => drop(Number(from.dataset.answer), to),
  press: (from, event) => place(Number(from.dataset.answer), event.shiftKey),
});

load();
