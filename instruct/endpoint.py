"""TODO"""

import http.client
import json
import math
import os
import queue
import random
import re
import threading
import time
import urllib.request
from collections import Counter
from email.utils import parsedate_to_datetime

from formats.errors import note, Offline, UserError
from formats.strict_json import loads
from instruct.journal import record_all


class RetryableError(Exception):
    """A request that may succeed later: why it failed, seconds the server asked to wait."""


class RequestRefused(Exception):
    """A request that the server will never take."""


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


class ChatEndpoint:
    """/chat/completions of any OpenAI-compatible server, asked by several threads."""

    def __init__(self, args):
        self.args, self.key = args, os.environ.get(args.key_env, "")
        self.url = args.endpoint.rstrip("/") + "/chat/completions"
        self.http = urllib.request.build_opener(NoRedirect)
        self.lock, self.over, self.used = threading.Lock(), threading.Event(), Counter()
        self.next = self.quiet = 0.0        # when the rate, and when the server, lets us ask again
        self.answered = self.in_a_row = self.doubtful = 0       # see `must_end`

    def turn(self):
        """Wait until this request may go out."""
        with self.lock:
            at = max(time.monotonic(), self.next)
            self.next = at + (60 / self.args.per_minute if self.args.per_minute else 0)
        while (left := max(at, self.quiet) - time.monotonic()) > 0:
            if self.over.wait(left):
                break

    def pause(self, key, attempt):
        """Seconds before another attempt: doubling, and a half of it drawn from (seed, key)."""
        dice = random.Random(f"{self.args.seed}:{key}:{attempt}").random()
        return min(self.args.longest_wait, self.args.backoff * 2 ** attempt) * (1 + dice) / 2

    def plain(self, text):
        """Words of the server on one line, without the key."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]

    def post(self, body):
        """The parsed reply. Raises Again, Refused, or data.Failure where a retry is useless."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        until, got = time.monotonic() + self.args.timeout, b""
        try:
            with self.http.open(urllib.request.Request(self.url, body, headers),
                                timeout=self.args.timeout) as reply:
                while piece := reply.read1(65536):      # a server may trickle for ever
                    got += piece
                    if len(got) > 16_000_000 or time.monotonic() > until:
                        raise ValueError("a reply too long or too slow")
            return loads(got.decode())
        except urllib.error.HTTPError as error:
            try:
                words = self.plain(error.read(2000).decode(errors="replace"))
            except (OSError, http.client.HTTPException):
                words = ""
            why = f"HTTP {error.code} {words}".strip()
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise RetryableError(why, retry_after(error.headers.get("Retry-After"))) from None
            if error.code in (400, 413, 422):
                raise RequestRefused(why) from None
            raise UserError(why) from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise RetryableError(self.plain(str(error)) or type(error).__name__, 0.0) from None

    def read(self, reply):
        """(text, reason of a rejection or "") of a parsed reply; its tokens are counted.

        A content may be a list of parts. Some servers put all that a model writes into its thinking
        if it forgets to end it: an answer in a form of its own can be found there, others not."""
        try:
            message, end = reply["choices"][0]["message"], reply["choices"][0].get("finish_reason")
            text, lost = message["content"] if "content" in message else None, ""
            if isinstance(text, list):
                text = "".join(part["text"] for part in text
                               if part.get("type") in ("text", "output_text"))
            thought = message.get("reasoning_content") or message.get("reasoning")
            if not text and thought:
                text = thought
                lost = "thinking without an answer" * (self.args.what in ("detail", "curate"))
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
        return text, {"length": "cut off", "content_filter": "filtered"}.get(end, lost)

    def ask(self, job):
        """(text, reason of a rejection or ""). Raises Refused or GaveUp."""
        a, before = self.args, self.answered
        body = {"model": a.endpoint_model, a.token_field: a.max_tokens,
                "messages": [{"role": role, "content": text} for role, text in job.request]}
        body |= {} if a.temperature is None else {"temperature": a.temperature}
        for attempt in range(a.retries + 1):
            self.turn()
            if self.over.is_set():
                raise RequestRefused("the run is over")
            try:
                return self.read(self.post(json.dumps(body).encode()))
            except RetryableError as again:
                why, after = again.args
            except UserError as error:
                raise GaveUp(UserError(
                    f"{self.url}: {error}: check --endpoint, --endpoint-model and the key in "
                    f"{a.key_env}"), str(error), self.answered > before) from None
            if after > a.longest_wait:
                break
            if attempt < a.retries:
                with self.lock:
                    self.quiet = max(self.quiet, time.monotonic() + after)  # for all threads
                self.over.wait(self.pause(job.key, attempt))
        raise GaveUp(Offline(
            f"{self.url}: no answer in {attempt + 1} attempts ({why}): run the same command later, "
            "it goes on where it stopped"), why, self.answered > before)

    def must_end(self, gave_up, failed, most, few):
        """Is it the server that fails, and not one request? `failed`: see Journal.

        It is the request if others were answered while it was tried, or in an earlier run, or if it
        failed in two runs and is one of a few that are left. If not, one cannot know; the run ends
        when the requests under way (`most`, or 5 and more once somebody was answered) have all
        failed with no answer in between."""
        with self.lock:
            self.in_a_row += 1
            if gave_up.others or failed == "others were answered" or failed and (
                    self.answered or few):
                return self.in_a_row >= 20 + self.args.workers
            self.doubtful += 1
            return self.doubtful >= (max(5, self.args.workers + 1) if self.answered else most)

    def answers(self, jobs, journal, known=False):
        """[(job, text, reason)], one by one as they come, of those the server takes; what gets no
        answer while others do is put off. known: has this server answered in an earlier run?"""
        todo, done, refused, unsure = queue.Queue(), queue.Queue(), 0, []
        for job in sorted(jobs, key=lambda job: bool(journal.failed(job))):
            todo.put(job)
        most = min(self.args.workers, sum(
            journal.failed(job) != "others were answered" for job in jobs))
        few = known and len(jobs) <= max(5, self.args.workers + 1)

        def work():
            while not self.over.is_set():
                job, result = todo.get(), None
                try:
                    result = self.ask(job)
                except RequestRefused as error:
                    result = error
                except GaveUp as error:
                    result, error.ends = error, self.must_end(
                        error, journal.failed(job), most, few)
                finally:
                    if isinstance(result, GaveUp) and result.ends:
                        self.over.set()
                    done.put((job, result))     # None: a fault of ours, its traceback is printed

        for _ in range(min(self.args.workers, len(jobs))):
            threading.Thread(target=work, daemon=True).start()      # Ctrl-C does not wait for them
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
                if not isinstance(result, RequestRefused):
                    journal.put_off(unsure, "others were answered")
                    unsure.clear()
                refused = refused + 1 if isinstance(result, RequestRefused) else 0
                if refused == 20 and not self.answered and not known:
                    raise UserError(f"{self.url}: took none of 20 requests in a row ({result}): "
                                       "check --endpoint-model and --token-field")
                if refused:
                    note(f"{job.name}: {result}")
                else:
                    yield [(job, *result)]
            journal.put_off(unsure, "others were answered")
        finally:
            self.over.set()                     # nobody asks, and pays, for what nobody will read

    def estimate(self, jobs, total):
        """Print what asking costs: a token is 4 characters, a message 4 more."""
        a = self.args
        read = sum(math.ceil(len(text) / 4) + 4 for job in jobs for _, text in job.request)
        print(f"{len(jobs):,} requests to {a.endpoint_model} ({total - len(jobs):,} answered "
              f"already): about {read:,} tokens to read (4 characters a token, 4 tokens a message),"
              f" at most {len(jobs) * a.max_tokens:,} to write")
        cost = "not known without --price-in and --price-out"
        if a.price_in is not None and a.price_out is not None:
            read, wrote = read * a.price_in / 1e6, len(jobs) * a.max_tokens * a.price_out / 1e6
            cost = f"at most about {read + wrote:,.2f} ({read:,.2f} of it to read)"
        print("cost:", cost, flush=True)


def ask_endpoint(args, jobs, journal):
    """Estimate, then ask. False if only the estimate was wanted."""
    todo, endpoint = [job for job in jobs if job not in journal], ChatEndpoint(args)
    endpoint.estimate(todo, len(jobs))
    if not args.estimate:
        record_all(jobs, endpoint.answers(todo, journal, known=len(todo) < len(jobs)), journal,
                args.what)
        if left := sum(job not in journal and bool(journal.failed(job)) for job in jobs):
            note(f"{left} request(s) got no answer while others did: dropped for now, and asked "
                 "again when the same command is run")
        print("used: {:,} tokens read, {:,} written, as the server counts them".format(
            endpoint.used["prompt_tokens"], endpoint.used["completion_tokens"]))
    return not args.estimate


class GaveUp(Exception):
    """A request that failed as often as it may: the failure that ends the run if it has to end, the
    reason to be counted if not, and whether others were answered while it was tried."""

    def __init__(self, failure, why, others):
        super().__init__(str(failure))
        self.failure, self.others, self.ends = failure, others, False
        status = re.match(r"HTTP \d+", why)
        self.why = f"no answer ({status[0] if status else why})"
