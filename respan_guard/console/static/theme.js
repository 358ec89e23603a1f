// Runs before the page is drawn: what was chosen last time, and that there are scripts at all.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  try {
    const chosen = localStorage.getItem("respan-guard-theme");
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  } catch {
    // storage is switched off: the system's choice it is
  }
})();
