// The three planes and the 3D view: two NiiVue instances that share one crosshair. Points are RAS+ mm.

const {Niivue, NVImage, SLICE_TYPE, DRAG_MODE} = window.niivue;

const LINE = [0.55, 0.82, 1.0, 0.85];
const QUIET = {logLevel: "error", dragAndDropEnabled: false, loadingText: "", backColor: [0, 0, 0, 1],
  clipPlaneHotKey: "", cycleClipPlaneHotKey: "", viewModeHotKey: "", isColorbar: false, fontColor: [0.87, 0.9, 0.93, 1]};

// Where each pane stands as [left, top, width, height] in parts of the whole.
const QUARTERS = {axial: [0, 0, .5, .5], solid: [.5, 0, .5, .5], coronal: [0, .5, .5, .5], sagittal: [.5, .5, .5, .5]};
const SLICES = {axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL};
// The patient axis across, up and through each plane; across is counted to the right of the picture.
const AXES = {axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0]};

export const PANES = Object.keys(QUARTERS);

export class Panes {
  constructor(onMove) {
    this.planes = new Niivue({...QUIET, show3Dcrosshair: false, crosshairColor: LINE,
      crosshairWidthUnit: "mm", isRadiologicalConvention: true, sagittalNoseLeft: true, isSliceMM: true,
      isOrientationTextVisible: false, tileMargin: 0, multiplanarPadPixels: 0, dragMode: DRAG_MODE.none,
      isForceMouseClickToVoxelCenters: true});
    this.solid = new Niivue({...QUIET, sliceType: SLICE_TYPE.RENDER, show3Dcrosshair: true, crosshairColor: LINE,
      crosshairWidthUnit: "mm", isOrientCube: true, backColor: [0.035, 0.045, 0.055, 1]});
    this.alone = null;
    this.used = "axial";
    this.planes.onLocationChange = ({mm}) => { this.pointSolid(mm); onMove(Array.from(mm).slice(0, 3)); };
  }

  async attach() {
    await this.planes.attachToCanvas(document.getElementById("planes"));
    await this.solid.attachToCanvas(document.getElementById("solid"));
    this.planes.setInterpolation(false);
    this.lay();
  }

  // Take the last case away and show another. NiiVue prepares all textures anew at every change of a volume, so
  // volumes get their window, colours and opacity before they are added.
  async show(base, facts, {seen, opacity}) {
    const {low, high} = facts.window;
    const image = await volume(`${base}/image.nii`, {colormap: "gray"});
    const labels = await volume(`${base}/labels.nii`, {opacity});
    [image.cal_min, image.cal_max] = [low, high];
    this.colours = table(facts.labels, seen);
    labels.setColormapLabel({...this.colours});
    for (const mesh of [...this.solid.meshes]) this.solid.removeMesh(mesh);
    for (const old of [...this.planes.volumes].reverse()) this.planes.removeVolume(old);
    this.planes.addVolume(image);
    this.planes.addVolume(labels);
    this.planes.setPan2Dxyzmm([0, 0, 0, 1]);
    this.drawThin();
    this.solid.scene.renderAzimuth = 200;
    this.solid.scene.renderElevation = 12;
    this.solid.setScale(0.8);
  }

  async addSurface(base, label, isSeen) {
    const name = `${label.value}.mz3`;
    const mesh = await this.solid.addMeshFromUrl({url: `${base}/surface-${name}`, name, rgba255: [...label.colour, 255]});
    mesh.visible = isSeen;
  }

  // Which labels are seen, as a Set of values.
  setSeen(seen) {
    this.colours.A = alphas(this.colours.I, seen);
    this.planes.volumes[1].setColormapLabel({...this.colours});
    this.planes.updateGLVolume();
    for (const mesh of this.solid.meshes) mesh.visible = seen.has(parseInt(mesh.name));
    this.solid.drawScene();
  }

  setOpacity(part) { this.planes.setOpacity(1, part); }
  setOutline(is) { this.planes.setAtlasOutline(is ? 1 : 0); }

  setWindow(low, high) {
    const image = this.planes.volumes[0];
    [image.cal_min, image.cal_max] = [low, high];
    this.planes.updateGLVolume();
  }

  setRadiological(is) {
    this.planes.opts.sagittalNoseLeft = is;
    this.planes.setRadiologicalConvention(is);
    this.planes.drawScene();
    this.letter();
  }

  setAlong(is) { this.planes.setSliceMM(!is); }

  // Larger or smaller, with the crosshair at the same place of the screen: NiiVue shows p at p * size + pan.
  zoom(factor) {
    const [x, y, z, before] = this.planes.scene.pan2Dxyzmm;
    const size = Math.min(16, Math.max(1, before * factor));
    const at = this.point();
    const pan = [x, y, z].map((mm, axis) => mm + at[axis] * (before - size));
    this.planes.setPan2Dxyzmm(size === 1 ? [0, 0, 0, 1] : [...pan, size]);
    this.drawThin();
  }

