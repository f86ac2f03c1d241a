"""instruct.endpoint: /chat/completions of any OpenAI-compatible server, asked by several threads.

    answers: threads take requests from a queue --ask--> wait_for_slot, post, read --> journal

What can go wrong with a request, and what happens then:

    RetryableError    busy, slow, or not a reply: again after a pause that doubles
    RequestRefused    the server will never take this one: dropped, the others go on
    GaveUp            no more retries, or a fault of all requests (the key, the address)

One request that fails is put off; if the server fails, the run ends (`must_end`). Every answer is
in the journal before the next is read, so the same command continues.
"""
import http.client
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from email.utils import parsedate_to_datetime

from formats.errors import note, Offline, UserError
from formats.strict_json import loads
from instruct.journal import record_all

LONGEST_REPLY = 16_000_000              # bytes
MOST_REFUSED = 20                       # in a row, and no answer yet: the server takes none


class RetryableError(Exception):
    """A request that may succeed later: why it failed, seconds the server asked to wait."""


class RequestRefused(Exception):
    """A request that the server will never take."""


class GaveUp(Exception):
    """A request that failed as often as it may: the failure that ends the run if it has to end, the
    reason to be counted if not, and whether others were answered while it was tried."""

    def __init__(self, failure, why, others):
        super().__init__(str(failure))
        self.failure, self.others, self.ends = failure, others, False
        status = re.match(r"HTTP \d+", why)
        self.why = f"no answer ({status[0] if status else why})"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn POST into GET."""

    def redirect_request(self, *_):
        return None


def retry_after(header):
    """What Retry-After asks for, a number or a date, in seconds; 0 if it says nothing."""
    try:
        if re.fullmatch(r"\d{1,9}", header or ""):
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def text_of(content):
    """A message's content, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content
                       if part.get("type") in ("text", "output_text"))
    return content


