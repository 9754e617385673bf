// What the controls do. Everything that is shown comes from cases.json and each case's facts.json.

import {Panes, PANES} from "./panes.js";
import {LabelList} from "./labels.js";

const $ = (id) => document.getElementById(id);
const SIDES = [["Right", "Left"], ["Anterior", "Posterior"], ["Superior", "Inferior"]];
const THROUGH = {axial: 2, coronal: 1, sagittal: 0};

const state = {cases: [], number: 0, facts: null, opacity: 0.5, isOn: true};
const panes = new Panes(showPoint);
const list = new LabelList($("list"), {onSeen: (seen) => panes.setSeen(seen), onJump: (label) => label.centre_ras_mm && panes.jump(label.centre_ras_mm)});

async function json(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(path);
  return answer.json();
}

function say(text) { $("message").textContent = text; }

async function open(number) {
  state.number = number;
  delete document.body.dataset.shown;
  $("cases").selectedIndex = number;
  $("previous").disabled = number === 0;
  $("next").disabled = number === state.cases.length - 1;
  const base = `cases/${number}`;
  say("Reading the volume …");
  try {
    state.facts = await json(`${base}/facts.json`);
    document.title = `${state.facts.name} · volseg view`;
    describe(state.facts);
    list.fill(state.facts.labels);
    await panes.show(base, state.facts, {seen: list.seen, opacity: state.isOn ? state.opacity : 0});
  } catch {
    say("This case cannot be shown; the terminal says why.");
    return;
  }
  const largest = state.facts.labels.filter((x) => x.value).sort((a, b) => b.volume_ml - a.volume_ml)[0];
  if (largest) panes.jump(largest.centre_ras_mm); else showPoint(panes.point());
  say("");
  await surfaces(base, number);
}

async function surfaces(base, number) {
  const present = state.facts.labels.filter((x) => x.value);
  const at = document.querySelector('[data-pane="solid"] .at');
  for (const [done, label] of present.entries()) {
    if (state.number !== number) return;
    at.textContent = `${done} of ${present.length} surfaces`;
    await panes.addSurface(base, label, list.seen.has(label.value));
  }
  at.textContent = present.length ? "smoothed for display" : "no label found";
  panes.pointSolid(panes.point());
  document.body.dataset.shown = number;
}

function describe({grid, modality}) {
  const tilt = grid.tilt_degrees >= 0.1 ? ` · tilted by ${grid.tilt_degrees}°` : "";
  $("grid").textContent = [modality, `${grid.shape.join(" × ")} voxels`, `${grid.spacing_mm.map((s) => +s.toFixed(3)).join(" × ")} mm`, grid.axis_codes].filter(Boolean).join(" · ") + tilt;
  $("along").hidden = grid.tilt_degrees < 0.1;
  $("unit").textContent = modality === "CT" ? "in HU" : "";
  $("presets").replaceChildren(...[{name: "Reset", ...state.facts.window}, ...state.facts.presets].map((preset) => {
    const button = document.createElement("button");
    Object.assign(button, {type: "button", textContent: preset.name, onclick: () => setWindow(preset.low, preset.high)});
    return button;
  }));
  const {low, high} = state.facts.range;
  const span = Math.max(high - low, 1e-6);
  for (const [name, from, to] of [["level", low, high], ["width", span / 500, span]]) {
    Object.assign($(name), {min: from, max: to, step: span / 500});
    $(`${name}-number`).step = span > 50 ? 1 : "any";
  }
  showWindow(state.facts.window.low, state.facts.window.high);
}

function showWindow(low, high) {
  const figures = {level: (low + high) / 2, width: high - low};
  for (const [name, figure] of Object.entries(figures)) {
    $(name).value = figure;
    $(`${name}-number`).value = +figure.toPrecision(4);
  }
}

function setWindow(low, high) {
  panes.setWindow(low, high);
  showWindow(low, high);
}

function windowFrom(suffix) {
  const [level, width] = [$(`level${suffix}`).valueAsNumber, $(`width${suffix}`).valueAsNumber];
  if (Number.isFinite(level) && width > 0) setWindow(level - width / 2, level + width / 2);
}

// Drag with the right button: level up and down, width left and right; five hundred pixels are the image's range.
function dragWindow(from) {
  const {low, high} = state.facts.range;
  const part = Math.max(high - low, 1e-6) / 500;
  const [level, width] = [$("level").valueAsNumber, $("width").valueAsNumber];
  let drawn = 0;
  const move = (to) => {
    cancelAnimationFrame(drawn);
    drawn = requestAnimationFrame(() => {
      const newLevel = level - (to.clientY - from.clientY) * part;
      const newWidth = Math.max(width + (to.clientX - from.clientX) * part, part);
      setWindow(newLevel - newWidth / 2, newLevel + newWidth / 2);
    });
  };
  window.addEventListener("pointermove", move);
  window.addEventListener("pointerup", () => window.removeEventListener("pointermove", move), {once: true});
}

function side(mm, axis) {
  const rounded = Math.round(mm[axis] * 10) / 10;
  return [SIDES[axis][rounded < 0 ? 1 : 0], Math.abs(rounded).toFixed(1)];
}

