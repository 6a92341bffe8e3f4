-- What sinks are told of that is no entry of the log, and the life of alerts.

CREATE TABLE notice (
  idx      INTEGER PRIMARY KEY, -- negative: where an entry of the log has its index
  event_id TEXT NOT NULL UNIQUE,
  body     BLOB NOT NULL
) STRICT;

CREATE TABLE outbox_5 (
  sink       TEXT NOT NULL,
  leaf_idx   INTEGER NOT NULL, -- of the log, or of a notice
  ref_id     INTEGER REFERENCES ref (id),
  dead       INTEGER NOT NULL DEFAULT 0,
  batch      TEXT,             -- the message that it is part of, once that was tried
  attempts   INTEGER NOT NULL DEFAULT 0,
  next_at    INTEGER NOT NULL, -- not before
  last_error TEXT NOT NULL DEFAULT '',
  reminder   INTEGER NOT NULL DEFAULT 0, -- how often it was told before
  PRIMARY KEY (sink, leaf_idx)
) STRICT, WITHOUT ROWID;
INSERT INTO outbox_5 (sink, leaf_idx, ref_id, dead, batch, attempts, next_at, last_error)
  SELECT sink, leaf_idx, ref_id, dead, batch, attempts, next_at, last_error FROM outbox;
DROP TABLE outbox;
ALTER TABLE outbox_5 RENAME TO outbox;
CREATE INDEX outbox_next ON outbox (sink, dead, next_at);
CREATE INDEX outbox_ref ON outbox (sink, ref_id, dead, leaf_idx);
CREATE INDEX outbox_batch ON outbox (sink, batch);

-- What is open until something ends it.
CREATE TABLE alert (
  leaf_idx     INTEGER PRIMARY KEY REFERENCES log_leaf (idx), -- that opened it
  ref_id       INTEGER NOT NULL REFERENCES ref (id),
  type         TEXT NOT NULL,
  digest       TEXT NOT NULL,
  opened       INTEGER NOT NULL,
  acknowledged INTEGER,
  resolved     INTEGER,
  resolved_by  TEXT NOT NULL DEFAULT '' -- the type of the event
) STRICT;
CREATE UNIQUE INDEX alert_open ON alert (ref_id, type) WHERE resolved IS NULL;

-- What raised the rule for a digest, until somebody approved it or it was taken back.
ALTER TABLE tag_verdict ADD COLUMN escalated TEXT NOT NULL DEFAULT '';

-- When a sink was reminded of an alert.
CREATE TABLE reminded (
  sink     TEXT NOT NULL,
  leaf_idx INTEGER NOT NULL REFERENCES alert (leaf_idx),
  at       INTEGER NOT NULL,
  times    INTEGER NOT NULL,
  PRIMARY KEY (sink, leaf_idx)
) STRICT, WITHOUT ROWID;

-- Of what nobody is told for a while.
CREATE TABLE mute (
  pattern TEXT PRIMARY KEY,
  until   INTEGER NOT NULL,
  reason  TEXT NOT NULL
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 5;
