"""Calls the device API from inside a Space's pod as the `spaces` client does, and measures what a call waits for.

    python -c "$(cat device_api.py grant_load.py)" < plan.json

A plan:

    {"phase": "grant",        "grant": each token is a caller of its own, all at once
                              "handover": all slots are taken, one more waits, one of the first is released
     "address": ["127.0.0.1", 7999],
     "tokens": [...],         one an account
     "declared_s": 5,         what each call declares
     "pause_s": 0.04,         between two calls of one caller
     "warm_up": 20,           calls of each caller that are not measured
     "samples": 220,          calls of each caller that are
     "limit_s": 60}           no call is begun after that; what was measured until then is the result

"grant" measures from before the connection is opened until the whole 200 answer has come, of calls that found a free slot
and no worker of their own. "handover" measures from before the connection of `/release` is opened until the `succeeded`
event of the call that waited has come. Both include what the client does not measure: opening the connection.
"""


def call_once(plan: dict, account: int, life: tuple[int, int], is_first: bool) -> tuple[float | None, str]:
    """One whole call. The milliseconds until its grant, or none if it waited or found a worker, which `why` says."""
    address, token = tuple(plan["address"]), plan["tokens"][account]
    call = first(address, token, plan["declared_s"]) if is_first else Scheduled(address, token, plan["declared_s"])
    why = granted(call)
    lease = Lease(address, call.grant, account, life)
    lease.finish(lease.release())
    return (None if why else call.milliseconds), why


def caller(plan: dict, account: int, end: float) -> dict:
    """One caller of the phase "grant": call after call, until there are enough samples."""
    life = os.pipe()
    result = {"milliseconds": [], "granted": 0, "queued": 0, "reused": 0, "begin": 0.0, "end": 0.0}
    wanted = plan["samples"]
    # Twice as many calls as samples: then most found no free slot, and the numbers would say nothing.
    for number in range(plan["warm_up"] + 2 * wanted):
        if len(result["milliseconds"]) >= wanted or time.monotonic() >= end:
            break
        measured = number >= plan["warm_up"]
        if measured and not result["begin"]:
            result["begin"] = time.monotonic()
        milliseconds, why = call_once(plan, account, life, is_first=number == 0)
        result["granted"] += 1
        if why:
            result[why] += 1
        elif measured:
            result["milliseconds"].append(milliseconds)
        result["end"] = time.monotonic()
        time.sleep(plan["pause_s"])
    return result


def grant(plan: dict, end: float) -> dict:
    """All callers at once."""
    results = in_processes(len(plan["tokens"]), lambda account: caller(plan, account, end))
    measured = [result for result in results if result["begin"]]
    begin = min((result["begin"] for result in measured), default=0.0)
    last = max((result["end"] for result in measured), default=0.0)
    return {
        "milliseconds": [sample for result in results for sample in result["milliseconds"]],
        "granted": [result["granted"] for result in results],
        "queued": sum(result["queued"] for result in results),
        "reused": sum(result["reused"] for result in results),
        "seconds": last - begin,
        "slots": 0,
    }


def handover(plan: dict, end: float) -> dict:
    """Takes every slot; then, again and again: one call waits, the oldest lease is released, the call that waited has it."""
    address, tokens, declared_s = tuple(plan["address"]), plan["tokens"], plan["declared_s"]
    life = os.pipe()
    granted = [0] * len(tokens)
    held: list[Lease] = []
    samples: list[float] = []
    account = 0
    try:
        waiting = first(address, tokens[account], declared_s)
        while waiting.grant:
            if len(held) == SLOTS_MAX:
                raise Failed(f"{SLOTS_MAX} leases were granted and slots are still free")
            granted[account] += 1
            held.append(Lease(address, waiting.grant, account, life))
            account = (account + 1) % len(tokens)
            waiting = first(address, tokens[account], declared_s)
        slots = len(held)
        # Each round begins with one call that waits and ends with its grant.
        rounds = plan["warm_up"] + plan["samples"]
        for number in range(rounds):
            if waiting.reason != "node":
                raise Failed(f"a call waits for {waiting.reason}, not for a slot")
            # What came before (the settlement of the last lease, its receipt) shall be over.
            time.sleep(plan["pause_s"])
            oldest = held.pop(0)
            begin = time.perf_counter_ns()
            release = oldest.release()
            came = waiting.wait()
            if number >= plan["warm_up"]:
                samples.append((came - begin) * MS)
            granted[account] += 1
            held.append(Lease(address, waiting.grant, account, life))
            oldest.finish(release)
            if time.monotonic() >= end or number + 1 == rounds:
                break
            # Not the account whose lease is released next: its settlement would be in the way of the hold.
            account = (account + 1) % len(tokens)
            if account == held[0].account:
                account = (account + 1) % len(tokens)
            waiting = Scheduled(address, tokens[account], declared_s)
            if waiting.refusal:
                raise Failed(waiting.refusal)
            if waiting.grant:
                raise Failed("a slot was free although all were taken")
    except (Failed, OSError):
        for lease in held:
            abandon(lease)
        raise
    for lease in held:
        lease.finish(lease.release())
    return {"milliseconds": samples, "granted": granted, "queued": len(samples), "reused": 0, "seconds": 0.0, "slots": slots}


def main() -> int:
    plan = json.load(sys.stdin)
    end = time.monotonic() + plan["limit_s"]
    work = {"grant": grant, "handover": handover}[plan["phase"]]
    print(json.dumps(attempt(lambda: work(plan, end))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
