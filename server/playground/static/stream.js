// Requests to the server: headers, errors in OpenAI's form, and streams of server-sent events.

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
  }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function checked(response) {
  if (response.ok) return response;
  throw new ApiError(response.status, await response.json().catch(() => null));
}

export async function getJson(path, key) {
  return (await checked(await fetch(path, { headers: headers(key) }))).json();
}

/** Yields the events of a streamed request as objects; an error event is thrown. */
export async function* streamed(path, body, { key, signal }) {
  const response = await checked(
    await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(response.status, event);
      yield event;
    }
  }
}
