// The SDK in a page of another origin: a fetch that does what a browser does before and after.
// https://fetch.spec.whatwg.org/#cors-preflight-fetch
import { OpenAI, say, seen } from "./client.mjs";

const page = process.env.ORIGIN;
const SAFE = new Set(["accept", "accept-language", "content-language"]);
const READABLE = new Set(["cache-control", "content-language", "content-length", "content-type",
  "expires", "last-modified", "pragma"]);
const preflights = [];

// What the SDK takes for a browser.
globalThis.window = { document: {} };
globalThis.document = globalThis.window.document;

async function browserFetch(url, init) {
  const request = new Request(url, init);
  const names = [...request.headers.keys()].filter((name) => !SAFE.has(name)).sort();
  const asked = await fetch(url, {
    method: "OPTIONS",
    headers: {
      origin: page,
      "access-control-request-method": request.method,
      "access-control-request-headers": names.join(","),
    },
  });
  const said = (name) => (asked.headers.get(name) ?? "").toLowerCase();
  const listed = (name) => said(name).split(",").map((one) => one.trim());
  preflights.push({ status: asked.status, names, maxAge: said("access-control-max-age") });
  const origins = ["*", page];
  if (!asked.ok || !origins.includes(said("access-control-allow-origin")))
    throw new TypeError("Failed to fetch: the preflight was refused");
  if (!listed("access-control-allow-methods").includes(request.method.toLowerCase()))
    throw new TypeError("Failed to fetch: the method is not allowed");
  const allowed = listed("access-control-allow-headers");
  const foreign = names.filter((name) => !allowed.includes(name));
  if (foreign.length) throw new TypeError(`Failed to fetch: ${foreign} not allowed`);
  const headers = new Headers(request.headers);
  headers.set("origin", page);
  const answer = await fetch(new Request(request, { headers }));
  if (!origins.includes(answer.headers.get("access-control-allow-origin")))
    throw new TypeError("Failed to fetch: the answer is not for this page");
  const exposed = (answer.headers.get("access-control-expose-headers") ?? "").split(",");
  const readable = new Set([...READABLE, ...exposed.map((one) => one.trim().toLowerCase())]);
  const kept = [...answer.headers].filter(([name]) => readable.has(name));
  return new Response(answer.body, { status: answer.status, headers: kept });
}

const options = { dangerouslyAllowBrowser: true, maxRetries: 0, fetch: browserFetch };
const told = { preflights };
try {
  const openai = new OpenAI(options);
  const order = { model: process.env.MODEL, prompt: "A lighthouse", quality: "low" };
  const { data, response } = await openai.images.generate(order).withResponse();
  told.b64 = data.data[0].b64_json.length;
  told.requestId = data._request_id;
  told.headers = Object.fromEntries(response.headers);
  told.events = [];
  const another = { ...order, prompt: "A harbour", stream: true, partial_images: 1 };
  for await (const event of await openai.images.generate(another))
    told.events.push(event.type);
  try {
    await new OpenAI({ ...options, apiKey: "another-key-0123456789" }).images.generate(order);
  } catch (error) {
    told.refusal = seen(error);
  }
} catch (error) {
  told.failed = `${error.message} ${error.cause?.message ?? ""}`;
}
say(told);