  // Crosshair lines of one and a half pixels, whatever the size of the volume.
  drawThin() {
    if (!this.planes.volumes.length) return;
    const {extentsMin, extentsMax} = this.planes.volumeObject3D;
    const mm = [0, 1, 2].map((axis) => extentsMax[axis] - extentsMin[axis]);
    const {clientWidth, clientHeight} = document.getElementById("planes").parentElement;
    const part = this.alone ? 1 : 0.5;
    const pixels = Object.keys(SLICES).filter((p) => !this.alone || p === this.alone)
      .map((p) => Math.min(part * clientWidth / mm[AXES[p][0]], part * clientHeight / mm[AXES[p][1]]));
    const pixel_mm = 1 / (Math.max(...pixels, 1e-6) * this.planes.scene.pan2Dxyzmm[3]);
    Object.assign(this.planes.opts, {crosshairWidth: 1.5 * pixel_mm, crosshairGap: 14 * pixel_mm});
    this.planes.crosshairs3D = null;
    this.planes.drawScene();
    this.solid.opts.crosshairWidth = Math.max(...mm) / 300;
  }

  point() { return Array.from(this.planes.frac2mm(this.planes.scene.crosshairPos, 0, true)).slice(0, 3); }

  jump(mm) {
    this.planes.scene.crosshairPos = this.planes.mm2frac(mm, 0, true);
    this.planes.drawScene();
    this.planes.createOnLocationChange();
  }

  pointSolid(mm) {
    if (!this.solid.meshes.length) return;
    this.solid.scene.crosshairPos = this.solid.mm2frac(Array.from(mm).slice(0, 3), 0, true);
    this.solid.drawScene();
  }

  // Move by whole voxels to the right, up, and through the plane that was used last.
  step(right, up, through) {
    const axes = AXES[this.used] ?? AXES.axial;
    const isMirrored = this.used === "sagittal" ? this.planes.opts.sagittalNoseLeft : this.planes.opts.isRadiologicalConvention;
    const move = [0, 0, 0];
    move[axes[0]] = isMirrored ? -right : right;
    move[axes[1]] = up;
    move[axes[2]] = through;
    this.planes.moveCrosshairInVox(...move);
  }

  // One pane alone, or all four (null).
  setAlone(pane) {
    this.alone = this.alone === pane ? null : pane;
    if (this.alone) this.used = this.alone;
    this.lay();
  }

  lay() {
    const shown = this.alone ? {[this.alone]: [0, 0, 1, 1]} : QUARTERS;
    this.planes.setCustomLayout(Object.keys(SLICES).filter((p) => p in shown).map((p) => ({sliceType: SLICES[p], position: shown[p]})));
    for (const pane of document.querySelectorAll(".pane")) {
      const {pane: name} = pane.dataset;
      pane.hidden = !(name in shown);
      pane.classList.toggle("alone", this.alone === name);
      pane.classList.toggle("used", this.used === name);
      const title = this.alone ? "All four (0)" : `${pane.querySelector("h2").textContent} alone`;
      pane.querySelector(".grow").title = title;
      pane.querySelector(".grow").setAttribute("aria-label", title);
      if (name in shown) place(pane, shown[name]);
    }
    const box = document.getElementById("solidbox");
    box.hidden = !("solid" in shown);
    document.getElementById("planes").hidden = this.alone === "solid";
    if (!box.hidden) place(box, shown.solid);
    this.planes.resizeListener();
    this.solid.resizeListener();
    this.drawThin();
    this.letter();
  }

  // The patient's sides at the edges of each plane.
  letter() {
    const {isRadiologicalConvention, sagittalNoseLeft} = this.planes.opts;
    const sides = {axial: "LRAP", coronal: "LRSI", sagittal: "PASI"};
    for (const [name, [left, right, top, bottom]] of Object.entries(sides)) {
      const isMirrored = name === "sagittal" ? sagittalNoseLeft : isRadiologicalConvention;
      const letters = {left: isMirrored ? right : left, right: isMirrored ? left : right, top, bottom};
      for (const [edge, letter] of Object.entries(letters)) {
        document.querySelector(`[data-pane="${name}"] .side.${edge}`).textContent = letter;
      }
    }
  }

  // The pane under a point given in parts of the whole.
  paneAt(x, y) {
    return this.alone ?? PANES.find((p) => { const [l, t, w, h] = QUARTERS[p]; return x >= l && x < l + w && y >= t && y < t + h; });
  }
}

// NiiVue would ask for the beginning of a file first and hang up; this asks once.
async function volume(url, options) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(url);
  return NVImage.loadFromUrl({url, name: url.split("/").at(-1), buffer: await answer.arrayBuffer(), ...options});
}

function place(element, [left, top, width, height]) {
  Object.assign(element.style, {left: `${left * 100}%`, top: `${top * 100}%`, width: `${width * 100}%`, height: `${height * 100}%`});
}

// NiiVue's colour table; value 0 is the background.
function table(labels, seen) {
  const present = labels.filter((label) => label.value);
  const channel = (c) => [0, ...present.map((label) => label.colour[c])];
  const I = [0, ...present.map((label) => label.value)];
  const labelled = {labels: ["", ...present.map((label) => label.name)]};
  return {R: channel(0), G: channel(1), B: channel(2), A: alphas(I, seen), I, ...labelled};
}

function alphas(values, seen) { return values.map((value) => (value && seen.has(value) ? 255 : 0)); }
