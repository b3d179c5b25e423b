"use strict";

// The page's URL, /r/TOKEN/, belongs to the rater; all requests are relative to it.
const CHOICES = [["left", "Left"], ["same", "No difference"], ["right", "Right"]];
const RETRY_MS = 2000;
const LOOP_PAUSE_MS = 400;
const MAX_DRIFT_S = 0.08;
const ZOOMS = [1, 2, 3, 4, 6, 8];

const byId = (id) => document.getElementById(id);
const views = [byId("left"), byId("right")];
let study = null; // title, criteria, number of tasks, position of the next one
let task = null; // the task on the page
let loaded = 0; // how many of its two samples are loaded
let busy = false;
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let loopTimer = 0;
let zoom = { level: 0, x: 0.5, y: 0.5 };

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

// ---- the server

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const reply = await fetch(path, { ...options, cache: "no-store" });
  const document = await reply.json();
  if (!reply.ok) throw new Refused(reply.status, document.error);
  return document;
}

// Retries until the server answers; the rater's choices stay on the page meanwhile. The server
// stores an answer only once, even if it arrived before the connection broke and is sent again.
async function insist(path, body) {
  for (;;) {
    try {
      const document = await ask(path, body);
      tell("");
      return document;
    } catch (error) {
      if (error instanceof Refused) throw error;
      tell("The server does not respond. Your choices are kept here; trying again…");
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

function tell(problem) { byId("problem").textContent = problem; }
function say(status) { byId("status").textContent = status; }

// ---- what is shown

function show(id) {
  for (const part of ["intro", "rating", "done"]) byId(part).hidden = part !== id;
  byId("progress").hidden = id === "intro";
}

function showProgress() {
  const done = Math.min(study.next, study.tasks);
  byId("count").textContent = `${done} of ${study.tasks} done`;
  byId("bar").max = Math.max(1, study.tasks);
  byId("bar").value = done;
}

function showDone() {
  clearSamples();
  task = null;
  show("done");
  byId("done-text").textContent = study.tasks
    ? "You have rated all your pairs, and your answers are saved. You can close this page."
    : "Every pair has all the ratings it needs; there is nothing left to rate.";
  byId("review").hidden = study.tasks === 0;
  byId("done-title").focus();
}

async function showTask(position) {
  tell("");
  if (position >= study.tasks) { showProgress(); showDone(); return; }
  busy = true;
  try {
    task = await insist(`tasks/${position}`);
  } catch (error) {
    tell(error.message);
    return;
  } finally { busy = false; }
  show("rating");
  showProgress();
  byId("pair-title").textContent = `Pair ${position + 1} of ${study.tasks}`;
  byId("prompt").textContent = task.prompt;
  byId("skip").hidden = true;
  byId("back").hidden = position === 0;
  for (const criterion of study.criteria) {
    for (const [value] of CHOICES) {
      const input = byId(`${criterion.name}-${value}`);
      input.checked = task.choices !== null && task.choices[criterion.name] === value;
    }
  }
  setZoom(0);
  loadSamples();
  refresh();
  byId("pair-title").focus({ preventScroll: true });
  scrollTo(0, 0);
}

function refresh() {
  const ready = loaded === 2 && !busy && chosen() !== null;
  // A disabled button cannot say why; this one explains when it is pressed.
  byId("save").setAttribute("aria-disabled", String(!ready));
}

// ---- samples

function clearSamples() {
  clearTimeout(loopTimer);
  loaded = 0;
  for (const view of views) view.replaceChildren();
}

function loadSamples() {
  clearSamples();
  const shown = task;
  for (const view of views) {
    const sample = document.createElement(shown.kind === "video" ? "video" : "img");
    const side = view.id;
    const ready = () => {
      if (task !== shown) return;
      loaded += 1;
      if (loaded === 2 && shown.kind === "video") beginLoop();
      refresh();
    };
    if (shown.kind === "video") {
      sample.muted = true;
      sample.playsInline = true;
      sample.preload = "auto";
      sample.addEventListener("loadeddata", ready, { once: true });
      sample.addEventListener("ended", atEnd);
    } else {
      sample.alt = "";
      sample.addEventListener("load", ready, { once: true });
    }
    let tried = false;
    sample.addEventListener("error", async () => {
      if (task !== shown) return;
      if (!tried) { // the server may have been away for a moment
        tried = true;
        await insist("study").catch(() => {});
        if (task === shown) sample.src = `media/${shown.position}/${side}`;
        return;
      }
      tell(`The ${side} sample cannot be shown here. Reload the page, or skip this pair.`);
      byId("skip").hidden = false;
    });
    view.setAttribute("aria-label", `${side === "left" ? "Left" : "Right"} sample, zoom`);
    sample.src = `media/${shown.position}/${side}`;
    view.append(sample);
  }
  byId("play").hidden = shown.kind !== "video";
  showPlaying();
}

function videos() { return views.map((view) => view.querySelector("video")).filter(Boolean); }

function play(video) { video.play().catch(() => {}); } // if refused, the rater can press Play

function beginLoop() {
  for (const video of videos()) { video.currentTime = 0; if (playing) play(video); }
}

// The shorter video waits for the longer one, and both restart together.
function atEnd() {
  if (playing && videos().every((video) => video.ended)) {
    clearTimeout(loopTimer);
    loopTimer = setTimeout(() => { if (playing) beginLoop(); }, LOOP_PAUSE_MS);
  }
}

// Long videos drift apart, so the second one is set to the time of the first.
setInterval(() => {
  const [first, second] = videos();
  if (!second || first.paused || second.paused || first.ended || second.ended) return;
  if (Math.abs(first.currentTime - second.currentTime) > MAX_DRIFT_S) {
    second.currentTime = first.currentTime;
  }
}, 250);

function togglePlaying() {
  playing = !playing;
  showPlaying();
  clearTimeout(loopTimer);
  const all = videos();
  if (!playing) { for (const video of all) video.pause(); return; }
  if (all.every((video) => video.ended)) { beginLoop(); return; }
  for (const video of all) { if (!video.ended) play(video); }
}

function showPlaying() { byId("play").textContent = playing ? "Pause" : "Play"; }

// ---- zoom: both samples show the same place

function setZoom(level, x = zoom.x, y = zoom.y) {
  zoom = { level: Math.min(Math.max(level, 0), ZOOMS.length - 1), x, y };
  const scale = ZOOMS[zoom.level];
  const edge = 0.5 / scale;
  zoom.x = Math.min(Math.max(zoom.x, edge), 1 - edge);
  zoom.y = Math.min(Math.max(zoom.y, edge), 1 - edge);
  for (const view of views) {
    view.classList.toggle("zoomed", scale > 1);
    for (const sample of view.children) {
      const [left, top] = [zoom.x, zoom.y].map((place) => (0.5 - place) * 100 * scale);
      sample.style.transform = `translate(${left}%, ${top}%) scale(${scale})`;
    }
  }
  byId("zoom").textContent = `${scale}×`;
}

function toggleZoom(x = 0.5, y = 0.5) {
  if (zoom.level > 0) setZoom(0, 0.5, 0.5);
  else setZoom(2, x, y);
}

for (const view of views) {
  let start = null;
  view.addEventListener("pointerdown", (event) => {
    start = { x: event.clientX, y: event.clientY, zoom, moved: false };
    if (zoom.level > 0) view.setPointerCapture(event.pointerId);
  });
  view.addEventListener("pointermove", (event) => {
    if (start === null || zoom.level === 0) return;
    const [dx, dy] = [event.clientX - start.x, event.clientY - start.y];
    if (!start.moved && Math.hypot(dx, dy) < 5) return;
    start.moved = true;
    for (const one of views) one.classList.add("dragged");
    const scale = ZOOMS[zoom.level];
    const box = view.getBoundingClientRect();
    const x = start.zoom.x - dx / box.width / scale;
    const y = start.zoom.y - dy / box.height / scale;
    setZoom(zoom.level, x, y);
  });
  view.addEventListener("pointerup", () => {
    for (const one of views) one.classList.remove("dragged");
  });
  view.addEventListener("pointercancel", () => { start = null; });
  view.addEventListener("click", (event) => {
    const dragged = start !== null && start.moved;
    start = null;
    if (dragged) return;
    if (event.detail === 0) { toggleZoom(); return; } // by key
    const box = view.getBoundingClientRect();
    toggleZoom((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
}
byId("zoom-in").addEventListener("click", () => setZoom(zoom.level + 1));
byId("zoom-out").addEventListener("click", () => setZoom(zoom.level - 1));

// ---- answers

function drawCriteria() {
  for (const criterion of study.criteria) {
    const term = document.createElement("dt");
    const meaning = document.createElement("dd");
    term.textContent = criterion.title;
    meaning.textContent = criterion.definition;
    byId("definitions").append(term, meaning);

    const group = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = criterion.title;
    const definition = document.createElement("span");
    definition.className = "definition";
    definition.textContent = criterion.definition;
    legend.append(definition);
    const choices = document.createElement("div");
    choices.className = "choices";
    for (const [value, text] of CHOICES) {
      const label = document.createElement("label");
      label.className = "choice";
      const input = document.createElement("input");
      input.type = "radio";
      input.name = criterion.name;
      input.value = value;
      input.id = `${criterion.name}-${value}`;
      input.addEventListener("change", refresh);
      const words = document.createElement("span");
      words.textContent = text;
      label.append(input, words);
      choices.append(label);
    }
    group.append(legend, choices);
    byId("criteria").append(group);
  }
}

function groups() { return [...byId("criteria").querySelectorAll("fieldset")]; }

// Returns the choices, or null if one is missing.
function chosen() {
  const choices = {};
  for (const group of groups()) {
    const input = group.querySelector("input:checked");
    if (input === null) return null;
    choices[input.name] = input.value;
  }
  return choices;
}

function chooseByKey(index) {
  const all = groups();
  const current = all.find((group) => group.contains(document.activeElement))
    ?? all.find((group) => group.querySelector("input:checked") === null)
    ?? all[0];
  current.querySelectorAll("input")[index].click();
  const next = all[all.indexOf(current) + 1];
  if (next === undefined) byId("save").focus();
  else (next.querySelector("input:checked") ?? next.querySelector("input")).focus();
}

async function send(choices) {
  if (busy || task === null) return;
  busy = true;
  refresh();
  const { position, version } = task;
  try {
    study = { ...study, ...await insist(`tasks/${position}`, { version: version + 1, choices }) };
    say(`Saved. ${study.next} of ${study.tasks} done.`);
  } catch (error) {
    busy = false;
    refresh();
    tell(error.message);
    if (error.status !== 409) return;
    // Another window was faster: continue where that one is.
    const message = error.message;
    study = await insist("study");
    await showTask(study.next);
    tell(message);
    return;
  }
  busy = false;
  await showTask(Math.min(position + 1, study.next));
}

byId("rating").addEventListener("submit", (event) => {
  event.preventDefault();
  const choices = chosen();
  if (busy) return;
  if (loaded < 2) tell("The samples are still loading.");
  else if (choices === null) {
    tell("Please answer all questions first.");
    groups().find((group) => !group.querySelector("input:checked")).querySelector("input").focus();
  } else send(choices);
});
byId("skip").addEventListener("click", () => send(null));
byId("back").addEventListener("click", () => { if (!busy && task) showTask(task.position - 1); });
byId("review").addEventListener("click", () => showTask(study.tasks - 1));
byId("play").addEventListener("click", togglePlaying);
byId("start").addEventListener("click", () => showTask(study.next));

document.addEventListener("keydown", (event) => {
  if (!byId("keys").checked || byId("rating").hidden || task === null) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const onRadio = target.type === "radio";
  const onButton = target.tagName === "BUTTON" || target.type === "checkbox";
  const digit = /^(?:Digit|Numpad)([123])$/.exec(event.code);
  const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
    event.key];
  if (digit && !event.shiftKey) chooseByKey(Number(digit[1]) - 1);
  else if (event.key === "Enter" && !onButton) byId("rating").requestSubmit();
  else if (event.key.toLowerCase() === "u") byId("back").click();
  else if (event.key.toLowerCase() === "z") toggleZoom();
  else if (event.key === " " && !onButton && !onRadio && !byId("play").hidden) togglePlaying();
  else if (arrow && !onRadio && zoom.level > 0) {
    const step = 0.15 / ZOOMS[zoom.level];
    setZoom(zoom.level, zoom.x + arrow[0] * step, zoom.y + arrow[1] * step);
  } else return;
  event.preventDefault();
});

(async () => {
  try {
    study = await insist("study");
  } catch (error) { tell(error.message); return; }
  document.title = study.title;
  byId("title").textContent = study.title;
  drawCriteria();
  showProgress();
  if (study.next > 0 || study.tasks === 0) await showTask(study.next);
  else show("intro");
})();
