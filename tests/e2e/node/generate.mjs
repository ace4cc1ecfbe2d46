// The same picture twice: bought, then from the cache.
import { client, say } from "./client.mjs";

const openai = client();
const answers = [];
for (let count = 0; count < 2; count++) {
  const { data, response } = await openai.images
    .generate({ model: process.env.MODEL, prompt: "A lighthouse", quality: "low" })
    .withResponse();
  answers.push({
    b64: data.data[0].b64_json,
    usage: data.usage,
    requestId: data._request_id,
    cache: response.headers.get("x-cache"),
    cost: response.headers.get("x-cost-usd"),
  });
}
say(answers);
