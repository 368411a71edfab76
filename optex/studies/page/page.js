"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const AXES = {
    rounds: "rounds (sequential gradient evaluations)",
    gradients: "gradients evaluated",
    seconds: "seconds on the machine named below, gradients in turn",
  };
  const page = JSON.parse(document.getElementById("data").textContent);
  const { vanilla, rounds, minimum, styles } = page.plot;
  const runs = page.runs.map((run) => ({ ...run, loss: run.loss.map((v) => (v === null ? NaN : v)) }));
  const unique = (values) => [...new Set(values)];
  const problems = unique(runs.map((run) => run.problem));
  const methods = unique(runs.map((run) => run.method));
  const state = { axis: "rounds", log: true, seeds: true, hidden: new Set() };
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  // Names come from outside: they are only ever set as text, never parsed as HTML.
  function element(name, attributes = {}, text = null, space = null) {
    const made = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    return made;
  }
  const shape = (name, attributes, text = null) => element(name, attributes, text, SVG);
  const colours = (style) => `--light:${style.light};--dark:${style.dark}`;

  function figure(value) {
    if (value === 0 || !Number.isFinite(value)) return String(value);
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  // ------------------------------------------------------------------ curves

  /** A run's values on the axis chosen, one a round. */
  function places(run) {
    return state.axis === "rounds" ? run.loss.map((_, i) => i) : run[state.axis];
  }

  /** How far the axis goes: as far as the methods other than vanilla do. */
  function reach(ofProblem) {
    if (state.axis === "rounds") return rounds;
    const others = ofProblem.filter((run) => run.method !== vanilla);
    return most((others.length ? others : ofProblem).map((run) => places(run).at(-1)));
  }

  /** Mean over seeds in the scale shown, up to where the first of them stopped. */
  function curve(group, shift, bounds) {
    const length = least(group.map((run) => run.loss.length));
    const xs = group.map(places);
    const kept = (value) => Math.min(Math.max(value - shift, state.log ? bounds.floor : -Infinity), 10 * bounds.top);
    const made = { points: [], singles: group.map(() => []), stopped: false };
    for (let i = 0; i < length; i++) {
      const values = group.map((run) => kept(run.loss[i]));
      if (!values.every(Number.isFinite)) {
        made.stopped = true;
        break;
      }
      const y = state.log ? Math.exp(mean(values.map(Math.log))) : mean(values);
      made.points.push([mean(xs.map((x) => x[i])), y]);
      values.forEach((value, j) => made.singles[j].push([xs[j][i], value]));
    }
    return made;
  }

  function content(problem) {
    const ofProblem = runs.filter((run) => run.problem === problem);
    const shift = minimum[problem] ?? 0;
    const start = most(ofProblem.map((run) => Math.abs(run.loss[0] - shift)).filter(Number.isFinite));
    // Rounding ends the way down; a diverging method leaves through the top, and the others stay readable.
    const bounds = { floor: Number.EPSILON * start || Number.MIN_VALUE, top: 1e3 * start || 1 };
    const limit = reach(ofProblem);
    const curves = methods.flatMap((method) => {
      const group = ofProblem.filter((run) => run.method === method);
      if (!group.length || state.hidden.has(method)) return [];
      const made = curve(group, shift, bounds);
      const within = ([x]) => x <= limit * (1 + 1e-9);
      const whole = made.points.length;
      made.points = made.points.filter(within);
      made.singles = made.singles.map((points) => points.filter(within));
      made.stopped &&= made.points.length === whole;
      return [{ method, style: styles[method], ...made }];
    });
    return { curves, limit, top: bounds.top };
  }

  // ------------------------------------------------------------------- scales

  function nice(low, high, count) {
    const rough = (high - low) / count || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step);
    return ticks;
  }

  function decades(low, high, count) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const step = Math.max(1, Math.ceil((last - first + 1) / count));
    const ticks = [];
    for (let k = first; k <= last; k += step) ticks.push(10 ** k);
    return ticks;
  }

  function vertical(shown, height) {
    const values = shown.curves.flatMap((one) => one.points.map(([, y]) => y));
    let low = least(values), high = Math.min(most(values), shown.top);
    if (!(low < high)) [low, high] = state.log ? [low / 2 || 0.5, low * 2 || 2] : [low - 1, low + 1];
    const forward = state.log ? Math.log : (v) => v;
    const pad = 0.04 * (forward(high) - forward(low));
    const from = forward(low) - pad, to = forward(high) + pad;
    const wide = state.log && high / low > 10;
    const back = state.log ? Math.exp : (v) => v;
    const ticks = wide ? decades(back(from), back(to), 8) : nice(back(from), back(to), 5);
    return { at: (v) => height * (1 - (forward(v) - from) / (to - from)), ticks, wide };
  }

  // ------------------------------------------------------------------ drawing

  const MARKS = {
    o: "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0Z",
    s: "M-3.2-3.2H3.2V3.2H-3.2Z",
    "^": "M0-4.4 4.2 3.2H-4.2Z",
    D: "M0-4.6 4.6 0 0 4.6-4.6 0Z",
    v: "M0 4.4 4.2-3.2H-4.2Z",
    X: "M-5-3-3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2-3 5-5 3-2 0Z",
  };

  const line = (points, sx, sy) =>
    points.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(2)} ${sy(y).toFixed(2)}`).join("");

  function mark(style, x, y, kind) {
    return shape("path", { class: "mark", d: MARKS[kind], style: colours(style), transform: `translate(${x} ${y})` });
  }

  function strokes(style, d, single = false) {
    const attributes = { class: single ? "series single" : "series", d, style: colours(style) };
    if (!single) Object.assign(attributes, { "stroke-width": style.width, "stroke-dasharray": style.dash });
    return shape("path", attributes);
  }

  function drawCurve(one, order, plot, sx, sy) {
    if (state.seeds && one.singles.length > 1)
      for (const points of one.singles) plot.append(strokes(one.style, line(points, sx, sy), true));
    plot.append(strokes(one.style, line(one.points, sx, sy)));
    // Marks stand at other places for every method, so that coinciding lines show all of them.
    const apart = Math.max(1, Math.round(one.points.length / 6));
    const offset = Math.round((apart * order) / methods.length);
    for (let i = offset; i < one.points.length; i += apart)
      plot.append(mark(one.style, sx(one.points[i][0]), sy(one.points[i][1]), one.style.marker));
    if (one.stopped && one.points.length) {
      const [x, y] = one.points.at(-1);
      plot.append(mark(one.style, sx(x), sy(y), "X"));
    }
  }

  function axes(svg, box, sx, scale, limit, labels) {
    for (const tick of nice(0, limit, box.width < 320 ? 4 : 6)) {
      const x = sx(tick);
      svg.append(shape("line", { class: "grid", x1: x, x2: x, y1: box.top, y2: box.top + box.height }));
      svg.append(shape("text", { x, y: box.top + box.height + 17, "text-anchor": "middle" }, figure(tick)));
    }
    for (const tick of scale.ticks) {
      const y = box.top + scale.at(tick);
      svg.append(shape("line", { class: "grid", x1: box.left, x2: box.left + box.width, y1: y, y2: y }));
      const text = shape("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, scale.wide ? "10" : figure(tick));
      if (scale.wide)
        text.append(shape("tspan", { dy: -5, "font-size": "9px" }, String(Math.round(Math.log10(tick)))));
      svg.append(text);
    }
    const [left, bottom] = [box.left, box.top + box.height];
    svg.append(shape("path", { class: "axis", fill: "none", d: `M${left} ${box.top}V${bottom}H${left + box.width}` }));
    svg.append(shape("text", { x: left + box.width / 2, y: bottom + 36, "text-anchor": "middle" }, labels.x));
    const turned = `rotate(-90 13 ${box.top + box.height / 2})`;
    svg.append(shape("text", { x: 13, y: box.top + box.height / 2, "text-anchor": "middle", transform: turned }, labels.y));
  }

  function draw(panel) {
    const { problem, svg, holder } = panel;
    const width = Math.max(240, holder.clientWidth), height = width < 480 ? 270 : 320;
    const box = { left: 62, top: 8, width: width - 62 - 12, height: height - 8 - 44 };
    for (const [key, value] of Object.entries({ height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(key, value);
    svg.replaceChildren();
    const shown = (panel.shown = content(problem));
    const empty = !shown.curves.some((one) => one.points.length);
    if (empty) {
      svg.append(shape("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no method is shown"));
      panel.move = null;
      return;
    }
    const scale = vertical(shown, box.height);
    const sx = (x) => box.left + (box.width * x) / (shown.limit || 1);
    const sy = (y) => box.top + scale.at(y);
    const known = minimum[problem] !== null && minimum[problem] !== undefined;
    const x = state.axis === "seconds" && width < 480 ? "seconds, gradients in turn" : AXES[state.axis];
    axes(svg, box, sx, scale, shown.limit, { x, y: known ? `loss − minimum (${figure(minimum[problem])})` : "loss" });
    const clip = `clip-${panels.indexOf(panel)}`;
    const cut = svg.appendChild(shape("clipPath", { id: clip }));
    cut.append(shape("rect", { x: box.left, y: box.top - 6, width: box.width + 8, height: box.height + 12 }));
    const plot = svg.appendChild(shape("g", { "clip-path": `url(#${clip})` }));
    // The widest lie beneath, so that a line that coincides with them is seen on top.
    const layers = [...shown.curves].sort((a, b) => b.style.width - a.style.width);
    for (const one of layers) drawCurve(one, methods.indexOf(one.method), plot, sx, sy);
    const cursor = svg.appendChild(shape("g", {}));
    panel.unit = state.axis === "rounds" ? 1 : shown.limit / 60 || 1;
    panel.value = (px) => ((px - box.left) / box.width) * shown.limit;
    panel.move = (at) => move(panel, cursor, Math.min(Math.max(at, 0), shown.limit), sx, sy, box);
  }

  // ------------------------------------------------------------------ reading

  function nearest(points, at) {
    let best = points[0];
    for (const point of points) if (Math.abs(point[0] - at) < Math.abs(best[0] - at)) best = point;
    return best;
  }

  function move(panel, cursor, at, sx, sy, box) {
    if (state.axis === "rounds") at = Math.round(at);
    panel.at = at;
    const read = panel.shown.curves
      .filter((one) => one.points.length)
      .map((one) => ({ ...one, point: nearest(one.points, at) }))
      .sort((a, b) => a.point[1] - b.point[1]);
    cursor.replaceChildren();
    cursor.append(shape("line", { class: "cursor", x1: sx(at), x2: sx(at), y1: box.top, y2: box.top + box.height }));
    for (const one of read) cursor.append(mark(one.style, sx(one.point[0]), sy(one.point[1]), "o"));
    const value = ({ point, points }) => {
      const ended = points.at(-1)[0] < at - panel.unit; // the run has no value here
      return figure(point[1]) + (ended ? ` (ended at ${figure(point[0])})` : "");
    };
    const where = state.axis === "rounds" ? `round ${at}` : `${figure(at)} ${state.axis}`;
    const table = element("table");
    for (const one of read) {
      const row = table.appendChild(element("tr"));
      row.appendChild(element("td")).append(sample(one.style));
      row.append(element("td", {}, one.method), element("td", {}, value(one)));
    }
    panel.tip.replaceChildren(element("strong", {}, where), table);
    panel.tip.hidden = false;
    const right = sx(at) < box.left + box.width / 2;
    const room = Math.max(0, panel.holder.clientWidth - panel.tip.offsetWidth);
    const aside = sx(at) + (right ? 12 : -12 - panel.tip.offsetWidth);
    panel.tip.style.left = `${Math.min(Math.max(aside, 0), room)}px`;
    panel.svg.setAttribute("aria-valuemin", "0");
    panel.svg.setAttribute("aria-valuemax", panel.shown.limit);
    panel.svg.setAttribute("aria-valuenow", at);
    panel.svg.setAttribute("aria-valuetext", `${where}: ${read.map((one) => `${one.method} ${value(one)}`).join(", ")}`);
  }

  function leave(panel) {
    panel.tip.hidden = true;
    panel.svg.querySelector(":scope > g:last-child")?.replaceChildren();
  }

  function keyed(panel, event) {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    const now = panel.at ?? 0;
    const to = { Home: 0, End: Infinity }[event.key] ?? (by === undefined ? null : now + by * panel.unit);
    if (event.key === "Escape") leave(panel);
    if (to === null || !panel.move) return;
    event.preventDefault();
    panel.move(to);
  }

  function sample(style) {
    const svg = shape("svg", { width: 34, height: 12, "aria-hidden": "true" });
    svg.append(strokes(style, "M0 6H34"), mark(style, 17, 6, style.marker));
    return svg;
  }

  // -------------------------------------------------------------------- page

  function makePanel(problem) {
    const holder = element("section", { class: "panel" });
    const svg = shape("svg", { tabindex: 0, role: "slider", "aria-label": `loss on ${problem}, read by arrow keys` });
    const tip = element("div", { class: "tip", "aria-hidden": "true", hidden: "" });
    holder.append(element("h2", {}, problem), svg, tip);
    document.getElementById("panels").append(holder);
    const panel = { problem, holder, svg, tip };
    svg.addEventListener("pointermove", (event) =>
      panel.move?.(panel.value(event.clientX - svg.getBoundingClientRect().left)));
    svg.addEventListener("pointerleave", () => leave(panel));
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && panel.move?.(panel.at ?? 0));
    svg.addEventListener("blur", () => leave(panel));
    svg.addEventListener("keydown", (event) => keyed(panel, event));
    return panel;
  }

  function makeLegend() {
    const legend = document.getElementById("legend");
    for (const method of methods) {
      const button = element("button", { type: "button", "aria-pressed": "true" });
      button.append(sample(styles[method]), element("span", {}, styles[method].label));
      button.addEventListener("click", () => {
        const shown = state.hidden.delete(method);
        if (!shown) state.hidden.add(method);
        button.setAttribute("aria-pressed", String(shown));
        redraw();
      });
      legend.append(button);
    }
  }

  const panels = [];
  function redraw() {
    for (const panel of panels) {
      leave(panel);
      draw(panel);
    }
  }

  for (const id of ["controls", "legend", "hint"]) document.getElementById(id).hidden = false;
  document.getElementById("seeds").hidden = unique(runs.map((run) => run.seed)).length < 2;
  document.getElementById("controls").addEventListener("change", (event) => {
    const { name, value, checked } = event.target;
    if (name === "axis") state.axis = value;
    if (name === "scale") state.log = value === "log";
    if (name === "seeds") state.seeds = checked;
    for (const panel of panels) panel.at = undefined;
    redraw();
  });
  makeLegend();
  panels.push(...problems.map(makePanel));
  redraw();
  let width = document.getElementById("panels").clientWidth;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return; // drawing changes heights alone
    width = entry.contentRect.width;
    requestAnimationFrame(redraw);
  }).observe(document.getElementById("panels"));
})();
