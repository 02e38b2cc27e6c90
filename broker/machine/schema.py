"""The tables of the library; they lie in the program's own SQLite file.

Rule 1: the database refuses what the code must never do: a second active run of a key, a step completed twice, a
    cursor that goes back, a finished run that changes, an event that is altered.
Rule 2: order is a sequence number of the database, never a clock.
Rule 3: what the library looks up has an index, so that finished runs cost nothing.
"""

from typing import Final

# A run is active while `outcome` is null. `cursor` counts the completed steps: with a cursor there can be no hole.
# `ending` is an outcome that is decided while finalisers may still be at work. `seal` is a digest of the other columns.
SCHEMA: Final = """
CREATE TABLE run (
  seq             INTEGER PRIMARY KEY AUTOINCREMENT,
  id              TEXT    NOT NULL UNIQUE CHECK (length(id) = 26),
  machine         TEXT    NOT NULL,
  version         INTEGER NOT NULL,
  definition      TEXT    NOT NULL,
  steps           TEXT    NOT NULL,
  key             TEXT    NOT NULL,
  request         TEXT    NOT NULL,
  queue           TEXT,
  trace           TEXT,
  wanted          INTEGER NOT NULL CHECK (wanted IN (0, 1)),
  not_before_ms   INTEGER,
  cursor          INTEGER NOT NULL DEFAULT 0,
  attempt         INTEGER NOT NULL DEFAULT 1 CHECK (attempt >= 1),
  spent_ms        INTEGER NOT NULL DEFAULT 0,
  due_ms          INTEGER,
  delay_ms        INTEGER,
  crashes         INTEGER NOT NULL DEFAULT 0,
  parked          INTEGER NOT NULL DEFAULT 0 CHECK (parked IN (0, 1)),
  last_error      TEXT,
  cancel_cause    TEXT,
  ending          TEXT,
  outcome         TEXT CHECK (outcome IN ('done', 'aborted', 'cancelled', 'handed_off', 'quarantined')),
  created_ms      INTEGER NOT NULL,
  updated_ms      INTEGER NOT NULL,
  seal            TEXT    NOT NULL,
  CHECK (cursor >= 0),
  CHECK (outcome IS NULL OR ending IS NOT NULL)
) STRICT;
CREATE UNIQUE INDEX run_active_key ON run (machine, key) WHERE outcome IS NULL;
CREATE INDEX run_active ON run (seq) WHERE outcome IS NULL;
CREATE INDEX run_cancelled ON run (seq) WHERE outcome IS NULL AND cancel_cause IS NOT NULL;
CREATE INDEX run_machine ON run (machine, seq);
CREATE INDEX run_key ON run (machine, key, seq);
CREATE INDEX run_finished ON run (updated_ms) WHERE outcome IS NOT NULL;

CREATE TABLE run_result (
  run   INTEGER NOT NULL REFERENCES run (seq) ON DELETE CASCADE,
  step  TEXT    NOT NULL,
  value TEXT    NOT NULL,
  seal  TEXT    NOT NULL,
  PRIMARY KEY (run, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE run_child (
  parent INTEGER NOT NULL REFERENCES run (seq) ON DELETE CASCADE,
  child  INTEGER NOT NULL REFERENCES run (seq) ON DELETE CASCADE,
  PRIMARY KEY (parent, child),
  CHECK (parent <> child)
) STRICT, WITHOUT ROWID;
CREATE INDEX run_child_child ON run_child (child);

CREATE TABLE run_after (
  run         INTEGER NOT NULL REFERENCES run (seq) ON DELETE CASCADE,
  predecessor INTEGER NOT NULL REFERENCES run (seq) ON DELETE CASCADE,
  policy      TEXT    NOT NULL CHECK (policy IN ('success', 'any')),
  PRIMARY KEY (run, predecessor)
) STRICT, WITHOUT ROWID;
CREATE INDEX run_after_predecessor ON run_after (predecessor);

CREATE TABLE event (
  seq     INTEGER PRIMARY KEY AUTOINCREMENT,
  run     INTEGER NOT NULL REFERENCES run (seq) DEFERRABLE INITIALLY DEFERRED,
  type    TEXT    NOT NULL,
  step    TEXT,
  attempt INTEGER,
  payload TEXT    NOT NULL,
  at_ms   INTEGER NOT NULL
) STRICT;
CREATE INDEX event_run ON event (run, seq);
CREATE UNIQUE INDEX event_completes_once ON event (run, step) WHERE type = 'complete';

CREATE TRIGGER run_finished_is_final
BEFORE UPDATE ON run WHEN OLD.outcome IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a finished run never changes'); END;
CREATE TRIGGER run_cursor_goes_forward
BEFORE UPDATE OF cursor ON run WHEN NEW.cursor NOT IN (OLD.cursor, OLD.cursor + 1)
BEGIN SELECT RAISE(ABORT, 'a cursor moves by one step'); END;
CREATE TRIGGER run_request_is_frozen
BEFORE UPDATE OF id, machine, version, definition, steps, key, request ON run
BEGIN SELECT RAISE(ABORT, 'what a run is never changes'); END;
CREATE TRIGGER run_cancel_is_final
BEFORE UPDATE OF cancel_cause ON run WHEN OLD.cancel_cause IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'a run is cancelled once'); END;
CREATE TRIGGER event_is_never_altered
BEFORE UPDATE ON event
BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER event_outlives_nothing_but_its_run
BEFORE DELETE ON event WHEN EXISTS (SELECT 1 FROM run WHERE seq = OLD.run)
BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""
