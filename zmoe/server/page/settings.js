// The settings of the chat: a dialog, kept in this browser.

import { $ } from "./dom.js";

const KEPT = "zmoe-settings";
const form = $("settings-form");
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const fields = ["system", ...NUMBERS].map((name) => form.elements[name]);

/** What the fields of a request are set to: {} where all is left to the server. */
export function settings() {
  const given = NUMBERS.map((name) => [name, form.elements[name].value]);
  return Object.fromEntries(
    given.filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]),
  );
}

export function systemPrompt() {
  return form.elements.system.value.trim();
}

function isFine() {
  const wrong = fields.find((field) => !field.checkValidity());
  for (const field of fields) field.setAttribute("aria-invalid", String(field === wrong));
  const label = wrong && form.querySelector(`label[for="${wrong.id}"]`).textContent;
  $("settings-problem").textContent = wrong ? `${label}: ${wrong.validationMessage}` : "";
  wrong?.focus();
  return !wrong;
}

function keep() {
  const values = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  localStorage.setItem(KEPT, JSON.stringify(values));
}

export function begin() {
  const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  for (const field of fields) field.value = kept[field.name] ?? "";
  form.elements.seed.max = String(Number.MAX_SAFE_INTEGER);
  $("open-settings").addEventListener("click", () => $("settings").showModal());
  $("settings").addEventListener("cancel", (event) => {
    if (isFine()) keep();
    else event.preventDefault();
  });
  $("reset").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    isFine();
    fields[0].focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isFine()) return;
    keep();
    $("settings").close();
  });
}
