"""Whether the tests of the state machine library notice what they are there for.

Each mutant puts one mistake into a copy of the library and names the tests that must then fail or hang:

    python -m tests.broker.machine_mutants [WORD…]

tries those whose name contains a word, or all, and exits with 1 if the tests let one through.
"""

# ruff: noqa: E501  a row holds the code that it changes, as that is written

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
HANGS_AFTER_S: Final = 60


@dataclass(frozen=True)
class Mutant:
    """A mistake: in `file`, `old` becomes `new`; `more` are further such pairs. `test` is pytest's -k."""

    name: str
    file: str
    old: str
    new: str
    test: str
    more: tuple[tuple[str, str], ...] = ()


MUTANTS: Final = (
    Mutant(
        "requests are shared between attempts",
        "runner.py",
        "return Run(self, self.machine.request.model_validate_json(self.row.request), results)",
        "return Run(self, self.__dict__.setdefault('r', self.machine.request.model_validate_json(self.row.request)), results)",
        "change_in_place",
    ),
    Mutant("anything is stored", "runner.py", "if type(value).model_validate_json(text) != value:", "if False:",
           "does_not_survive_json"),
    Mutant("done is a failure", "runner.py", 'return Ending("done", step=step, value=value)',
           'return Ending("aborted", step=step, value=value)', "done_ends_the_run"),
    Mutant("the end is logged without its error", "ledger.py", '"error_kind": ending.error_kind, "reason": ending.reason}\n    entry.append(run.seq, "finish"',
           '"error_kind": ending.error_kind}\n    entry.append(run.seq, "finish"', "abort_keeps_its_error"),
    Mutant("a run may be handed to itself", "runner.py", "if signal.run_id == self.row.id:", "if False:", "handoff_to_itself"),
    Mutant("a run may be handed to nobody", "runner.py", "if ending.successor is not None:", "if False:", "handoff_to_itself"),
    Mutant("attempts are not limited", "runner.py", "if self.row.attempt >= step.retry.attempts:",
           "if self.row.attempt >= step.retry.attempts + 5:", "attempts_end_with"),
    Mutant("there is no deadline", "runner.py", "elif self._left_s(step) <= spent_ms / 1000 + delay_s:", "elif False:", "deadline_ends"),
    Mutant("bugs are tried again", "signals.py", "    if isinstance(error, PROGRAMMING):\n        return Abort", "    if False:\n        return Abort", "programming_error_aborts"),
    Mutant("what was cancelled is success", "signals.py", "    if isinstance(error, PROGRAMMING):\n        return Abort",
           '    if "cancelled" in str(error):\n        return Done()\n    if isinstance(error, PROGRAMMING):\n        return Abort', "foreign_cancellation"),
    Mutant("the first of several errors decides", "signals.py", "return max(found, key=_severity)", "return found[0]", "the_worst_decides"),
    Mutant("only the outermost group is opened", "signals.py", "yield from leaves(inner)", "yield inner", "abort_inside_two_nurseries"),
    Mutant("initialisers crash the process", "runner.py", "await self._bear(error, began)", "raise", "initialiser"),
    Mutant("a repeated error is not logged", "ledger.py", '    entry.append(run.seq, "retry"', '    if run.last_error != error:\n        entry.append(run.seq, "retry"', "log_has_every_attempt"),
    Mutant("an abort is counted twice", "ledger.py", '    entry.append(run.seq, "finish", payload, step=ending.step)',
           '    entry.append(run.seq, "finish", payload, step=ending.step)\n    entry.append(run.seq, "finish", payload, step=ending.step)', "hooks_hear"),
    Mutant("hooks hear too early", "engine.py", "                told.extend(_told(entry))", "                [self.hooks.event(*t) for t in _told(entry)]", "hooks_hear"),
    Mutant("a hook can stop work", "engine.py", "            except Exception:\n                log.exception(\"a hook failed\")",
           "            except ZeroDivisionError:\n                pass", "hook_that_fails"),
    Mutant("writes are made beside the step's transaction", "runner.py", "        await self._commit(f\"{self.row.step}:complete\", write)",
           "        async with self.engine.transaction() as db:\n            [w(db) for w in run.writes]\n        run.writes.clear()\n        await self._commit(f\"{self.row.step}:complete\", write)",
           "kill_at_every or in_the_commit_of"),
    Mutant("resumed runs share a cursor", "engine.py", "        active = Active(self, machine, run, after)\n",
           "        run = __import__('dataclasses').replace(run, cursor=max([run.cursor, *(a.row.cursor for a in self._active.values())]))\n        active = Active(self, machine, run, after)\n",
           "own_cursor"),
    Mutant("runs are resumed as another machine's", "engine.py", "machine = self.machines.get(run.machine)\n        if machine is None:\n            raise UsageError(f\"this program",
           "machine = next(iter(self.machines.values()))\n        if machine is None:\n            raise UsageError(f\"this program", "two_machines_with_one_request"),
    Mutant("resumed runs go past their queue", "runner.py", "            if self.row.queue is not None:\n", "            if self.row.queue is not None and not self.row.crashes:\n", "through_their_queues",
           (("if row.queue is not None and row.not_before_ms", "if row.queue is not None and not row.crashes and row.not_before_ms"),)),
    Mutant("attempts are those of the step before", "ledger.py", "        attempt=1,\n", "        attempt=run.attempt,\n", "attempts_of_a_step"),
    Mutant("a pause begins anew", "runner.py", "left_ms = min(self.row.due_ms - self.engine.now_ms(), self.row.delay_ms)", "left_ms = self.row.delay_ms", "pause_goes_on"),
    Mutant("a clock set back prolongs a pause", "runner.py", "left_ms = min(self.row.due_ms - self.engine.now_ms(), self.row.delay_ms)",
           "left_ms = self.row.due_ms - self.engine.now_ms()", "clock_step_between"),
    Mutant("what an ending was is lost", "records.py", "        return cls(**fields)", "        return cls('aborted', reason=fields['reason'])", "ending_decided_before"),
    Mutant("crashes are not limited", "runner.py", "if self.row.crashes > step.retry.crashes:", "if False:", "keeps_killing"),
    Mutant("a stop is a crash", "ledger.py", "(0 if run.parked else 1)", "1", "good_order_are_not"),
    Mutant("everything is resumed", "opening.py", 'if resume == "all":', "if True:", "can_be_chosen"),
    Mutant("children stay behind", "engine.py", "        if active is not None:\n            for child in", "        if False:\n            for child in", "nobody_waits_for"),
    Mutant("steps run before the engine is handed out", "runner.py", "            await self.engine.opened.wait()\n", "", "before_the_engine_is_handed"),
    Mutant("a bad row stops the others", "engine.py", "except (UsageError, ValueError, LookupError, DamagedStateError) as error:", "except ZeroDivisionError as error:", "bad_row"),
    Mutant("a changed definition is run", "engine.py", "if (run.version, run.definition) != (machine.version, machine.digest):", "if False:", "changed_definition"),
    Mutant("rows have no digest", "records.py", 'if fields["seal"] != seal(row[:-1]):', "if False:", "damaged_row or damage_is"),
    Mutant("results have no digest", "records.py", "if digest != seal((run.seq, step, value)):", "if False:", "damaged_result"),
    Mutant("a key stays taken", "schema.py", "CREATE UNIQUE INDEX run_active_key ON run (machine, key) WHERE outcome IS NULL;", "CREATE UNIQUE INDEX run_active_key ON run (machine, key);", "key_is_free_again"),
    Mutant("queued runs are not unique", "schema.py", "ON run (machine, key) WHERE outcome IS NULL;", "ON run (machine, key) WHERE outcome IS NULL AND queue IS NULL;", "queued_and_delayed"),
    Mutant("keys are compared by their beginning", "records.py", 'WHERE machine = ? AND key = ? AND outcome IS NULL"', "WHERE machine = ? AND key LIKE ? || '%' AND outcome IS NULL\"", "keys_are_compared"),
    Mutant("any machine's run will do", "records.py", 'WHERE machine = ? AND key = ? AND outcome IS NULL"', 'WHERE ? <> \'\' AND key = ? AND outcome IS NULL"', "machines_with_the_same_key"),
    Mutant("an unknown run is the last one", "records.py", '"run": f"SELECT {COLUMNS} FROM run WHERE id = ?"', '"run": f"SELECT {COLUMNS} FROM run WHERE id = ? OR 1"', "unknown_run"),
    Mutant("an unknown queue is no queue", "engine.py", "        if queue not in self.queues:", "        if False:", "unknown_queue"),
    Mutant("queues have no limit", "queues.py", "while self._waiting and self.held < self.limit:", "while self._waiting:", "through_their_queues or holds_its_queue or older_runs"),
    Mutant("a queue is in order of arrival", "queues.py", "ticket = Ticket(seq,", "ticket = Ticket(0,", "older_runs"),
    Mutant("a parent keeps its place", "runner.py", "        self._lent += 1\n", "        self._lent += 2\n", "does_not_block_its_children"),
    Mutant("a delayed run ignores its queue", "runner.py", "            if self.row.queue is not None:\n", "            if self.row.queue is not None and self.row.not_before_ms is None:\n", "starts_on_time"),
    Mutant("who rests holds up the stop", "runner.py", "self.resting += 1", "self.resting += 0", "does_not_hold_up or marked_rest"),
    Mutant("after a failure is after a success", "runner.py", 'if policy == "success" and not outcome.ok:', "if False:", "starts_after_another"),
    Mutant("an unknown predecessor is none", "starting.py", "for a in map(as_after, plan.after)]", "for a in map(as_after, plan.after) if lookup._all('run', a.run_id)]", "unknown_predecessor"),
    Mutant("predecessors are forgotten", "engine.py", "return (self._check_run(run), self.lookup.predecessors(run)) if run.active else None", "return (self._check_run(run), []) if run.active else None", "predecessor_after_a_restart"),
    Mutant("children are repeated", "starting.py", "    if found is None and parent is not None:", "    if False:", "share_a_child or done_child"),
    Mutant("another request's child will do", "ledger.py", "AND machine = ? AND key = ? AND request = ? AND", "AND machine = ? AND key = ? AND ? <> '' AND", "done_child"),
    Mutant("a cancel takes what others want", "ledger.py", "WHERE c.child = run.seq AND p.outcome IS NULL AND p.cancel_cause IS NULL)", "WHERE c.child = -1)", "cascades"),
    Mutant("a cancel takes what the user wants", "ledger.py", " AND outcome IS NULL AND cancel_cause IS NULL AND wanted = 0", " AND outcome IS NULL AND cancel_cause IS NULL", "cascades"),
    Mutant("a cancel does not cascade", "ledger.py", "        waiting += _unwanted_children(entry, next_run.seq)\n", "", "cascades"),
    Mutant("an abort leaves its children at work", "ledger.py", 'if ending.kind in ("aborted", "cancelled"):', "if False:", "takes_its_children"),
    Mutant("finished children are active", "records.py", '" WHERE c.parent = ? AND r.outcome IS NULL ORDER BY c.child"', '" WHERE c.parent = ? ORDER BY c.child"', "children_are_listed"),
    Mutant("a run may be part of itself", "starting.py", "    if ledger.is_ancestor(entry, run.seq, parent.seq):", "    if False:", "part_of_itself"),
    Mutant("a run may wait for itself", "runner.py", "        if run_id == self.row.id:\n", "        if False:\n", "wait_for_itself"),
    Mutant("an ended run has children", "starting.py", "    if not parent.active:", "    if False:", "under_an_active_parent"),
    Mutant("a cancel is told before it is written", "engine.py", "        if run.cancel_cause is None:\n            asked", "        self._tell_cancelled(run.seq)\n        await trio.sleep(0.01)\n        if run.cancel_cause is None:\n            asked", "durable_before"),
    Mutant("the cause of a cancel is lost", "runner.py", 'Ending("cancelled", "cancelled", self.row.cancel_cause, step', 'Ending("cancelled", "cancelled", "context canceled", step', "during_a_pause"),
    Mutant("finalisers are cancelled as well", "runner.py", "            await self._close()\n        except", "                await self._close()\n        except", "cancelled_run_can_work",
           (("        with trio.CancelScope(shield=True):\n            self.row", "        if True:\n            self.row"),)),
    Mutant("what a cancel breaks is an outcome", "runner.py", "        await trio.lowlevel.checkpoint_if_cancelled()\n", "", "error_caused_by_the_cancellation or stop_breaks"),
    Mutant("a cancelled run is joined", "engine.py", "            if new or run.cancel_cause is None or not run.active:\n                break", "            break", "being_cancelled"),
    Mutant("a stop cuts at once", "engine.py", "with trio.move_on_after(grace_s):", "with trio.move_on_after(0):", "lets_the_step_at_work"),
    Mutant("a stop is not heeded between steps", "runner.py", "        if self.engine.draining:\n            self.scope.cancel()\n        await trio.lowlevel.checkpoint()", "        await trio.lowlevel.checkpoint()", "lets_the_step_at_work"),
    Mutant("a stopped run is forgotten by who waits", "engine.py", "if self.draining or seq in self._stopped:\n                if waiter", "if False:\n                if waiter", "told_that_the_engine_stops"),
    Mutant("a cancelled program leaves a mess", "runner.py", "self.scope = trio.CancelScope(shield=True)", "self.scope = trio.CancelScope()", "cancelled_program_parks"),
    Mutant("an error comes out in a group", "opening.py", "                    failure = error\n", "                    raise\n", "comes_out_as_it_is"),
    Mutant("locks are not taken", "ownership.py", "if seq in self._held or not self._lock(fcntl.F_WRLCK, seq):", "if seq in self._held:", "joins_and_waits or waiting_engine"),
    Mutant("who waits never takes over", "engine.py", "            if active is None and (needed or seq in self._needed):", "            if False:", "takes_over"),
    Mutant("other processes' cancels are not heard", "engine.py", "            for seq in await self.database.read(lambda _: self.lookup.cancelled_seqs()):", "            for seq in ():", "another_engine_cancels"),
    Mutant("an orphan's cancel is only noted", "engine.py", "                await self._adopt(seq)  # without an owner nobody else would end it", "                pass", "without_an_owner"),
    Mutant("the loop waits inside SQLite", "database.py", "_BUSY_TIMEOUT_MS: Final = 5 ", "_BUSY_TIMEOUT_MS: Final = 5000 ", "without_blocking"),
    Mutant("a busy file is an error", "database.py", "            if trio.current_time() >= give_up:\n                raise", "            raise", "without_blocking or only_delays"),
    Mutant("a busy commit is rolled back", "database.py", 'await self._patiently(lambda: self._writer.execute("COMMIT"))', 'self._writer.execute("COMMIT")', "only_delays"),
    Mutant("a commit that fails is only logged", "runner.py", '        self.row = await self.engine.commit(f"{self.machine.name}:{name}", write)',
           '        from dataclasses import replace\n        try:\n            self.row = await self.engine.commit(f"{self.machine.name}:{name}", write)\n        except StateError:\n            self.row = replace(self.row, cursor=self.row.cursor + 1)', "full_disk"),
    Mutant("reading connections have no settings", "database.py", "            _configure(db, path, query_only=query_only)", "            if not query_only:\n                _configure(db, path, query_only=query_only)", "connection_has_the_settings"),
    Mutant("synchronous is FULL", "database.py", '"synchronous": 3,', '"synchronous": 2,', "connection_has_the_settings"),
    Mutant("the file is everybody's", "database.py", "os.O_NOFOLLOW, 0o600", "os.O_NOFOLLOW, 0o644", "private_and_usable"),
    Mutant("a newer file is opened", "database.py", "    if version > len(scripts):", "    if False:", "foreign_files"),
    Mutant("another program's file is opened", "database.py", "    if owner != application_id:", "    if False:", "foreign_files"),
    Mutant("the schema has no digest", "database.py", "if found[-1][2] != _schema_digest(db):", "if False:", "byte_in_the_schema"),
    Mutant("the structure is not checked", "database.py", "            await database.read(lambda db: quick_check(db, path))\n", "", "structure_is_damaged"),
    Mutant("an index is missing", "schema.py", "CREATE INDEX run_machine ON run (machine, seq);\n", "", "query_uses_an_index"),
    Mutant("another index is missing", "schema.py", "CREATE INDEX run_active ON run (seq) WHERE outcome IS NULL;\n", "", "query_uses_an_index"),
    Mutant("prune takes too much", "ledger.py", "SELECT seq FROM run WHERE outcome IS NOT NULL AND updated_ms < ?", "SELECT seq FROM run WHERE ? > 0", "prune_forgets"),
    Mutant("a run that is not at work here is another's", "engine.py", "return run.active and self._ownership.is_held_elsewhere(run.seq)", "return run.active and run.seq not in self._active", "told_from_another"),
    Mutant("a dead engine's run is another's", "engine.py", "return run.active and self._ownership.is_held_elsewhere(run.seq)", "return run.active and not self._ownership.holds(run.seq)", "told_from_another"),
    Mutant("a commit wakes nobody here", "database.py", "        self.tell_moved()\n        self._point", "        self._point", "wakes_when_another"),
    Mutant("a commit elsewhere wakes nobody", "engine.py", "                    self.database.tell_moved()\n", "", "wakes_when_another"),
    Mutant("a duration counts the wait in the queue", "runner.py", "            run = await self._view()\n            began = trio.current_time()", "            run = await self._view()\n            began = entered", "duration_is_of", more=(("    async def _attempt(self, step: Step[Any]) -> None:\n", "    async def _attempt(self, step: Step[Any]) -> None:\n        entered = trio.current_time()\n"),)),
    Mutant("an ended run stays in memory", "engine.py", "        self._needed.discard(seq)\n        self._ownership", "        self._ownership", "keeps_nothing"),
    Mutant("an ended run keeps its place", "runner.py", "            self._drop_places()\n            self.engine.forget", "            self.engine.forget", "keeps_nothing"),
    Mutant("a trace is lost", "view.py", "self.trace = active.row.trace", "self.trace = None", "trace_goes"),
    Mutant("a run is found among the newest alone", "records.py", "self._all(\"begins\", prefix, f\"{prefix}~\", limit)", "[r for r in self._all(\"all_runs\", 1 << 62, 100) if r[1].startswith(prefix)]", "beginning_of_its_id"),
)  # fmt: skip


