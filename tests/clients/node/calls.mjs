// Calls of the official Node SDK against the server whose base URL is the first argument; prints what came back as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const question = { model: "tiny", messages: [{ role: "user", content: "Hello" }], temperature: 0, max_tokens: 12 };

async function chat() {
  const { data, response } = await client.chat.completions.create(question).withResponse();
  return { text: data.choices[0].message.content, usage: data.usage, requestId: response.headers.get("x-request-id") };
}

async function chatChunks() {
  let text = "";
  let usage = null;
  const stream = await client.chat.completions.create({
    ...question, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

async function chatHelper() {
  const runner = client.chat.completions.stream(question);
  let text = "";
  runner.on("content", (delta) => { text += delta; });
  const final = await runner.finalChatCompletion();
  return { text, final: final.choices[0].message.content };
}

async function completion() {
  const answer = await client.completions.create({ model: "tiny", prompt: "Hello", max_tokens: 4, logprobs: 2 });
  return { reason: answer.choices[0].finish_reason, numTokens: answer.choices[0].logprobs.tokens.length };
}

async function responses() {
  const request = { model: "tiny", input: "Hello", temperature: 0, max_output_tokens: 12 };
  const whole = await client.responses.create(request);
  const runner = client.responses.stream(request);
  let text = "";
  runner.on("response.output_text.delta", (event) => { text += event.delta; });
  const final = await runner.finalResponse();
  return { text, whole: whole.output_text, final: final.output_text, status: final.status };
}

async function modelNames() {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  return names;
}

// The answer may hold one number only, so that a model that knows nothing can give it.
const parameters = {
  type: "object", properties: { n: { enum: [7] } }, required: ["n"], additionalProperties: false,
};

async function tools() {
  const calls = [];
  const count = { name: "count", parameters, parse: JSON.parse, function: ({ n }) => { calls.push(n); return "done"; } };
  const runner = client.chat.completions.runTools(
    { ...question, max_tokens: 100, tools: [{ type: "function", function: count }], tool_choice: "required" },
    { maxChatCompletions: 1 },
  );
  const answer = await runner.finalChatCompletion();
  await runner.done();
  return { calls, reason: answer.choices[0].finish_reason };
}

async function structured() {
  const format = { type: "json_schema", json_schema: { name: "count", schema: parameters, strict: true } };
  const answer = await client.chat.completions.parse({ ...question, max_tokens: 100, response_format: format });
  return answer.choices[0].message.content;
}

async function refusal() {
  try {
    await client.chat.completions.create({ ...question, temperature: -1 });
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  return null;
}

const found = {
  chat: await chat(),
  chatChunks: await chatChunks(),
  chatHelper: await chatHelper(),
  completion: await completion(),
  responses: await responses(),
  models: await modelNames(),
  tools: await tools(),
  structured: await structured(),
  refusal: await refusal(),
};
process.stdout.write(JSON.stringify(found));
