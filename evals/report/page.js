/* What moves on the report's page: plots and their choices, sorting, one run's record, two runs' difference. */
"use strict";
(() => {
  const { plots, runs } = JSON.parse(document.getElementById("data").textContent);
  const element = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text; // never as HTML: runs wrote it
    if (kind) made.className = kind;
    return made;
  };

  // Plots take their ink from the page, so that they follow its light or dark ground.
  const themed = (layout, data) => {
    const named = data.filter((trace) => trace.showlegend !== false).length;
    const aside = named > 6 && innerWidth > 900; // there it scrolls, below it would eat the plot
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    return {
      ...layout,
      font: { family: "system-ui, sans-serif", size: 13, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 56, r: 16, t: 12, b: 48 },
      legend: aside ? { font: { size: 11 } } : { orientation: "h", yref: "container", y: 0, yanchor: "bottom" },
      annotations: (layout.annotations ?? []).map((note) => ({ bgcolor: style.getPropertyValue("--veil"), borderpad: 1, ...note })),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink },
      hoverlabel: { bgcolor: style.getPropertyValue("--raised").trim(), font: { color: ink } },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    };
  };
  const draw = (plot) => {
    const place = document.getElementById("plot-" + plot.name);
    const chosen = [...document.querySelectorAll(`select[data-plot="${CSS.escape(plot.name)}"]`)];
    const figure = plot.variants[chosen.map((select) => select.value).join(",")] ?? {
      data: [], layout: { annotations: [{ text: "nothing was recorded for this choice", showarrow: false }] },
    };
    // Plotly writes into what it is given; the next drawing needs it as it was.
    const { data, layout } = structuredClone(figure);
    place.style.height = layout.height ? layout.height + "px" : "";
    Plotly.react(place, data, themed(layout, data), { responsive: true, displaylogo: false });
    chosen.forEach((select) => { select.onchange = () => draw(plot); });
  };
  plots.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(draw));

  // A box over an axis of the parallel coordinates fades the trials that do not cross it.
  const parallel = document.getElementById("plot-parallel");
  if (parallel) {
    const fade = (kept) => Plotly.restyle(parallel, {
      opacity: parallel.data.map((_, position) => (!kept || kept.has(position) ? 1 : 0.08)),
    });
    parallel.on("plotly_selected", (event) => event && event.points.length && fade(new Set(event.points.map((point) => point.curveNumber))));
    parallel.on("plotly_deselect", () => fade(null));
  }

  const value = (row, position) => {
    const text = row.cells[position].dataset.value;
    return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  document.querySelectorAll("table.sortable th").forEach((heading) => {
    heading.firstElementChild.onclick = () => {
      const table = heading.closest("table"), position = heading.cellIndex;
      const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction);
      const rows = [...table.tBodies[0].rows].sort((one, other) => {
        const a = value(one, position), b = value(other, position);
        if (a === null || b === null) return (a === null) - (b === null); // empty cells stay below
        return direction === "ascending" ? compare(a, b) : compare(b, a);
      });
      table.tBodies[0].append(...rows);
    };
  });

  const written = (item) => (item === undefined ? "–" : typeof item === "string" ? item : JSON.stringify(item));
  const rowsOf = (headings, rows) => {
    const table = element("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    headings.forEach((text) => head.append(element("th", text)));
    rows.forEach((cells) => { const row = body.insertRow(); cells.forEach((text) => row.append(element("td", text))); });
    return table;
  };
  const chooser = (name, initial, show) => {
    const select = document.getElementById("choose-" + name);
    if (!select) return null;
    runs.forEach((run, position) => select.append(new Option(run.label, position)));
    select.value = Math.min(initial, runs.length - 1);
    select.onchange = show;
    return select;
  };

  const showRecord = () => {
    const parts = Object.entries(runs[shown.value].sections).filter(([name]) => name !== "outcome");
    document.getElementById("record").replaceChildren(...parts.flatMap(([name, values]) => {
      const details = element("details");
      details.open = name === "configuration";
      details.append(element("summary", name), rowsOf(["key", "value"], Object.entries(values).map(([key, item]) => [key, written(item)])));
      return [details];
    }));
  };
  const shown = chooser("shown", runs.length - 1, () => showRecord());
  if (shown) showRecord();

  const showDifference = () => {
    const [a, b] = [runs[one.value], runs[other.value]];
    const parts = Object.keys(a.sections).flatMap((name) => {
      const [left, right] = [a.sections[name], b.sections[name]];
      const keys = [...new Set([...Object.keys(left), ...Object.keys(right)])];
      const rows = keys.filter((key) => written(left[key]) !== written(right[key])).map((key) => [key, written(left[key]), written(right[key])]);
      return rows.length ? [element("h3", name), rowsOf(["", a.label, b.label], rows)] : [];
    });
    document.getElementById("differences").replaceChildren(...(parts.length ? parts : [element("p", "They do not differ.", "quiet")]));
  };
  const one = chooser("one", 0, () => showDifference());
  const other = chooser("other", runs.length - 1, () => showDifference());
  if (one) showDifference();
})();
