// What to try first, by what a model was made for.

const SCHEMA = `CREATE TABLE singer (singer_id INT, name TEXT, country TEXT, age INT);
CREATE TABLE concert (concert_id INT, concert_name TEXT, year INT, singer_id INT);`;

const chat = [
  { title: "Why is the sky blue?", prompt: "Why is the sky blue? Answer in two short paragraphs." },
  { title: "A list", prompt: "List ten animals that live in the sea, one in each line." },
  { title: "Repeat a text", prompt: "Repeat this text and correct its mistakes: The quick brown fox jump over the lazy dog. Then it run away in to the forrest, were nobody could finds it." },
  { title: "Arithmetic", prompt: "A baker makes 12 trays of 8 rolls and sells 70 rolls. How many are left? Explain step by step." },
];
const sql = [
  { title: "Count by country", prompt: `${SCHEMA}\n\nHow many singers are there in each country?` },
  { title: "Join", prompt: `${SCHEMA}\n\nWhat are the names of the singers who sang in a concert in 2014?` },
];
const code = [{ title: "A function", prompt: 'def is_palindrome(text: str) -> bool:\n    """Whether the text reads the same backwards, letters alone."""\n' }];

export function examplesFor(model) {
  if (/sql/i.test(model)) return [...sql, ...chat];
  if (/code/i.test(model)) return [...code, ...chat];
  if (/math/i.test(model)) return [chat[3], ...chat.slice(0, 3)];
  return chat;
}

export const FILLED = {
  schema: {
    type: "object",
    properties: { name: { type: "string" }, legs: { type: "integer" }, habitat: { enum: ["land", "sea", "air"] } },
    required: ["name", "legs", "habitat"],
    additionalProperties: false,
  },
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "The weather of a city now",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      },
    },
  ],
};
