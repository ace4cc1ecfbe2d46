// The events of a stream as they come, and how it ends.
import { client, say, seen } from "./client.mjs";

const events = [];
let ended = null;
try {
  const stream = await client().images.generate({
    model: process.env.MODEL,
    prompt: process.env.PROMPT,
    quality: "low",
    stream: true,
    partial_images: 2,
  });
  for await (const event of stream) {
    events.push({ type: event.type, b64: event.b64_json.slice(0, 8), usage: event.usage ?? null });
  }
} catch (error) {
  ended = seen(error);
}
say({ events, ended });
