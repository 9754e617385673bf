// The list of labels: what is seen, how large it is, where it is.

const MOST_ROWS = 400;

export class LabelList {
  constructor(element, {onSeen, onJump}) {
    Object.assign(this, {element, onSeen, onJump, labels: [], seen: new Set(), current: null});
  }

  fill(labels) {
    this.labels = labels;
    this.present = labels.filter((label) => label.value);
    this.byValue = new Map(this.present.map((label) => [label.value, label]));
    this.current = null;
    document.getElementById("count").textContent = `${this.present.length} of ${labels.length} found`;
    const filter = document.getElementById("filter");
    filter.hidden = labels.length <= 12;
    filter.value = "";
    this.seen = new Set(this.byValue.keys());
    this.draw("");
  }

  // Show those labels that `isSeen` says.
  see(isSeen) {
    this.seen = new Set(this.present.filter(isSeen).map((label) => label.value));
    this.draw(document.getElementById("filter").value);
    this.onSeen(this.seen);
  }

  draw(filter) {
    const wanted = this.labels.filter((label) => label.name.toLowerCase().includes(filter.trim().toLowerCase()));
    const rows = wanted.slice(0, MOST_ROWS).map((label) => this.row(label));
    if (wanted.length > MOST_ROWS) rows.push(make("li", {className: "more", textContent: `and ${wanted.length - MOST_ROWS} more: find them by name`}));
    this.element.replaceChildren(...rows);
    this.markRow();
  }

  row(label) {
    const isPresent = label.value !== null;
    const box = make("input", {type: "checkbox", checked: this.seen.has(label.value), disabled: !isPresent, ariaLabel: `Show ${label.name}`});
    box.onchange = () => {
      if (box.checked) this.seen.add(label.value); else this.seen.delete(label.value);
      this.onSeen(this.seen);
    };
    const name = make("button", {type: "button", className: "name", textContent: label.name, disabled: !isPresent,
      title: isPresent ? `Go to ${label.name}` : `${label.name} was not found`, onclick: () => this.go(label)});
    const only = make("button", {type: "button", className: "only", textContent: "only", hidden: !isPresent,
      ariaLabel: `Show ${label.name} only`, onclick: () => this.see((other) => other === label)});
    const row = make("li", {className: isPresent ? "" : "absent"});
    row.dataset.value = label.value ?? "";
    row.append(box, swatch(label), name, only, make("span", {className: "volume", textContent: volume(label)}));
    return row;
  }

  go(label) {
    this.current = label;
    this.onJump(label);
  }

  // The next (1) or previous (-1) label that occurs.
  jump(step) {
    if (!this.present.length) return;
    const at = this.present.indexOf(this.current);
    const next = at < 0 ? (step > 0 ? 0 : -1) : at + step;
    this.go(this.present.at(next % this.present.length));
  }

  // Say which label lies under the crosshair.
  mark(value, target) {
    const label = this.byValue?.get(value);
    this.value = value;
    target.replaceChildren(...(label ? [swatch(label), label.name] : ["none"]));
    this.markRow();
  }

  markRow() {
    for (const row of this.element.children) row.classList.toggle("here", Boolean(this.value) && row.dataset.value === String(this.value));
  }
}

function make(tag, properties) { return Object.assign(document.createElement(tag), properties); }

function swatch({colour}) {
  const mark = make("span", {className: "swatch"});
  mark.style.background = `rgb(${colour.join(" ")})`;
  return mark;
}

function volume({value, volume_ml: ml}) {
  if (value === null) return "not found";
  if (ml < 0.005) return "< 0.01 mL";
  return `${ml.toFixed(ml < 10 ? 2 : ml < 100 ? 1 : 0)} mL`;
}
