-- What is needed to decide, explain and keep. docs/formats.md has the JSON of more.

-- The rest of audit.State, as JSON; whether something is held back; whether the
-- bytes of what is served must be kept; and since when upstream has the tag no
-- longer. An empty served_digest serves nothing.
ALTER TABLE tag_state ADD COLUMN more TEXT NOT NULL DEFAULT '{}';
ALTER TABLE tag_state ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tag_state ADD COLUMN kept INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tag_state ADD COLUMN deleted_at INTEGER;
CREATE INDEX tag_state_held ON tag_state (ref_id) WHERE held;
CREATE INDEX tag_state_kept ON tag_state (ref_id) WHERE kept;
CREATE INDEX tag_state_since ON tag_state (head_since);

ALTER TABLE tag_interval ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tag_interval ADD COLUMN diff_digest TEXT NOT NULL DEFAULT '';
CREATE INDEX tag_interval_any_ref ON tag_interval (digest);

-- What became of a digest of a ref: withdrawn or rejected, until it is approved.
CREATE TABLE tag_verdict (
  ref_id    INTEGER NOT NULL REFERENCES ref (id),
  digest    TEXT NOT NULL,
  withdrawn TEXT NOT NULL DEFAULT '', -- how
  rejected  INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (ref_id, digest)
) STRICT, WITHOUT ROWID;

CREATE INDEX log_leaf_type ON log_leaf (type, idx);

-- One root for each size of each log: a fork begins another.
ALTER TABLE log_checkpoint RENAME TO log_checkpoint_1;
CREATE TABLE log_checkpoint (
  origin    TEXT NOT NULL,
  size      INTEGER NOT NULL,
  root      BLOB NOT NULL,
  note      BLOB NOT NULL,
  signed_at INTEGER NOT NULL,
  PRIMARY KEY (origin, size)
) STRICT, WITHOUT ROWID;
INSERT INTO log_checkpoint SELECT origin, log_checkpoint_1.size, log_checkpoint_1.root, note, signed_at FROM log_checkpoint_1, log_state;
DROP TABLE log_checkpoint_1;

-- Who resolved and fetched what. Kept for a while, never in the log.
CREATE TABLE exposure (
  digest   TEXT NOT NULL,
  client   TEXT NOT NULL,
  user     TEXT NOT NULL,
  ref      TEXT NOT NULL, -- or upstream/repository, for what was fetched without a tag
  first    INTEGER NOT NULL,
  last     INTEGER NOT NULL,
  resolves INTEGER NOT NULL,
  fetches  INTEGER NOT NULL,
  PRIMARY KEY (digest, client, user, ref)
) STRICT, WITHOUT ROWID;
CREATE INDEX exposure_last ON exposure (last);

-- Troubles of upstreams: who was in which since when.
CREATE TABLE upstream_condition (
  id       INTEGER PRIMARY KEY,
  upstream TEXT NOT NULL,
  type     TEXT NOT NULL,
  since    INTEGER NOT NULL,
  until    INTEGER,
  cause    TEXT NOT NULL
) STRICT;

-- Small facts that outlive a process: the policy, credentials, cursors.
CREATE TABLE memory (
  key   TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 2;
