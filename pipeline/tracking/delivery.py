"""The process that talks to MLflow for a stage: what it takes, when, and what waits on disk.

It takes messages from standard input until that ends, and answers once, with the id of the run.
Where MLflow does not answer, it tries again at longer and longer intervals, until the stage ends.
What earlier stages left on disk is sent before the run is opened, while that takes no longer than
a few seconds, and later on whenever the stage sends nothing.
"""

import atexit
import gc
import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from pipeline.environment import MLFLOW, set_default_environment
from pipeline.tracking.address import address, tracking_uri
from pipeline.tracking.messages import End, Message, Start, from_line
from pipeline.tracking.mlflow_process import MlflowProcess
from pipeline.tracking.outages import OutageError, report, warn
from pipeline.tracking.spool import Kept, make_room, mark, remove, reports, spool, waiting
from pipeline.tracking.tracker import KEPT

BEFORE, AFTER = 10.0, 10.0  # seconds for earlier stages' messages, before and after this one's
LONGEST = 60.0  # seconds between two attempts


class Run:
    """The messages of a run on their way to MLflow, in order.

    Args:
        folder: where they are kept, if they are.
        kept: what an earlier stage left.
    """

    def __init__(self, folder: Path | None, kept: Kept | None = None) -> None:
        self.folder, self.kept = folder, kept
        self.waiting: deque[tuple[int, Message]] = deque(kept.messages() if kept else ())
        self.process = MlflowProcess(folder or Path(), late=kept is not None)
        self.whole = True  # whether MLflow has taken everything so far

    def send(self) -> Message:
        """Send the next message; it stays where MLflow does not answer."""
        number, message = self.waiting[0]
        if isinstance(message, End):
            self._send_reports()
        if self.process.take(message):
            mark(self.folder, number)
        else:
            self.whole = False
        self.waiting.popleft()
        return message

    def close(self) -> None:
        """Forget it where MLflow has taken everything."""
        if self.whole and not self.waiting:
            with suppress(OutageError):
                self._send_reports()
                remove(self.folder)
        if self.kept is not None:
            self.kept.close()

    def _send_reports(self) -> None:
        for message in reports(self.folder):
            self.process.take(message)


def earlier_runs() -> deque[Run]:
    """What stages that have ended left for this MLflow, the oldest first; locked."""
    found: deque[Run] = deque()
    all_of_them = waiting(spool())
    kept_on = make_room(all_of_them)
    if len(kept_on) < len(all_of_them):
        count = len(all_of_them) - len(kept_on)
        warn(f"{spool()} is full; what MLflow has not taken of the {count} oldest runs is lost")
    for kept in kept_on:
        if kept.address == address():
            found.append(Run(kept.folder, kept))
        else:
            kept.close()
    return found


class Delivery:
    """Sends a stage's messages, and between them those that earlier stages left.

    Args:
        folder: where the stage's messages are kept, if they are.
        answer: the file descriptor that the id of the run is written to.
    """

    def __init__(self, folder: Path | None, answer: int) -> None:
        self.answer = answer
        self.own, self.earlier = Run(folder), earlier_runs()
        self.inbox: SimpleQueue[str | None] = SimpleQueue()
        self.began = time.monotonic()
        self.opened = self.answered = self.ended = self.said = False
        self.sent = 0  # earlier runs
        self.pause, self.until = 0.0, 0.0  # seconds of the last one; when it ends

    def run(self) -> bool:
        """Send until the stage has ended; whether MLflow has taken all of its messages."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            self._receive()
            resting = time.monotonic() < self.until
            if self.ended and (resting or not (self.own.waiting or self._has_time())):
                break
            if not resting:
                self._step()
        self.own.close()
        for run in self.earlier:
            run.close()
        if self.sent:
            print(
                f"MLflow: {self.sent} earlier run(s) that waited on disk are there", file=sys.stderr
            )
        return self.own.whole and not self.own.waiting

    def _read(self) -> None:
        for line in sys.stdin:
            self.inbox.put(line)
        self.inbox.put(None)

    def _receive(self) -> None:
        """Take what the stage has sent; wait for it where there is nothing else to do."""
        rest = self.until - time.monotonic()
        idle = not self.own.waiting and not self._has_time()
        wait = max(0.0, rest) if rest > 0 or not idle else None
        with suppress(Empty):
            while not self.ended:
                line = self.inbox.get(timeout=wait)
                wait = 0.0
                if line is None:
                    self.ended, self.began = True, time.monotonic()
                    return
                number, _, message = line.partition(" ")
                self.own.waiting.append((int(number), from_line(message)))

    def _has_time(self) -> bool:
        """Whether something of earlier stages is to be sent when this one sends nothing."""
        in_time = not self.ended or time.monotonic() - self.began < AFTER
        return bool(self.earlier) and in_time

    def _step(self) -> None:
        """Send a message of this stage; early, or where it has none, of an earlier one."""
        early = not self.opened and time.monotonic() - self.began < BEFORE
        late = self.earlier and (early or not self.own.waiting)
        run = self.earlier[0] if late else self.own
        if not run.waiting:
            if late:
                self._next_of_earlier()
            return
        try:
            message = run.send()
        except OutageError as outage:
            self._rest(outage, run)
            return
        self.pause = 0.0
        if self.said:
            print(f"MLflow at {tracking_uri()} answers again", file=sys.stderr, flush=True)
            self.said = False
        if run is self.own and isinstance(message, Start):
            self.opened = True
            self._answer(run.process.run_id)

    def _next_of_earlier(self) -> None:
        run = self.earlier.popleft()
        self.sent += run.whole
        run.close()

    def _rest(self, outage: OutageError, run: Run) -> None:
        """After a message that was not taken: the next attempt is after a while."""
        if run is not self.own and not outage.dead:  # something is the matter with that run
            self.earlier.popleft().close()
            return
        if not self.said:
            keeping = f"what it does not take is kept in {spool()} and sent by the next stage"
            report(outage.error, "does not answer", f"going on without; {keeping}")
            self.said = True
        self._answer("")
        self.pause = min(LONGEST, 2 * self.pause or 1.0)
        self.until = time.monotonic() + self.pause

    def _answer(self, run_id: str) -> None:
        """Tell the stage the id of its run, or that it need not wait for it."""
        if not self.answered:
            with suppress(BrokenPipeError):  # where the stage was killed meanwhile
                os.write(self.answer, f"{run_id}\n".encode())
        self.answered = True


def main() -> None:
    """Take messages from standard input until it ends."""
    set_default_environment(MLFLOW)
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    answer = os.dup(sys.stdout.fileno())  # for us alone: MLflow prints where its runs are to see
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    atexit.register(gc.freeze)  # else Python's end looks through all of MLflow, and the stage waits
    sys.exit(0 if Delivery(folder, answer).run() else KEPT)
