// The Vercel AI SDK against the server whose base URL is the first argument; prints what it did as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, Output, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const compatible = createOpenAICompatible({ name: "cllm", baseURL, apiKey: "none", includeUsage: true });
const structured = createOpenAICompatible({ name: "cllm", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });

const seen = [];
const tools = {
  weather: tool({
    description: "Weather of a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: ({ city }) => { seen.push(["weather", city]); return `${city}: 5 degrees`; },
  }),
  add: tool({
    description: "Sum of two numbers.",
    inputSchema: z.object({ a: z.number(), b: z.number() }),
    execute: ({ a, b }) => { seen.push(["add", a, b]); return a + b; },
  }),
};
const question = { system: "Be brief.", prompt: "How warm is it?", maxRetries: 0 };

async function whole(model) {
  seen.length = 0;
  const { text, steps, usage } = await generateText({ ...question, model, tools, stopWhen: stepCountIs(5) });
  return { calls: [...seen].sort(), text, steps: steps.length, outputTokens: usage.outputTokens };
}

async function streamed(model) {
  seen.length = 0;
  const result = streamText({ ...question, model, tools, stopWhen: stepCountIs(5) });
  let text = "";
  for await (const delta of result.textStream) text += delta;
  return { calls: [...seen].sort(), text };
}

async function typed(model) {
  const schema = z.object({ city: z.string(), degrees: z.number().int() });
  const { output } = await generateText({
    model, prompt: "Report.", output: Output.object({ schema }), maxOutputTokens: 200, temperature: 0, maxRetries: 0,
  });
  return output;
}

const found = {};
for (const [name, model] of [["compatible", compatible("tiny")], ["chat", openai.chat("tiny")], ["responses", openai("tiny")]]) {
  found[name] = { whole: await whole(model), streamed: await streamed(model) };
}
found.typed = { compatible: await typed(structured("tiny")), chat: await typed(openai.chat("tiny")), responses: await typed(openai("tiny")) };
process.stdout.write(JSON.stringify(found));
