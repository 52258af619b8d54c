// The page of `rankalign watch`. It asks the command for what is new and draws it; texts are put in as text, never as HTML.
import { chart } from "./chart.js";
import { element, textNode } from "./text.js";

const EVERY = 2000; // milliseconds between two questions
const BARE = ["Learning rate"];
const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
let state = null;
let shown = ""; // the samples on the page, so that those that somebody reads stay as they are

const ask = async () => {
  const response = await fetch(`api/state?seen=${state?.version ?? ""}`, { headers: { Authorization: `Bearer ${token}` } });
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
};

const ago = (seconds) => {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
};

const status = () => {
  const words = { waiting: "Waiting for the run to begin", running: "Running", finished: "Finished" };
  const parts = [];
  if (state.status !== "waiting") parts.push(`step ${state.step}`);
  if (state.round) parts.push(`round ${state.round}`);
  if (state.epoch !== null && state.epoch !== undefined) parts.push(`epoch ${Number(state.epoch.toPrecision(3))}`);
  if (state.changed && state.status === "running") parts.push(`last line ${ago(Date.now() / 1000 - state.changed)} ago`);
  if (state.restarts) parts.push(state.restarts === 1 ? "begun anew once while this page was open" : `begun anew ${state.restarts} times while this page was open`);
  $("status").replaceChildren(element("span", state.status, words[state.status]), parts.length ? `, ${parts.join(", ")}` : "");
};

const show = () => {
  $("name").textContent = state.name;
  document.title = `${state.status === "waiting" ? "…" : state.step} ${state.name} · rankalign watch`;
  $("warned").hidden = !state.warnings.length;
  $("warnings").replaceChildren(...state.warnings.map(([step, name, words]) => {
    const node = element("div");
    node.append(element("dt", "", `${name}, step ${step}`), element("dd", "", words));
    return node;
  }));
  $("best").hidden = !state.best;
  $("best").textContent = state.best;
  $("notes").hidden = !state.notes.length;
  $("notes").replaceChildren(...state.notes.map((note) => element("li", "", note)));
  $("how").hidden = !state.panels.length;
  $("panels").replaceChildren(...state.panels.map((panel) => chart(panel, BARE.includes(panel.title))));
  samples();
};

const samples = () => {
  const now = JSON.stringify(state.samples);
  if (now === shown) return;
  shown = now;
  $("sampled").hidden = !state.samples.length;
  $("samples-of").textContent = `From ${state.samples_of}, the newest first.`;
  $("samples").replaceChildren(...state.samples.map(({ id, prompt, answers }, index) => {
    const node = element("details");
    node.open = index === 0;
    const gist = prompt.slice(0, 400).replace(/\s+/g, " ").trim();
    node.append(element("summary", "", `${id}: ${gist}`.slice(0, 160)));
    const asked = element("div", "prompt");
    asked.append(textNode(prompt));
    const given = element("div", "answers");
    given.append(...answers.map(({ policy, text, scores, finished }) => {
      const one = element("div");
      const marks = Object.entries(scores).map(([judge, score]) => `${judge} ${Number(score.toPrecision(4))}`);
      one.append(element("h3", "", [policy, ...marks, ...(finished ? [] : ["cut at the limit"])].join(" · ")), textNode(text));
      return one;
    }));
    node.append(asked, given);
    return node;
  }));
};

const turn = async () => {
  try {
    if (!document.hidden || !state) {
      const found = await ask();
      $("trouble").hidden = true;
      if (found.panels) {
        state = found;
        show();
      }
      status();
    }
  } catch (error) {
    const gone = error instanceof TypeError; // fetch's own word for nobody there
    $("trouble").textContent = gone ? "The command does not answer. If it was stopped, start it again and open the address it prints." : error.message;
    $("trouble").hidden = false;
  }
  setTimeout(turn, EVERY);
};
turn();
