"""Calls one function of a Space with the unmodified gradio_client and prints one JSON object.

    call.py URL API_NAME [ARGUMENT ...]        the caller's token comes in SPACEPORT_TOKEN

{"result": ..., "seconds": ...} on success; {"error": {"type", "title", "message"}, "seconds": ...} when the app refused or
failed, with exit status 0 both times: what the answer should be is for the caller to say.
"""

import json
import os
import sys
import time

from gradio_client import Client


def main() -> int:
    url, api_name, *arguments = sys.argv[1:]
    token = os.environ.get("SPACEPORT_TOKEN")
    client = Client(url, headers={"x-ip-token": token} if token else None, verbose=False)
    start = time.monotonic()
    try:
        answer = {"result": client.predict(*arguments, api_name=f"/{api_name}")}
    except Exception as error:  # Whatever the client raises is the observation.
        answer = {
            "error": {
                "type": type(error).__name__,
                "title": getattr(error, "title", None),
                "message": str(error),
            }
        }
    answer["seconds"] = time.monotonic() - start
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
