// A client that gives up sooner than the picture is there, and asks again: as the SDK does itself.
import { client, attempts, say, seen } from "./client.mjs";

const openai = client({ timeout: Number(process.env.TIMEOUT_MS), maxRetries: 8 });
const asked = { model: process.env.MODEL, prompt: "A lighthouse", quality: "low" };
try {
  const { data, response } = await openai.images
    .generate({ ...asked, size: "1024x1024" }, { headers: { "cache-control": "no-cache" } })
    .withResponse();
  say({
    b64: data.data[0].b64_json,
    cache: response.headers.get("x-cache"),
    attempts: attempts.length,
  });
} catch (error) {
  say(seen(error));
}
