// What each prompt of a list becomes: the events of a stream, or an answer, and how it ends.
import { attempts, client, say, seen } from "./client.mjs";

const openai = client({ maxRetries: 2 });
const said = {};
for (const { prompt, stream, n } of JSON.parse(process.env.ORDERS)) {
  const events = [];
  let ended = null;
  attempts.length = 0;
  try {
    const order = { model: process.env.MODEL, prompt, n, size: "1024x1024", quality: "low" };
    if (stream) {
      for await (const event of await openai.images.generate({ ...order, stream: true })) {
        events.push(event);
      }
    } else {
      events.push(await openai.images.generate(order));
    }
  } catch (error) {
    ended = seen(error);
  }
  said[prompt] = { events, ended };
}
say(said);
