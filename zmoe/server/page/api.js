// Requests to the server that this page came from, with the API key if one is needed.

const KEY = "zmoe-key";
const listeners = [];

export class Refusal extends Error {}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Have `listener()` called when the server wants a key, or another one. */
export function onKeyWanted(listener) {
  listeners.push(listener);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** The response, if it is none of an error. Throws Refusal with the server's own words. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (hasKey()) headers.Authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) listeners.forEach((listener) => listener());
  throw new Refusal(await reasonOf(response));
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers with status ${response.status}.`;
  }
}

/** The data of the server-sent events of a response, one after the other. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data: "));
        if (lines.length > 0) yield lines.map((line) => line.slice(6)).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The connection to the server has broken.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
