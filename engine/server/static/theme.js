/* Light or dark before anything is drawn; without a choice the style sheet follows the system. */
try {
  const theme = JSON.parse(localStorage.getItem("mlcbuild.settings") ?? "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  /* no storage, no choice */
}
