// One call that is refused: what the SDK makes of it, and how often it tried.
import { client, say, seen } from "./client.mjs";

try {
  await client(JSON.parse(process.env.OPTIONS)).images.generate(JSON.parse(process.env.ORDER));
  say(null);
} catch (error) {
  say(seen(error));
}
