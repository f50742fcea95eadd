"use strict";
// Everything from the data reaches the page as text: `make` sets textContent and attributes named here, nothing else.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = 10, PAGE = 5;
  const AXES = { step: "training step", tokens: "tokens generated in training", hours: "hours of training steps" };

  function fill(node, properties, children) {
    for (const [name, value] of Object.entries(properties || {})) {
      if (name === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children) if (child !== null) node.append(child);
    return node;
  }
  const make = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
  const shape = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);
  const option = (value, text) => make("option", { value }, text);
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  function short(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)} G`;
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)} k`;
    return Number.isInteger(value) ? String(value) : String(+value.toPrecision(3));
  }

  // ---- methods: the seeds of one method share a colour
  const methods = [...new Set(data.runs.map((run) => run.method))].map((name, index) => ({
    name, colour: `c${index % COLOURS}`, shown: true,
    runs: data.runs.flatMap((run, number) => (run.method === name ? [number] : [])),
  }));
  const longest = Math.max(0, ...data.axes.map((axis) => axis.step.length));
  const state = { axis: "step", smooth: longest > 60 ? 10 : 1 };

  // ---- curves
  function smoothed(values, width) {
    if (width <= 1) return values;
    let sum = 0;
    return values.map((value, i) => {
      sum += value;
      if (i >= width) sum -= values[i - width];
      return sum / Math.min(i + 1, width);
    });
  }

  // {mean: [[x, y, low, high]], single: [[[x, y]] per run]}: seeds are averaged step by step, over steps that all have
  function curve(panel, line, method) {
    const found = method.runs.filter((run) => line.runs[run]).map((run) => {
      const [positions, raw] = line.runs[run];
      const values = smoothed(raw, panel.exact ? 1 : state.smooth);
      const axis = data.axes[run];
      return positions.map((p, i) => [axis[state.axis][p], values[i], axis.step[p]]);
    });
    if (!found.length) return null;
    if (found.length === 1) return { mean: found[0].map(([x, y]) => [x, y, y, y]), single: [], seeds: 1 };
    const rest = found.slice(1).map((points) => new Map(points.map((point) => [point[2], point])));
    const mean = [];
    for (const point of found[0]) {
      const same = [point, ...rest.map((seed) => seed.get(point[2]))];
      if (same.includes(undefined)) continue;
      const ys = same.map((p) => p[1]);
      const average = (list) => list.reduce((a, b) => a + b, 0) / list.length;
      mean.push([average(same.map((p) => p[0])), average(ys), Math.min(...ys), Math.max(...ys)]);
    }
    return { mean, single: found, seeds: found.length };
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const out = [];
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) out.push(+t.toPrecision(10));
    return out;
  }

  function extent(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    return [low, high];
  }

  const path = (points, x, y) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");

  function chart(panel, holder) {
    const visible = methods.filter((method) => method.shown);
    const curves = visible.flatMap((method) => panel.lines.map((line) => ({ method, line, ...curve(panel, line, method) })))
      .filter((entry) => entry.mean && entry.mean.length);
    holder.replaceChildren();
    if (!curves.length) { holder.append(make("p", { class: "soft" }, "Nothing logged for the methods shown.")); return; }
    const width = Math.max(260, holder.clientWidth), height = 250;
    const named = visible.length > 1 && visible.length <= 8 && width >= 420;
    const longestName = Math.max(...visible.map((method) => method.name.length));
    const right = named ? Math.min(160, longestName * 7.4 + 14) : 14;
    const box = { left: 46, right: width - right, top: 10, bottom: height - 34 };
    const [firstX, lastX] = extent([0, ...curves.flatMap((c) => [c.mean[0][0], c.mean[c.mean.length - 1][0]])]);
    let [low, high] = extent(curves.flatMap((c) => c.mean.flatMap((p) => [p[2], p[3]])));
    if (panel.share) { low = Math.min(0, low); high = Math.max(1, high); }
    else { low = Math.min(0, low); high = high > low ? high + (high - low) * 0.05 : low + 1; }
    const x = (value) => box.left + ((value - firstX) / (lastX - firstX || 1)) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);

    const lasts = curves.map((c) => `${c.method.name} ${c.line.label} ${short(c.mean[c.mean.length - 1][1])}`);
    const svg = shape("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0,
      "aria-label": `${panel.title}, line chart over ${AXES[state.axis]}. Last values: ${lasts.join("; ")}. Arrow keys move along.`,
    });
    for (const t of ticks(low, high, 5)) {
      svg.append(shape("line", { class: "gridline", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }));
      svg.append(shape("text", { x: box.left - 6, y: y(t) + 4, "text-anchor": "end" }, short(t)));
    }
    for (const t of ticks(firstX, lastX, Math.max(2, Math.floor((box.right - box.left) / 55)))) {
      svg.append(shape("text", { x: x(t), y: box.bottom + 15, "text-anchor": "middle" }, short(t)));
    }
    svg.append(shape("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, AXES[state.axis]));
    for (const c of curves) {
      const { colour } = c.method;
      if (c.seeds > 1) {
        const back = [...c.mean].reverse().map((p) => [p[0], p[2]]);
        const outline = path([...c.mean.map((p) => [p[0], p[3]]), ...back], x, y);
        svg.append(shape("path", { class: `band ${colour}`, d: `${outline}Z` }));
        if (c.line.dash === "solid") for (const seed of c.single) {
          svg.append(shape("path", { class: `line thin ${colour}`, d: path(seed, x, y) }));
        }
      }
      if (c.mean.length <= 40 && c.line.dash === "solid") for (const p of c.mean) {
        svg.append(shape("circle", { class: `dot ${colour}`, cx: x(p[0]), cy: y(p[1]), r: 2.5 }));
      }
      svg.append(shape("path", { class: `line ${c.line.dash} ${colour}`, d: path(c.mean, x, y) }));
    }
    if (named) {
      const ends = curves.filter((c) => c.line === panel.lines.find((line) => curves.some((o) => o.method === c.method && o.line === line)))
        .map((c) => ({ c, at: y(c.mean[c.mean.length - 1][1]) })).sort((a, b) => a.at - b.at);
      ends.forEach((end, i) => { if (i) end.at = Math.max(end.at, ends[i - 1].at + 12); });
      const over = ends.length ? ends[ends.length - 1].at - box.bottom : 0;
      if (over > 0) {
        ends[ends.length - 1].at = box.bottom;
        for (let i = ends.length - 2; i >= 0; i--) ends[i].at = Math.min(ends[i].at, ends[i + 1].at - 12);
      }
      for (const { c, at } of ends) {
        const name = c.method.name.length > 19 ? `${c.method.name.slice(0, 18)}…` : c.method.name;
        svg.append(shape("text", { class: `end ${c.method.colour}`, x: box.right + 6, y: at + 4 }, name));
      }
    }

    // reading values: pointer or arrow keys
    const cross = shape("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
    const tip = make("div", { class: "tip", hidden: true, role: "status" });
    svg.append(cross);
    const xs = [...new Set(curves.flatMap((c) => c.mean.map((p) => p[0])))].sort((a, b) => a - b);
    let place = -1;
    const nearest = (points, value) => points.reduce((a, b) => (Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a));
    function show(index) {
      place = Math.max(0, Math.min(xs.length - 1, index));
      const value = xs[place];
      for (const end of ["x1", "x2"]) cross.setAttribute(end, x(value));
      cross.setAttribute("visibility", "visible");
      const rows = curves.map((c) => {
        const point = nearest(c.mean, value);
        const range = c.seeds > 1 ? ` (${short(point[2])}–${short(point[3])})` : "";
        const style = shape("svg", { viewBox: "0 0 22 6", width: 22, height: 6, "aria-hidden": "true" },
          shape("line", { class: `line ${c.line.dash} ${c.method.colour}`, x1: 1, x2: 21, y1: 3, y2: 3 }));
        style.style.width = "22px";
        style.style.flex = "none";
        return make("div", {}, style, `${c.method.name}${panel.lines.length > 1 ? `, ${c.line.label}` : ""}`, make("b", {}, short(point[1]) + range));
      });
      tip.replaceChildren(make("div", { class: "soft" }, `${AXES[state.axis]} ${short(value)}`), ...rows);
      tip.hidden = false;
      const scale = svg.clientWidth / width, at = x(value) * scale;
      const leftSide = at > holder.clientWidth / 2;
      const room = leftSide ? at - tip.offsetWidth - 10 : at + 10;
      tip.style.left = `${Math.max(0, Math.min(room, holder.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${holder.offsetTop + svg.clientHeight}px`; // below: the lines stay in sight
    }
    function hide() { tip.hidden = true; cross.setAttribute("visibility", "hidden"); }
    svg.addEventListener("pointermove", (event) => {
      const area = svg.getBoundingClientRect();
      const px = ((event.clientX - area.left) / area.width) * width;
      const value = firstX + ((px - box.left) / (box.right - box.left)) * (lastX - firstX);
      let below = 0, above = xs.length - 1;
      while (above - below > 1) { const half = (below + above) >> 1; if (xs[half] <= value) below = half; else above = half; }
      show(Math.abs(xs[below] - value) <= Math.abs(xs[above] - value) ? below : above);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (move) { event.preventDefault(); show(place < 0 ? (move > 0 ? 0 : xs.length - 1) : place + move); }
    });
    holder.append(svg, tip);
  }

  const holders = [];
  function redraw() { for (const [panel, holder] of holders) chart(panel, holder); }

  function curvesSection() {
    if (!data.panels.length) return [make("h2", {}, "Curves"), make("p", {}, "Nothing logged yet.")];
    const axis = make("select", { on: { change: () => { state.axis = axis.value; redraw(); } } },
      ...Object.entries(AXES).map(([value, text]) => option(value, text)));
    const smooth = make("select", { on: { change: () => { state.smooth = +smooth.value; redraw(); } } },
      ...[1, 5, 10, 25, 50].map((k) => option(k, k === 1 ? "off" : `${k} points`)));
    smooth.value = String(state.smooth);
    const legend = make("div", { class: "bar legend", role: "group", "aria-label": "Methods shown" },
      ...methods.map((method) => {
        const text = method.runs.length > 1 ? `${method.name} (${method.runs.length} seeds)` : method.name;
        const button = make("button", { type: "button", "aria-pressed": "true", on: { click: () => {
          method.shown = !method.shown;
          button.setAttribute("aria-pressed", method.shown);
          redraw();
        } } }, make("span", { class: `swatch ${method.colour}` }), text);
        return button;
      }));
    const grid = make("div", { class: "grid" });
    for (const panel of data.panels) {
      const keys = panel.lines.length > 1 ? panel.lines.map((line) => make("span", {},
        shape("svg", { viewBox: "0 0 26 6", width: 26, height: 6, "aria-hidden": "true" },
          shape("line", { class: `line key ${line.dash}`, x1: 1, x2: 25, y1: 3, y2: 3 })), line.label)) : [];
      for (const key of keys) key.firstChild.style.width = "26px";
      const holder = make("div", {});
      holders.push([panel, holder]);
      grid.append(make("figure", {}, make("figcaption", {}, panel.title), make("div", { class: "keys" }, ...keys), holder));
    }
    const seeds = methods.some((method) => method.runs.length > 1);
    const notes = ["The running mean applies to training curves, not to held-out accuracy."];
    if (seeds) notes.push("With several seeds: thick, the mean over the steps that all of them logged; band, minimum to maximum; thin, each seed.");
    if (longest >= data.points) notes.push(`Runs with more than ${data.points} logged steps are shown at every k-th of them.`);
    return [make("h2", {}, "Curves"),
      make("div", { class: "bar" }, make("label", {}, "x axis", axis), make("label", {}, "running mean", smooth)),
      legend, grid, make("p", { class: "soft" }, notes.join(" "))];
  }

  // ---- tables
  const COLUMNS = [["first", "first"], ["last", "last"], ["best", "best"], ["area", "area"], ["steps", "steps"],
    ["updates", "updates"], ["generated_tokens", "generated tokens"], ["hours", "hours"]];
  const ACCURACIES = new Set(["first", "last", "best", "area"]);

  const cell = (key, value) => (ACCURACIES.has(key) ? value.toFixed(2) : short(value));

  function resultsSection() {
    const number = (text) => make("td", { class: "number" }, text);
    const body = make("tbody", {});
    for (const entry of data.methods) {
      const members = data.results.filter((r) => r.method === entry.method && r.source === entry.source);
      for (const r of members) body.append(make("tr", {}, make("td", {}, r.run), make("td", {}, r.source),
        ...COLUMNS.map(([key]) => number(key === "best" ? `${cell(key, r.best)} at ${r.best_step}` : cell(key, r[key])))));
      if (members.length > 1) body.append(make("tr", { class: "mean" }, make("td", {}, `${entry.method}, mean of ${members.length} (range)`),
        make("td", {}, entry.source), ...COLUMNS.map(([key]) => {
          const m = entry[key];
          return number(m === null ? "–" : m.min === m.max ? cell(key, m.mean) : `${cell(key, m.mean)} (${cell(key, m.min)}–${cell(key, m.max)})`);
        })));
    }
    const head = ["run", "problems", ...COLUMNS.map(([, title]) => title)];
    return [make("h2", {}, "Held-out accuracy and cost"),
      make("p", { class: "soft" }, "area: mean accuracy over the run's steps. Generated tokens: by the policy in training, prefixes not counted. Hours: training steps, validation not counted."),
      data.results.length ? make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Results table" }, make("table", {},
        make("thead", {}, make("tr", {}, ...head.map((title, i) => make("th", { scope: "col", class: i > 1 ? "number" : null }, title)))), body))
        : make("p", {}, "No validation logged yet.")];
  }

  function differencesSection() {
    const title = make("h2", {}, "Configuration differences");
    if (data.configs < 2) return [title, make("p", {}, `${plural(data.configs, "run")} with a configuration (hydra/.hydra/config.yaml): nothing to compare.`)];
    if (!data.differences.length) return [title, make("p", {}, "None.")];
    const head = make("tr", {}, make("th", { scope: "col" }, "key"), ...data.runs.map((run) => make("th", { scope: "col" }, run.name)));
    const rows = data.differences.map((entry) => make("tr", {}, make("th", { scope: "row" }, entry.key),
      ...entry.values.map((value) => make("td", { class: "value" }, value === null ? "no configuration" : value))));
    return [title, make("p", { class: "soft" }, `${plural(data.differences.length, "key")} with different values. Values of keys that sound secret are redacted, RUN is the run's own folder.`),
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Configuration differences" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)))];
  }

  // ---- rollouts
  const [RUN, STEP, ROW, PROMPT, TRUTH, ROLLOUTS] = [0, 1, 2, 3, 4, 5];
  const [SESSION, ROLE, SCORE, PREFIX_LEN, DEMO_LEN, RATIO, LIMIT, TRAINED, PREFIX, REST] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
  const SHADES = 4;
  const ROLES = { on_policy: "on-policy" };

  function rolloutsSection() {
    const title = make("h2", {}, "Rollouts");
    const shaded = data.groups.some((g) => g[ROLLOUTS].some((r) => typeof r[REST] !== "string"));
    if (!data.groups.length) return [title, make("p", {}, data.sample)];
    const filter = { run: "", step: "", text: "", prompt: null, role: "", low: "", high: "", page: 0 };
    const list = make("div", {}), count = make("span", { class: "soft", role: "status" });
    const back = make("button", { type: "button", on: { click: () => turn(-1) } }, "← Previous");
    const forth = make("button", { type: "button", on: { click: () => turn(1) } }, "Next →");
    const set = (key) => (event) => { filter[key] = event.target.value; filter.page = 0; show(); };
    const run = make("select", { on: { change: (event) => { filter.run = event.target.value; filter.page = 0; listSteps(); show(); } } },
      option("", "all"), ...data.runs.map((r, i) => option(i, r.name)));
    const step = make("select", { on: { change: set("step") } });
    const roles = [...new Set(data.groups.flatMap((g) => g[ROLLOUTS].map((r) => r[ROLE])))].sort();
    const role = make("select", { on: { change: set("role") } }, option("", "all"), ...roles.map((r) => option(r, ROLES[r] || r)));
    const text = make("input", { type: "search", placeholder: "row number or text", on: { input: (event) => { filter.prompt = null; set("text")(event); } } });
    const bound = (key, placeholder) => make("input", { class: "score", type: "number", step: "any", placeholder, "aria-label": `score ${placeholder}`, on: { input: set(key) } });
    const low = bound("low", "min"), high = bound("high", "max");

    function listSteps() {
      const steps = [...new Set(data.groups.filter((g) => filter.run === "" || g[RUN] === +filter.run).map((g) => g[STEP]))].sort((a, b) => a - b);
      step.replaceChildren(option("", "all"), ...steps.map((s) => option(s, String(s))));
      if (!steps.includes(+filter.step)) filter.step = "";
      step.value = filter.step;
    }
    const fits = (rollout) => (filter.role === "" || rollout[ROLE] === filter.role)
      && (filter.low === "" || (rollout[SCORE] !== null && rollout[SCORE] >= +filter.low))
      && (filter.high === "" || (rollout[SCORE] !== null && rollout[SCORE] <= +filter.high));
    const asked = (group) => filter.text === "" || group[ROW] === filter.text || data.prompts[group[PROMPT]].includes(filter.text);
    function turn(by) { filter.page += by; show(); title.scrollIntoView(); }

    function show() {
      const found = data.groups.filter((g) => (filter.run === "" || g[RUN] === +filter.run) && (filter.step === "" || g[STEP] === +filter.step)
        && (filter.prompt === null ? asked(g) : g[PROMPT] === filter.prompt) && g[ROLLOUTS].some(fits));
      const pages = Math.max(1, Math.ceil(found.length / PAGE));
      filter.page = Math.max(0, Math.min(filter.page, pages - 1));
      count.textContent = `${plural(found.length, "group")}, page ${filter.page + 1} of ${pages}`;
      back.disabled = filter.page === 0;
      forth.disabled = filter.page === pages - 1;
      list.replaceChildren(...found.slice(filter.page * PAGE, (filter.page + 1) * PAGE).map(card));
    }

    function card(group) {
      const scores = group[ROLLOUTS].map((r) => r[SCORE]).filter((s) => s !== null);
      const mean = scores.length ? scores.reduce((a, b) => a + b, 0) / scores.length : null;
      const [, most] = extent(group[ROLLOUTS].flatMap(advantages).map(Math.abs));
      const follow = make("button", { type: "button", on: { click: () => {
        Object.assign(filter, { prompt: group[PROMPT], text: "", step: "", page: 0 });
        text.value = group[ROW] || "(this prompt)";
        step.value = "";
        show();
        title.scrollIntoView();
      } } }, "This prompt at all steps");
      return make("article", { class: "group" },
        make("h3", {}, `${data.runs[group[RUN]].name} · step ${group[STEP]}${group[ROW] === "" ? "" : ` · row ${group[ROW]}`} · mean score ${short(mean)}`),
        make("span", { class: "tag" }, "prompt"), make("pre", { dir: "ltr" }, data.prompts[group[PROMPT]]),
        make("div", { class: "bar" }, make("span", { class: "tag" }, `ground truth ${group[TRUTH]}`), follow),
        make("div", { class: "side" }, ...group[ROLLOUTS].map((r) => rollout(r, most))));
    }

    // A text, or [text, advantage, text, advantage, ...]. `most`: the largest advantage of the group, by size.
    function parts(value, most) {
      if (typeof value === "string") return value === "" ? [] : [value];
      const out = [];
      for (let i = 0; i < value.length; i += 2) {
        const [words, advantage] = [value[i], value[i + 1]];
        if (!advantage) { out.push(words); continue; }
        const strength = Math.max(1, Math.ceil((Math.abs(advantage) / most) * SHADES));
        const signed = `${advantage > 0 ? "+" : "−"}${short(Math.abs(advantage))}`;
        out.push(make("span", { class: `${advantage > 0 ? "up" : "down"} s${strength}`, title: `advantage ${signed}` }, words));
      }
      return out;
    }
    const advantages = (r) => [r[PREFIX], r[REST]].flatMap((value) => (typeof value === "string" ? [] : value.filter((_, i) => i % 2)));

    function rollout(r, most) {
      const tags = [[`#${short(r[SESSION])}`, ""], [`score ${short(r[SCORE])}`, "strong"], [ROLES[r[ROLE]] || r[ROLE], ""]];
      if (r[PREFIX_LEN]) tags.push([`prefix ${r[PREFIX_LEN]} of ${r[DEMO_LEN]} tokens (ratio ${short(r[RATIO])})`, ""]);
      if (r[LIMIT]) tags.push(["hit the length limit", ""]);
      if (!r[TRAINED]) tags.push(["not trained on", ""]);
      return make("section", { class: `rollout${fits(r) ? "" : " other"}`, "aria-label": `rollout ${r[SESSION]}` },
        ...tags.map(([words, more]) => make("span", { class: `tag ${more}` }, words)),
        make("pre", { dir: "ltr" }, r[PREFIX].length ? make("mark", { title: "prefix, from the demonstration" }, ...parts(r[PREFIX], most)) : null,
          ...parts(r[REST], most)));
    }

    listSteps();
    show();
    const pager = make("div", { class: "bar" }, back, forth, count);
    return [title,
      make("p", { class: "soft" }, `${data.sample} Whole groups, evenly over the run, the same prompts first at every step. Texts longer than ${data.shortened} characters are shortened in the middle; control and direction characters are spelled out. `,
        make("mark", {}, "Prefixes"), " are from the demonstration. ", ...(shaded ? ["Tokens that the update makes ",
          make("span", { class: "up s4" }, "more likely"), " and ", make("span", { class: "down s4" }, "less likely"),
          ", the darker, the larger their advantage within the group; without colour: advantage 0; an SFT term is not shown. "] : []), "Rollouts of a group that the filter does not ask for are faded."),
      make("div", { class: "bar" }, make("label", {}, "run", run), make("label", {}, "step", step), make("label", {}, "prompt", text),
        make("label", {}, "role", role), make("label", {}, "score", low, high)),
      pager, list];
  }

  const dropped = data.runs.map((run) => `${run.name}: ${run.rollouts}`);
  main.replaceChildren(make("header", {}, make("h1", {}, `${plural(data.runs.length, "run")}, ${plural(methods.length, "method")}`),
    make("details", { class: "soft" }, make("summary", {}, "Rollouts kept in this file"), ...dropped.map((line) => make("div", {}, line)))),
    ...curvesSection(), ...resultsSection(), ...differencesSection(), ...rolloutsSection());
  redraw();
  let width = window.innerWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 150);
  });
  // the second frame comes after the first has been painted
  requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); }));
})();
