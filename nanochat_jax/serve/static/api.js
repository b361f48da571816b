/** Talking to the server: the model, and answers as they are written. */

/** A request that failed; `message` is a sentence for the reader, `needsKey` marks a 401. */
export class RequestFailed extends Error {
  constructor(message, { needsKey = false } = {}) {
    super(message);
    this.needsKey = needsKey;
  }
}

const LEAVING = 300; // milliseconds
const BROKEN = "The answer was interrupted.";
const LOST = "The connection to the server was lost. Nothing you wrote is lost; try again later.";

/** The model that is served: {id, stage, step, context, limits, …}. Throws RequestFailed. */
export async function fetchModel(apiKey) {
  const response = await request("v1/models", { headers: headersFor(apiKey) });
  const model = (await jsonOf(response))?.data?.[0];
  if (!model) throw new RequestFailed("The server lists no model.");
  return model;
}

/**
 * Asks for an answer and yields the chunks of its stream, as OpenAI shapes them.
 * Throws RequestFailed, or an AbortError once `signal` was triggered.
 */
export async function* streamAnswer(body, { apiKey, signal }) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headersFor(apiKey), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new RequestFailed(`${BROKEN} ${sentence(chunk.error.message)}`);
    yield chunk;
  }
  throw new RequestFailed(`${BROKEN} The connection to the server was lost.`);
}

function headersFor(apiKey) {
  if (!apiKey) return {};
  // JavaScript wants the bytes of a header as characters.
  const bytes = String.fromCharCode(...new TextEncoder().encode(apiKey));
  return { Authorization: `Bearer ${bytes}` };
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    throw await brokenOff(error);
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function brokenOff(error) {
  if (error.name === "AbortError") return error;
  // The requests of a page that is being left break too: only a page that stays should report it.
  await new Promise((resolve) => setTimeout(resolve, LEAVING));
  return new RequestFailed(LOST);
}

async function failureOf(response) {
  const said = (await jsonOf(response))?.error?.message;
  switch (response.status) {
    case 401:
      return new RequestFailed("This server asks for an API key.", { needsKey: true });
    case 403:
      return new RequestFailed(`The server does not allow this. ${sentence(said)}`);
    case 429:
      return new RequestFailed(`The server is busy at the moment. ${laterThan(response)}`);
    case 503:
      return new RequestFailed(`The model is not ready at the moment. ${laterThan(response)}`);
    default:
      if (response.status >= 500) return new RequestFailed("Something went wrong in the server.");
      return new RequestFailed(`The server refused this request. ${sentence(said)}`);
  }
}

function laterThan(response) {
  const seconds = Math.ceil(Number(response.headers.get("Retry-After")));
  if (!(seconds > 0)) return "Please try again a little later.";
  return `Please try again in ${seconds === 1 ? "a second" : `${seconds} seconds`}.`;
}

async function jsonOf(response) {
  try {
    return await response.json();
  } catch {
    return null;
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new RequestFailed("The server sent something that this page does not understand.");
  }
}

/** A message of the server, which begins in lower case and has no full stop. */
function sentence(text) {
  if (typeof text !== "string" || text === "") return "";
  return `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
}

/** The data of the server-sent events of a response. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (waiting + value).split("\n");
      waiting = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    throw await brokenOff(error);
  } finally {
    reader.cancel().catch(() => {});
  }
}