def noticed(mutant: Mutant) -> bool:
    """Say whether the named tests fail on a mutant."""
    folder = Path(tempfile.mkdtemp(prefix="imgpull-mutant-"))
    try:
        for part in ("broker", "privhelper", "policy", "tests/broker", "tests/support"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        file = folder / "broker" / "machine" / mutant.file
        text = file.read_text()
        for old, new in ((mutant.old, mutant.new), *mutant.more):
            if text.count(old) == 0:
                raise SystemExit(f"{mutant.name}: {mutant.file} no longer holds {old!r}")
            text = text.replace(old, new)
        file.write_text(text)
        tests = sorted(str(path) for path in (folder / "tests" / "broker").glob("test_machine_*.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", mutant.test, *tests]
        try:
            run = subprocess.run(
                command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True,
                timeout=HANGS_AFTER_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        if run.returncode not in (0, 1):
            raise SystemExit(f"{mutant.name}: pytest itself failed:\n{run.stdout.decode()[-2000:]}")
        return run.returncode == 1
    finally:
        shutil.rmtree(folder)


def main(words: list[str]) -> int:
    """Try the mutants and print a line for each."""
    through = 0
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        seen = noticed(mutant)
        through += not seen
        print(f"{'noticed' if seen else 'LET THROUGH':12} {mutant.name}", flush=True)
    return 1 if through else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
