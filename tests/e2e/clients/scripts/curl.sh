#!/usr/bin/env bash
# curl alone: a picture is one command. Needs nothing but curl, and Python's base64 and JSON.
set -uo pipefail

model=gpt-image-2.5-flare
key="authorization: Bearer $OPENAI_API_KEY"
json="content-type: application/json"
generations="$OPENAI_BASE_URL/images/generations"

order() { # prompt, more members of the object
  printf '{"model": "%s", "prompt": "%s", "size": "1024x1024", "quality": "low"%s}' \
    "$model" "$1" "${2:-}"
}

# What data[] of an answer holds, by name: pictures are written, urls are printed.
take() { # feature
  python3 -c '
import base64, json, os, sys
for number, one in enumerate(json.load(sys.stdin)["data"]):
    name = f"{sys.argv[1]}-{number}"
    if one.get("url"):
        print(name, one["url"])
    else:
        with open(os.path.join(os.environ["OUTPUTS"], name), "wb") as file:
            file.write(base64.b64decode(one["b64_json"]))
        print(name)
' "$1"
}

say() { # feature, what came
  local names=""
  for name in $2; do names+="${names:+, }\"$name\""; done
  if [ -n "$names" ]; then
    printf '{"feature": "%s", "ok": true, "pictures": [%s]}\n' "$1" "$names"
  else
    printf '{"feature": "%s", "ok": false, "detail": "no picture came"}\n' "$1"
  fi
}

say generate "$(curl -sS "$generations" -H "$key" -H "$json" \
  -d "$(order "generate: a lighthouse" ', "n": 2')" | take generate)"

say edit "$(curl -sS "$OPENAI_BASE_URL/images/edits" -H "$key" \
  -F model=$model -F "prompt=edit: both on one table" -F size=1024x1024 -F quality=low \
  -F "image[]=@$INPUTS/first.png" -F "image[]=@$INPUTS/second.png" -F "mask=@$INPUTS/mask.png" |
  take edit)"

# Events as they come; the last one holds the picture.
curl -sSN "$generations" -H "$key" -H "$json" \
  -d "$(order "stream: a lighthouse" ', "stream": true, "partial_images": 1')" |
  sed -n 's/^data: \({.*image_generation.completed.*\)$/{"data": [\1]}/p' >"$OUTPUTS/events"
say stream "$(take stream <"$OUTPUTS/events")"

read -r name url < <(curl -sS "$generations" -H "$key" -H "$json" \
  -d "$(order "url: a lighthouse" ', "response_format": "url"')" | take url)
curl -sSf -o "$OUTPUTS/$name" "$url" && say url "$name" || say url ""

# A picture is uploaded once, and named by its id.
files="$OPENAI_BASE_URL/files"
id=$(curl -sS "$files" -H "$key" -F purpose=vision -F "file=@$INPUTS/first.png" |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
say files "$(curl -sS "$OPENAI_BASE_URL/images/edits" -H "$key" -H "$json" \
  -d "$(order "files: at night" ', "images": [{"file_id": "'"$id"'"}]')" | take files)"
curl -sS -o /dev/null -X DELETE "$files/$id" -H "$key"

# The picture of a response is the result of its tool.
say responses "$(curl -sS "$OPENAI_BASE_URL/responses" -H "$key" -H "$json" -d '{
    "model": "'"$TEXT_MODEL"'", "input": "responses: draw a lighthouse",
    "tools": [{"type": "image_generation", "model": "'$model'", "quality": "low"}]}' |
  python3 -c '
import json, sys
made = [item for item in json.load(sys.stdin)["output"] if item["type"] == "image_generation_call"]
print(json.dumps({"data": [{"b64_json": item["result"]} for item in made]}))
' | take responses)"

status() { # key, more members
  curl -sS -o /dev/null -w '%{http_code}' "$generations" -H "authorization: Bearer $1" \
    -H "$json" -d "$(order "errors: a lighthouse" "${2:-}")"
}
printf '{"feature": "errors", "ok": true, "raised": {"unknown_key": "%s", "over_budget": "%s", "bad_parameter": "%s"}}\n' \
  "$(status sk-of-nobody-0123456789abcdef)" "$(status "$POOR_API_KEY")" \
  "$(status "$OPENAI_API_KEY" ', "n": 11')"

say retry "$(curl -sSf --retry 2 "$generations" -H "$key" -H "$json" \
  -d "$(order "retry: a lighthouse")" | take retry)"
