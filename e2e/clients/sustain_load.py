"""Keeps every slot busy for a while with calls of many accounts in turn, and counts whole cycles.

    python -c "$(cat device_api.py sustain_load.py)" < plan.json

A plan:

    {"address": ["127.0.0.1", 7999],
     "tokens": [...],         one an account; each belongs to one caller, which takes its own in turn
     "callers": 48,           calls at once
     "declared_s": 5,         what each call declares
     "warm_up_s": 3,          cycles before that are not counted
     "seconds": 30}           cycles that end within this time after it are

A cycle is a whole call: `/schedule` with its wait in the queue, a forked worker that calls `/allow` and opens the card,
`/release`, the end of the worker. The first call of each caller, before anything is counted, works half a second: a ledger that
charges nothing for it is seen. The result tells of each account which leases it was given and between which two numbers
of milliseconds they ran, so that somebody else can compare that with what was charged.
"""

WORK_S = 0.5


def caller(plan: dict, number: int, begin: float) -> dict:
    """One caller: its accounts in turn, until the time is over."""
    address, tokens, declared_s = tuple(plan["address"]), plan["tokens"], plan["declared_s"]
    own = range(number, len(tokens), plan["callers"])
    told = {account: Told() for account in own}
    life = os.pipe()
    measured_from = begin + plan["warm_up_s"]
    end = measured_from + plan["seconds"]
    result = {"cycles": 0, "queued": 0, "reused": 0, "longest_ms": 0.0}
    turn = 0
    while time.monotonic() < end:
        account = own[turn % len(own)]
        start = time.monotonic()
        if turn < len(own):
            call = first(address, tokens[account], declared_s)
        else:
            call = Scheduled(address, tokens[account], declared_s)
        why = granted(call)
        lease = Lease(address, call.grant, account, life)
        if turn == 0:
            time.sleep(WORK_S)
        lease.finish(lease.release())
        told[account].settled(lease, declared_s)
        if why:
            result[why] += 1
        now = time.monotonic()
        if measured_from <= now < end:
            result["cycles"] += 1
            result["longest_ms"] = max(result["longest_ms"], (now - start) * 1000)
        turn += 1
    result["accounts"] = {account: known.json() for account, known in told.items()}
    return result


def sustain(plan: dict) -> dict:
    begin = time.monotonic()
    results = in_processes(plan["callers"], lambda number: caller(plan, number, begin))
    # Names of JSON objects are strings.
    accounts = {int(account): known for result in results for account, known in result["accounts"].items()}
    return {
        "cycles": sum(result["cycles"] for result in results),
        "seconds": plan["seconds"],
        "queued": sum(result["queued"] for result in results),
        "reused": sum(result["reused"] for result in results),
        "longest_ms": max(result["longest_ms"] for result in results),
        "accounts": [accounts[account] for account in range(len(plan["tokens"]))],
    }


def main() -> int:
    plan = json.load(sys.stdin)
    print(json.dumps(attempt(lambda: sustain(plan))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
