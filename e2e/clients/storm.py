"""A storm of mixed calls: sizes, failures, workers that die, visitors that leave, refusals.

    python -c "$(cat device_api.py storm.py)" < plan.json

A plan:

    {"address": ["127.0.0.1", 7999],
     "tokens": [...],         one an account
     "callers": 20,           at once; caller n calls as account n modulo the number of accounts that are not hungry
     "leases": 50,            leases in which each of them runs a worker, besides all that comes to nothing
     "hungry": 2,             the last accounts: one more caller each, which goes on until its quota is used up, and then
                              asks a few times more
     "foreign": "...",        a token that is good for another Space
     "illegal_s": 55,         more than any of the accounts may declare
     "seed": 1,               of what happens in which order; who meets whom is up to the machine
     "limit_s": 100}          no call is begun after that

The result tells of each account which leases it was given, what they may have cost, and how often what happened.
"""

# What every lease declares; the client's own unit is a whole second.
DECLARED_S = 1
WEIGHTS = {"": 1, "xlarge": 2}
XLARGE = 0.15
# Of a hundred leases, three functions fail and two workers die.
FAILS = 0.03
DIES = 0.02
# Before a lease: a visitor who leaves the queue, a call that declares too much, a token of another Space, a grant that is
# given back.
LEAVES = 0.05
ILLEGAL = 0.05
FOREIGN = 0.02
GIVES_BACK = 0.03
# How long a function works, seconds: short, so that there are many.
WORK_MAX_S = 0.03
HUNGRY_WORK_S = 0.15
# Part of the text of a refusal: its status and the word that the client reads.
QUOTA_EXCEEDED = "429 quota-exceeded"
# Calls of a hungry account after its first refusal; each must be refused, too.
REFUSALS = 5
# A quota that so many calls do not use up is not the one that the plan promises.
HUNGRY_CALLS_MAX = 60


class Caller:
    """One caller, and what it has seen."""

    def __init__(self, plan: dict, account: int, end: float) -> None:
        self.plan = plan
        self.address = tuple(plan["address"])
        self.account = account
        self.token = plan["tokens"][account]
        self.end = end
        self.life = os.pipe()
        self.told = Told()
        self.seen = {"leases": 0, "queued": 0, "left": 0, "given_back": 0, "failed": 0, "died": 0, "refused": {}}

    def ask(self, token: str, declared_s: int, size: str) -> Scheduled:
        return Scheduled(self.address, token, declared_s, size)

    def refused(self, call: Scheduled, status: int) -> None:
        """A call that must be refused with this status."""
        if call.status != status or not call.refusal:
            raise Failed(f"expected {status}, but {call.refusal or f'/schedule was answered with {call.status}'}")
        refused = self.seen["refused"]
        refused[str(status)] = refused.get(str(status), 0) + 1

    def leave(self, size: str) -> None:
        """A visitor who waits in the queue and closes the page."""
        call = self.ask(self.token, DECLARED_S, size)
        if call.reader:
            call.reader.connection.close()
            self.seen["left"] += 1
        else:
            granted(call)
            self.give_back(call)

    def give_back(self, call: Scheduled) -> None:
        """A grant that nobody uses: no worker is let in, so nothing is to be paid."""
        token = call.grant["allowToken"]
        status, _, body = receive(send(self.address, "/release", {"allowToken": token, "fail": "true"}))
        if not 200 <= status < 300:
            raise Failed(f"/release was answered with {status} {body[:200].decode(errors='replace')}")
        self.told.free(token)
        self.seen["given_back"] += 1

    def nothing_comes_of_it(self, chance: random.Random, size: str) -> None:
        """What happens between leases."""
        what = chance.random()
        if what < LEAVES:
            self.leave(size)
        elif (what := what - LEAVES) < ILLEGAL:
            self.refused(self.ask(self.token, self.plan["illegal_s"], ""), 429)
        elif (what := what - ILLEGAL) < FOREIGN:
            self.refused(self.ask(self.plan["foreign"], DECLARED_S, ""), 401)
        elif what - FOREIGN < GIVES_BACK:
            call = self.ask(self.token, DECLARED_S, size)
            granted(call)
            self.give_back(call)

    def lease(self, call: Scheduled, size: str, work_s: float, ending: float) -> None:
        """One lease with a worker; `ending` between 0 and 1 chooses how it ends."""
        if granted(call) == "queued":
            self.seen["queued"] += 1
        lease = Lease(self.address, call.grant, self.account, self.life)
        time.sleep(work_s)
        weight = WEIGHTS[size]
        if ending < DIES:
            lease.end_worker()
            self.seen["died"] += 1
            status, _, body = receive(lease.release())
            lease.ended = time.monotonic()
            # Its death may have ended the lease already.
            if status != 404 and not 200 <= status < 300:
                raise Failed(f"/release was answered with {status} {body[:200].decode(errors='replace')}")
            self.told.either(lease, DECLARED_S, weight)
        elif ending < DIES + FAILS:
            lease.finish(lease.release(fail=True))
            self.seen["failed"] += 1
            self.told.either(lease, DECLARED_S, weight)
        else:
            lease.finish(lease.release())
            self.told.settled(lease, DECLARED_S, weight)
        self.seen["leases"] += 1

    def steady(self, number: int) -> dict:
        chance = random.Random(f"{self.plan['seed']} {number}")
        for turn in range(self.plan["leases"]):
            if time.monotonic() >= self.end:
                break
            size = "xlarge" if chance.random() < XLARGE else ""
            work_s, ending = chance.random() * WORK_MAX_S, chance.random()
            if turn == 0:
                call = first(self.address, self.token, DECLARED_S)
                size = ""
            else:
                self.nothing_comes_of_it(chance, size)
                call = self.ask(self.token, DECLARED_S, size)
            self.lease(call, size, work_s, ending)
        return self.result()

    def hungry(self) -> dict:
        call = first(self.address, self.token, DECLARED_S)
        for _ in range(HUNGRY_CALLS_MAX):
            # Refused for what is reserved only, a call may find room a moment later; for what is charged, never again.
            if QUOTA_EXCEEDED in call.refusal:
                break
            if not call.refusal:
                # 1: it ends as it should.
                self.lease(call, "", HUNGRY_WORK_S, 1)
            call = self.ask(self.token, DECLARED_S, "")
        self.refused(call, 429)
        for _ in range(REFUSALS):
            self.refused(self.ask(self.token, DECLARED_S, ""), 429)
        return self.result()

    def result(self) -> dict:
        return {"account": self.account, "told": self.told.json(), "seen": self.seen}


def storm(plan: dict, end: float) -> dict:
    accounts, callers, hungry = len(plan["tokens"]), plan["callers"], plan["hungry"]
    steady_accounts = accounts - hungry

    def call(number: int) -> dict:
        if number < callers:
            return Caller(plan, number % steady_accounts, end).steady(number)
        return Caller(plan, steady_accounts + number - callers, end).hungry()

    results = in_processes(callers + hungry, call)
    seen: dict = {"refused": {}}
    for result in results:
        for name, count in result["seen"].items():
            if name != "refused":
                seen[name] = seen.get(name, 0) + count
        for status, count in result["seen"]["refused"].items():
            seen["refused"][status] = seen["refused"].get(status, 0) + count
    of = lambda account: added([result["told"] for result in results if result["account"] == account])
    return {**seen, "accounts": [of(account) for account in range(accounts)]}


def main() -> int:
    plan = json.load(sys.stdin)
    end = time.monotonic() + plan["limit_s"]
    print(json.dumps(attempt(lambda: storm(plan, end))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
