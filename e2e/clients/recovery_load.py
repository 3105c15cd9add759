"""Asks for leases again and again, gives each back at once, and tells of every answer when it comes.

    python -c "$(cat device_api.py recovery_load.py)"

The first line of standard input is a plan:

    {"address": ["127.0.0.1", 7999],
     "tokens": [...],         one an account; each belongs to a caller of its own
     "declared_s": 5,         what each call declares
     "pause_s": 0.05,         between two calls of one caller
     "limit_s": 900}          no call is begun after that

Standard input stays open; when it ends, so does the program. Each answer is one line of standard output, with the times at
which it was asked for and at which it came, on the clock that all programs of the machine have:

    {"asked": 1800000000.123, "granted": 1800000000.135}
    {"asked": 1800000000.123, "refused": "/schedule was answered with 503"}
"""

import threading

# A call under way when the input ends may wait for a broker that never comes.
FAREWELL_S = 5.0


def caller(plan: dict, token: str, over: threading.Event, say) -> None:
    """One caller: call after call, whatever is answered."""
    address = tuple(plan["address"])
    end = time.monotonic() + plan["limit_s"]
    while not over.is_set() and time.monotonic() < end:
        asked = time.time()
        try:
            call = Scheduled(address, token, plan["declared_s"])
            if call.reader:
                call.wait()
            if call.grant:
                say({"asked": asked, "granted": time.time()})
                # No worker was let in, so it costs nothing.
                receive(send(address, "/release", {"allowToken": call.grant["allowToken"], "fail": "true"}))
            else:
                say({"asked": asked, "refused": call.refusal})
        except (Failed, OSError) as failure:
            # Its text names no token.
            say({"asked": asked, "refused": f"{type(failure).__name__}: {failure}"})
        over.wait(plan["pause_s"])


def main() -> int:
    plan = json.loads(sys.stdin.readline())
    over = threading.Event()
    one_line = threading.Lock()

    def say(answer: dict) -> None:
        with one_line:
            print(json.dumps(answer), flush=True)

    callers = [
        threading.Thread(target=caller, args=(plan, token, over, say), daemon=True) for token in plan["tokens"]
    ]
    for thread in callers:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in callers:
        thread.join(FAREWELL_S)
    return 0


if __name__ == "__main__":
    code = main()
    # The interpreter's own end would wait for whoever waits.
    os._exit(code)
