// From the form to the bodies of requests, and the same as code.

const STEP_OPTIONS = { include_draft: true, include_decoding_stats: true, continuous_usage_stats: true };

const parsed = (text, name) => {
  if (!text.trim()) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: this is not JSON (${error.message}).`);
  }
};

/** {path, body} of what the form asks for; throws an Error that says which field is wrong. */
export function requestOf(form) {
  const body = { model: form.model };
  if (form.mode === "complete") body.prompt = form.prompt;
  else body.messages = [...(form.system.trim() ? [{ role: "system", content: form.system }] : []), { role: "user", content: form.prompt }];
  body.temperature = form.temperature;
  body.max_tokens = form.maxTokens;
  if (form.seed !== null) body.seed = form.seed;
  if (form.blockLength !== null) body.block_length = form.blockLength;
  if (form.prediction.trim()) body.prediction = { type: "content", content: form.prediction };
  if (form.mode !== "complete") {
    const schema = parsed(form.schema, "JSON schema");
    if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
    const tools = parsed(form.tools, "Tools");
    if (tools) body.tools = tools;
  }
  return { path: form.mode === "complete" ? "/v1/completions" : "/v1/chat/completions", body };
}

/** The body with what the page needs to show how the answer converges. */
export function watched(path, body) {
  const logprobs = path.endsWith("chat/completions") ? { logprobs: true } : { logprobs: 0 };
  return { ...body, ...logprobs, stream: true, stream_options: STEP_OPTIONS };
}

const EXTENSIONS = ["block_length"];

export function asCode(language, { path, body }, origin, needsKey) {
  const streaming = { ...body, stream: true };
  const key = needsKey ? "YOUR_KEY" : "none";
  if (language === "curl") {
    const json = JSON.stringify(streaming, null, 2).replaceAll("'", "'\\''");
    const auth = needsKey ? ` \\\n  -H 'Authorization: Bearer ${key}'` : "";
    return `curl -N ${origin}${path} -H 'Content-Type: application/json'${auth} \\\n  -d '${json}'`;
  }
  const chat = path.endsWith("chat/completions");
  const known = Object.fromEntries(Object.entries(streaming).filter(([name]) => !EXTENSIONS.includes(name)));
  const own = Object.fromEntries(Object.entries(streaming).filter(([name]) => EXTENSIONS.includes(name)));
  if (language === "python") {
    const fields = Object.entries(known).map(([name, value]) => `    ${name}=${python(value)},\n`);
    if (Object.keys(own).length) fields.push(`    extra_body=${python(own)},\n`);
    const call = chat ? "chat.completions" : "completions";
    const piece = chat ? 'chunk.choices[0].delta.content or ""' : "chunk.choices[0].text";
    return `from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key="${key}")\n`
      + `for chunk in client.${call}.create(\n${fields.join("")}):\n    if chunk.choices:\n        print(${piece}, end="", flush=True)\n`;
  }
  const piece = chat ? 'chunk.choices[0]?.delta?.content ?? ""' : 'chunk.choices[0]?.text ?? ""';
  return `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${origin}/v1", apiKey: "${key}" });\n`
    + `const stream = await client.${chat ? "chat.completions" : "completions"}.create(${JSON.stringify(streaming, null, 2)});\n`
    + `for await (const chunk of stream) process.stdout.write(${piece});\n`;
}

function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item)}`).join(", ")}}`;
  return JSON.stringify(value);
}