class ChatEndpoint:
    """One server and its limits. The lock guards what several threads change."""

    def __init__(self, args):
        self.args, self.key = args, os.environ.get(args.key_env, "")
        self.url = args.endpoint.rstrip("/") + "/chat/completions"
        self.http = urllib.request.build_opener(NoRedirect)
        self.lock, self.over = threading.Lock(), threading.Event()
        self.used = Counter()               # tokens, as the server counts them
        self.next_slot = 0.0                # when --per-minute allows the next request
        self.quiet_until = 0.0              # when the server, by Retry-After, does
        # replies so far; requests given up since the last reply, and those of them that may mean
        # that the server fails: see `must_end`
        self.answered = self.in_a_row = self.doubtful = 0

    # ------------------------------------------------------------------------- one request

    def wait_for_slot(self):
        """Wait until this request may go out."""
        with self.lock:
            slot = max(time.monotonic(), self.next_slot)
            self.next_slot = slot
            if self.args.per_minute:
                self.next_slot += 60 / self.args.per_minute
        while True:
            left = max(slot, self.quiet_until) - time.monotonic()
            if left <= 0 or self.over.wait(left):
                return

    def backoff(self, key, attempt):
        """Seconds before another attempt: doubling, and a half of it drawn from (seed, key)."""
        share = random.Random(f"{self.args.seed}:{key}:{attempt}").random()
        return min(self.args.longest_wait, self.args.backoff * 2 ** attempt) * (1 + share) / 2

    def redact(self, text):
        """The server's words on one line, without the key."""
        if self.key:
            text = text.replace(self.key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]

    def post(self, body):
        """The parsed reply. Raises RetryableError, RequestRefused, or UserError where a retry is
        useless."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers)
        until, received = time.monotonic() + self.args.timeout, b""
        try:
            with self.http.open(request, timeout=self.args.timeout) as reply:
                while True:                             # a server may trickle for ever
                    piece = reply.read1(65536)
                    if not piece:
                        break
                    received += piece
                    if len(received) > LONGEST_REPLY or time.monotonic() > until:
                        raise ValueError("a reply too long or too slow")
            return loads(received.decode())
        except urllib.error.HTTPError as error:
            raise self.failure_of(error) from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise RetryableError(self.redact(str(error)) or type(error).__name__, 0.0) from None

    def failure_of(self, error):
        """The exception that an HTTP status stands for."""
        try:
            words = self.redact(error.read(2000).decode(errors="replace"))
        except (OSError, http.client.HTTPException):
            words = ""
        why = f"HTTP {error.code} {words}".strip()
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            return RetryableError(why, retry_after(error.headers.get("Retry-After")))
        if error.code in (400, 413, 422):
            return RequestRefused(why)
        return UserError(why)

    def read(self, reply):
        """(text, reason of a rejection or "") of a parsed reply; its tokens are counted.

        Some servers put all that a model writes into its thinking if the model forgets to end it:
        an answer in a form of its own can be found there, others not."""
        try:
            choice = reply["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            text = text_of(message["content"]) if "content" in message else None
            reason = ""
            thought = message.get("reasoning_content") or message.get("reasoning")
            if not text and thought:
                text = thought
                if self.args.what in ("detail", "curate"):
                    reason = "thinking without an answer"
            text = text or ""
            used = reply.get("usage") or {}
            counts = {name: used.get(name) for name in ("prompt_tokens", "completion_tokens")}
        except (AttributeError, LookupError, TypeError):
            raise RetryableError("a reply that is no chat completion", 0.0) from None
        if not isinstance(text, str):
            raise RetryableError("a reply whose content is no text", 0.0)
        with self.lock:
            self.used.update({name: n for name, n in counts.items() if type(n) is int})
            self.answered += 1
            self.in_a_row = self.doubtful = 0
        return text, {"length": "cut off", "content_filter": "filtered"}.get(end, reason)

    def body_of(self, job):
        a = self.args
        body = {"model": a.endpoint_model, a.token_field: a.max_tokens,
                "messages": [{"role": role, "content": text} for role, text in job.request]}
        if a.temperature is not None:
            body["temperature"] = a.temperature
        return json.dumps(body).encode()

    def ask(self, job):
        """(text, reason of a rejection or ""). Raises RequestRefused or GaveUp."""
        a, before, body = self.args, self.answered, self.body_of(job)
        for attempt in range(a.retries + 1):
            self.wait_for_slot()
            if self.over.is_set():
                raise RequestRefused("the run is over")
            try:
                return self.read(self.post(body))
            except RetryableError as again:
                why, after = again.args
            except UserError as error:
                raise GaveUp(UserError(
                    f"{self.url}: {error}: check --endpoint, --endpoint-model and the key in "
                    f"{a.key_env}"), str(error), self.answered > before) from None
            if after > a.longest_wait:
                break
            if attempt < a.retries:
                with self.lock:                         # Retry-After counts for all threads
                    self.quiet_until = max(self.quiet_until, time.monotonic() + after)
                self.over.wait(self.backoff(job.key, attempt))
        raise GaveUp(Offline(
            f"{self.url}: no answer in {attempt + 1} attempts ({why}): run the same command later, "
            "it goes on where it stopped"), why, self.answered > before)

    # ------------------------------------------------------------------------- many requests

    def must_end(self, gave_up, failed, most, few):
        """Is it the server that fails, and not one request? `failed`: see Journal.

        It is the request if others were answered while it was tried, or in an earlier run, or if it
        failed in two runs and is one of a few that are left. If not, one cannot know; the run ends
        when the requests under way (`most`, or 5 and more once somebody was answered) have all
        failed with no answer in between."""
        with self.lock:
            self.in_a_row += 1
            is_request = (gave_up.others or failed == "others were answered"
                          or failed and (self.answered or few))
            if is_request:
                return self.in_a_row >= 20 + self.args.workers
            self.doubtful += 1
            limit = max(5, self.args.workers + 1) if self.answered else most
            return self.doubtful >= limit

    def work(self, todo, done, journal, most, few):
        """One thread: requests from `todo`, (request, answer or exception) to `done`."""
        while not self.over.is_set():
            job, result = todo.get(), None
            try:
                result = self.ask(job)
            except RequestRefused as error:
                result = error
            except GaveUp as error:
                result = error
                error.ends = self.must_end(error, journal.failed(job), most, few)
            finally:
                if isinstance(result, GaveUp) and result.ends:
                    self.over.set()
                done.put((job, result))     # None: a fault of ours, its traceback is printed

    def start_threads(self, jobs, journal, known):
        """Start to ask; returns the queue of what comes back, one entry for each job."""
        todo, done = queue.Queue(), queue.Queue()
        for job in sorted(jobs, key=lambda job: bool(journal.failed(job))):     # doubtful ones last
            todo.put(job)
        workers = self.args.workers
        most = min(workers, sum(journal.failed(job) != "others were answered" for job in jobs))
        few = known and len(jobs) <= max(5, workers + 1)
        for _ in range(min(workers, len(jobs))):
            threading.Thread(target=self.work, args=(todo, done, journal, most, few),
                             daemon=True).start()       # Ctrl-C does not wait for them
        return done

    def answers(self, jobs, journal, known=False):
        """[(job, text, reason)], one by one as they come, of those the server takes; what gets no
        answer while others do is put off. known: has this server answered in an earlier run?"""
        refused, unsure = 0, []             # refused in a row; given up since the last answer
        done = self.start_threads(jobs, journal, known)
        try:
            for _ in jobs:
                job, result = done.get()
                if isinstance(result, GaveUp):
                    note(f"{job.name}: {result}")
                    unsure.append((job, result.why))
                    if result.ends:
                        journal.put_off(unsure, "nobody was")
                        raise result.failure
                    continue
                if isinstance(result, RequestRefused):
                    refused += 1
                    if refused == MOST_REFUSED and not self.answered and not known:
                        raise UserError(
                            f"{self.url}: took none of 20 requests in a row ({result}): "
                            "check --endpoint-model and --token-field")
                    note(f"{job.name}: {result}")
                    continue
                refused = 0
                journal.put_off(unsure, "others were answered")
                unsure.clear()
                yield [(job, *result)]
            journal.put_off(unsure, "others were answered")
        finally:
            self.over.set()                 # nobody asks, and pays, for what nobody will read

    def estimate(self, jobs, total):
        """Print what asking costs: a token is 4 characters, a message 4 more."""
        a, read = self.args, 0
        for job in jobs:
            read += sum(math.ceil(len(text) / 4) + 4 for _, text in job.request)
        print(f"{len(jobs):,} requests to {a.endpoint_model} ({total - len(jobs):,} answered "
              f"already): about {read:,} tokens to read (4 characters a token, 4 tokens a message),"
              f" at most {len(jobs) * a.max_tokens:,} to write")
        cost = "not known without --price-in and --price-out"
        if a.price_in is not None and a.price_out is not None:
            read_cost = read * a.price_in / 1e6
            write_cost = len(jobs) * a.max_tokens * a.price_out / 1e6
            cost = f"at most about {read_cost + write_cost:,.2f} ({read_cost:,.2f} of it to read)"
        print("cost:", cost, flush=True)


def ask_endpoint(args, jobs, journal):
    """Estimate, then ask. False if only the estimate was wanted."""
    todo, endpoint = [job for job in jobs if job not in journal], ChatEndpoint(args)
    endpoint.estimate(todo, len(jobs))
    if args.estimate:
        return False
    answers = endpoint.answers(todo, journal, known=len(todo) < len(jobs))
    record_all(jobs, answers, journal, args.what)
    left = sum(job not in journal and bool(journal.failed(job)) for job in jobs)
    if left:
        note(f"{left} request(s) got no answer while others did: dropped for now, and asked "
             "again when the same command is run")
    print("used: {:,} tokens read, {:,} written, as the server counts them".format(
        endpoint.used["prompt_tokens"], endpoint.used["completion_tokens"]))
    return True
