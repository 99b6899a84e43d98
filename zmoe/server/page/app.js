// The page: which view is seen, the key, and the two halves, chat and cluster.

import { hasKey, onKeyWanted, useKey } from "./api.js";
import * as chat from "./chat.js";
import * as cluster from "./cluster.js";
import { $ } from "./dom.js";
import * as settings from "./settings.js";

for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.view;
    for (const each of document.querySelectorAll(".views button")) {
      each.setAttribute("aria-pressed", String(each === button));
    }
  });
}

onKeyWanted(() => {
  const wasHidden = $("key-form").hidden;
  $("key-form").hidden = false;
  $("key-problem").textContent = hasKey() ? "The server does not know this key." : "";
  if (wasHidden) $("key").focus();
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
});

settings.begin();
chat.begin();
cluster.begin();