function showPoint(mm) {
  for (const [axis, name] of ["x", "y", "z"].entries()) {
    const [word, distance] = side(mm, axis);
    $(`${name}-side`).textContent = word;
    $(name).textContent = `${distance} mm`;
  }
  for (const [pane, axis] of Object.entries(THROUGH)) {
    const [word, distance] = side(mm, axis);
    document.querySelector(`[data-pane="${pane}"] .at`).textContent = `${word} ${distance} mm`;
  }
  const [image, labels] = panes.planes.volumes;
  if (!labels) return;
  const measured = image.getValue(...image.mm2vox(mm));
  $("value").textContent = `${+measured.toPrecision(6)}${state.facts.modality === "CT" ? " HU" : ""}`;
  const value = labels.getValue(...labels.mm2vox(mm));
  list.mark(value, $("here"));
}

function setOpacity(part) {
  state.opacity = Math.min(1, Math.max(0, part));
  state.isOn = true;
  $("opacity").value = Math.round(state.opacity * 100);
  $("opacity-value").textContent = `${$("opacity").value} %`;
  panes.setOpacity(state.opacity);
}

function toggleLabels() {
  state.isOn = !state.isOn;
  panes.setOpacity(state.isOn ? state.opacity : 0);
  $("opacity-value").textContent = state.isOn ? `${$("opacity").value} %` : "off";
}

function setRadiological(is) {
  $("radiological").ariaPressed = is;
  $("neurological").ariaPressed = !is;
  $("convention").textContent = is
    ? "Radiological convention: the patient's right is on the left of the picture"
    : "Neurological convention: the patient's left is on the left of the picture";
  panes.setRadiological(is);
}

function press(id, apply) {
  const is = $(id).ariaPressed !== "true";
  $(id).ariaPressed = is;
  apply(is);
}

function setTheme(theme) { document.documentElement.dataset.theme = theme; }
function otherTheme() { setTheme(document.documentElement.dataset.theme === "light" ? "dark" : "light"); }
function go(step) { if (state.cases[state.number + step] !== undefined) open(state.number + step); }
const isRadiological = () => $("radiological").ariaPressed === "true";

const KEYS = {
  "0": () => panes.setAlone(null), "1": () => panes.setAlone("axial"), "2": () => panes.setAlone("coronal"),
  "3": () => panes.setAlone("sagittal"), "4": () => panes.setAlone("solid"),
  ArrowLeft: () => panes.step(-1, 0, 0), ArrowRight: () => panes.step(1, 0, 0),
  ArrowUp: () => panes.step(0, 1, 0), ArrowDown: () => panes.step(0, -1, 0),
  PageUp: () => panes.step(0, 0, 1), PageDown: () => panes.step(0, 0, -1),
  n: () => list.jump(1), N: () => list.jump(-1), o: toggleLabels, "[": () => setOpacity(state.opacity - 0.1),
  "]": () => setOpacity(state.opacity + 0.1), u: () => press("outline", (is) => panes.setOutline(is)),
  "+": () => panes.zoom(1.25), "=": () => panes.zoom(1.25), "-": () => panes.zoom(0.8),
  w: () => setWindow(state.facts.window.low, state.facts.window.high), r: () => setRadiological(!isRadiological()),
  v: () => $("along").hidden || press("along", (is) => panes.setAlong(is)), ",": () => go(-1), ".": () => go(1),
  t: otherTheme, "?": () => $("keys").showModal(),
};

function onKey(event) {
  const isTyping = event.target.matches("input:not([type=checkbox]), select, dialog *");
  const act = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (isTyping || !act || !state.facts || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  event.stopPropagation();
  act();
}

function wire() {
  document.addEventListener("keydown", onKey, {capture: true});
  $("planes").addEventListener("pointerdown", (event) => {
    const pane = panes.paneAt(event.offsetX / event.target.clientWidth, event.offsetY / event.target.clientHeight);
    panes.used = pane;
    for (const box of document.querySelectorAll(".pane")) box.classList.toggle("used", box.dataset.pane === pane);
    if (event.button === 2 && state.facts) dragWindow(event);
  });
  $("planes").addEventListener("contextmenu", (event) => event.preventDefault());
  for (const pane of PANES) {
    document.querySelector(`[data-pane="${pane}"] .grow`).onclick = () => panes.setAlone(panes.alone ? null : pane);
  }
  $("cases").onchange = () => open($("cases").selectedIndex);
  $("previous").onclick = () => go(-1);
  $("next").onclick = () => go(1);
  $("radiological").onclick = () => setRadiological(true);
  $("neurological").onclick = () => setRadiological(false);
  $("along").onclick = () => press("along", (is) => panes.setAlong(is));
  $("outline").onclick = () => press("outline", (is) => panes.setOutline(is));
  $("theme").onclick = otherTheme;
  $("help").onclick = () => $("keys").showModal();
  $("opacity").oninput = () => setOpacity($("opacity").value / 100);
  $("all").onclick = () => list.see(() => true);
  $("none").onclick = () => list.see(() => false);
  $("filter").oninput = () => list.draw($("filter").value);
  for (const name of ["level", "width"]) {
    $(name).oninput = () => windowFrom("");
    $(`${name}-number`).onchange = () => windowFrom("-number");
  }
}

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
  say("Starting …");
  await panes.attach();
  setRadiological(true);
  wire();
  state.cases = await json("cases.json");
  $("cases").replaceChildren(...state.cases.map((name) => new Option(name)));
  $("previous").hidden = $("next").hidden = state.cases.length === 1;
  await open(0);
}

// For the tests and for the curious.
window.volseg = {state, panes, list};
start().catch(() => say("The page cannot start: it needs a browser with WebGL 2."));
