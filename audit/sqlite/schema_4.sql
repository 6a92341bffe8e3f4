-- Who is still to be told of what.

CREATE TABLE outbox (
  sink       TEXT NOT NULL,
  leaf_idx   INTEGER NOT NULL REFERENCES log_leaf (idx),
  ref_id     INTEGER REFERENCES ref (id),
  dead       INTEGER NOT NULL DEFAULT 0,
  batch      TEXT,             -- the message that it is part of, once that was tried
  attempts   INTEGER NOT NULL DEFAULT 0,
  next_at    INTEGER NOT NULL, -- not before
  last_error TEXT NOT NULL DEFAULT '',
  PRIMARY KEY (sink, leaf_idx)
) STRICT, WITHOUT ROWID;
CREATE INDEX outbox_next ON outbox (sink, dead, next_at);
CREATE INDEX outbox_ref ON outbox (sink, ref_id, dead, leaf_idx);
CREATE INDEX outbox_batch ON outbox (sink, batch);

PRAGMA user_version = 4;
