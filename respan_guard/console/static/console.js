// Charts from the numbers in the page, the switch between light and dark, countdowns. Pages work without any of it.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const drawn = new Map();

  const money = (value) => {
    if (value === 0) return "$0";
    const size = Math.abs(value);
    const digits = size >= 100 ? 0 : size >= 0.1 ? 2 : Math.min(9, 2 - Math.floor(Math.log10(size)));
    return (value < 0 ? "-$" : "$") + size.toLocaleString("en-US", { minimumFractionDigits: size >= 100 ? 0 : 2, maximumFractionDigits: digits });
  };
  const count = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 });

  function draw(box) {
    const { unit, labels, series } = JSON.parse(box.dataset.chart);
    const show = unit === "usd" ? money : count;
    const places = labels.map((_, at) => at);
    // Bars are stacked by drawing sums from the highest to the lowest, each over the one before; what is below zero apart.
    const above = labels.map(() => 0);
    const below = labels.map(() => 0);
    const sums = series.map(([, values]) => values.map((value, at) => (value < 0 ? (below[at] += value) : (above[at] += value))));
    const bars = uPlot.paths.bars({ size: [0.72, 40], radius: [0.12, 0] });
    const others = series.length > 1;
    const order = series.map((_, row) => row).reverse();
    const text = color("--muted");
    const line = color("--border");
    const axis = { stroke: text, font: "12px system-ui, sans-serif", grid: { show: false }, ticks: { show: false } };
    const hourly = labels[0] && labels[0].includes(" ");
    const short = (label) => (hourly ? label.slice(11) : label.slice(5));
    const options = {
      width: Math.max(200, box.clientWidth),
      height: 230,
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
      legend: { live: true },
      scales: { x: { time: false, range: [-0.6, places.length - 0.4] }, y: { range: (_, low, high) => [Math.min(0, low * 1.06), high > 0 ? high * 1.06 : low < 0 ? 0 : 1] } },
      axes: [
        { ...axis, space: hourly ? 60 : 52, incrs: [1, 2, 3, 5, 7, 10, 14, 30, 60, 90], values: (_, at) => at.map((place) => (Number.isInteger(place) && labels[place] ? short(labels[place]) : "")) },
        { ...axis, size: 62, grid: { show: true, stroke: line, width: 1 }, values: (_, at) => at.map((value) => (unit === "count" && !Number.isInteger(value) ? "" : show(value))) },
      ],
      series: [
        { label: hourly ? "Hour" : "Day", value: (_, place) => (place == null ? "" : labels[place] || "") },
        ...order.map((row) => {
          const fill = color(series[row][0] === "all others" ? "--c7" : `--c${(row % 6) + 1}`);
          return { label: series[row][0], fill, stroke: fill, width: 0, points: { show: false }, paths: bars, value: (_, __, ___, at) => (at == null ? "" : show(series[row][1][at])) };
        }),
      ],
    };
    if (!others) options.series[1].label = series[0][0];
    drawn.get(box)?.destroy();
    box.textContent = "";
    const plot = new uPlot(options, [places, ...order.map((row) => sums[row])], box);
    plot.root.querySelectorAll(".u-series").forEach((entry, at, all) => {
      entry.style.order = at ? all.length - at : all.length;
      entry.title = entry.querySelector(".u-label").textContent; // a long name is cut
    });
    drawn.set(box, plot);
  }

  function redraw() {
    for (const box of [...drawn.keys()]) {
      if (box.isConnected) draw(box);
      else drawn.delete(box);
    }
  }

  function begin() {
    document.querySelectorAll("details.numbers:not(.ready)").forEach((numbers) => {
      numbers.open = false;
      numbers.classList.add("ready");
    });
    document.querySelectorAll("[data-chart]").forEach((box) => drawn.has(box) || draw(box));
    count_down();
  }

  function count_down() {
    // From what was left by the guard's clock: the browser's own may be wrong.
    document.querySelectorAll("[data-left]").forEach((time) => {
      time.until ??= performance.now() + Number(time.dataset.left);
      const left = Math.round((time.until - performance.now()) / 1000);
      const unit = (size, name) => `in ${Math.floor(left / size)} ${name}`;
      time.title = time.title || time.textContent;
      time.textContent = left <= 0 ? "now" : left < 120 ? `in ${left} s` : left < 7200 ? unit(60, "min") : left < 172800 ? unit(3600, "h") : unit(86400, "days");
    });
  }

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("respan-guard-theme", root.dataset.theme);
    } catch {
      // it holds until the page is left
    }
    redraw();
  });
  dark.addEventListener("change", redraw);
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  document.addEventListener("htmx:after:swap", begin);

  // What renews itself waits while a button is down on it: the link would be another one when it goes up, and the click lost.
  let pressed = null;
  addEventListener("pointerdown", (event) => (pressed = event.target), true);
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => setTimeout(() => (pressed = null)), true);
  document.addEventListener("htmx:before:swap", (event) => {
    const renewing = event.detail.ctx.sourceElement;
    if (renewing.matches('[hx-trigger^="every"]') && renewing.contains(pressed)) event.preventDefault();
  });

  // What gets no answer stays as it is and is asked again; a mark says so until the next answer.
  const told = (status) => {
    document.getElementById("session-over").hidden = status !== 401;
    document.getElementById("no-answer").hidden = status < 400 || status === 401;
  };
  document.getElementById("session-over").href = `signin?next=${encodeURIComponent(location.pathname.split("/").pop() + location.search)}`;
  document.addEventListener("htmx:after:request", (event) => told(event.detail.ctx.response.status));
  document.addEventListener("htmx:error", () => told(503));

  setInterval(count_down, 1000);
  begin();
})();
