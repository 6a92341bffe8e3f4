-- The ledger. Times are milliseconds since 1970, UTC. docs/formats.md has the leaf.

CREATE TABLE ref (
  id         INTEGER PRIMARY KEY,
  upstream   TEXT NOT NULL,
  repository TEXT NOT NULL,
  tag        TEXT NOT NULL,
  UNIQUE (upstream, repository, tag)
) STRICT;

-- What each ref means now. Derived from the log, but for last_confirmed.
CREATE TABLE tag_state (
  ref_id          INTEGER PRIMARY KEY REFERENCES ref (id),
  head_digest     TEXT NOT NULL,
  head_media_type TEXT NOT NULL,
  head_size       INTEGER NOT NULL,
  head_since      INTEGER NOT NULL,
  last_confirmed  INTEGER NOT NULL,
  served_digest   TEXT NOT NULL,
  leaf_idx        INTEGER NOT NULL REFERENCES log_leaf (idx)
) STRICT;

-- What each ref meant, and for how long.
CREATE TABLE tag_interval (
  ref_id         INTEGER NOT NULL REFERENCES ref (id),
  digest         TEXT NOT NULL,
  media_type     TEXT NOT NULL,
  not_before     INTEGER,          -- the last answer that confirmed the digest before
  first_seen     INTEGER NOT NULL,
  last_confirmed INTEGER NOT NULL, -- while it lasts, tag_state knows better
  ended          INTEGER,
  end_reason     TEXT,
  end_event      TEXT,
  leaf_idx       INTEGER NOT NULL REFERENCES log_leaf (idx),
  basis          TEXT NOT NULL,
  PRIMARY KEY (ref_id, leaf_idx)
) STRICT, WITHOUT ROWID;
CREATE INDEX tag_interval_digest ON tag_interval (ref_id, digest);

-- One row: the size and root of the tree.
CREATE TABLE log_state (
  id     INTEGER PRIMARY KEY CHECK (id = 1),
  origin TEXT NOT NULL,
  size   INTEGER NOT NULL,
  root   BLOB NOT NULL
) STRICT;

-- The entries, byte for byte as they are hashed.
CREATE TABLE log_leaf (
  idx      INTEGER PRIMARY KEY,
  event_id TEXT NOT NULL UNIQUE,
  type     TEXT NOT NULL,
  ref_id   INTEGER REFERENCES ref (id),
  at       INTEGER NOT NULL,
  body     BLOB NOT NULL
) STRICT;
CREATE INDEX log_leaf_ref ON log_leaf (ref_id, idx);
CREATE INDEX log_leaf_at ON log_leaf (at);

-- The hashes of the tree, pos as golang.org/x/mod/sumdb/tlog.StoredHashIndex.
CREATE TABLE log_hash (
  pos  INTEGER PRIMARY KEY,
  hash BLOB NOT NULL
) STRICT;

-- What was signed. One root for each size.
CREATE TABLE log_checkpoint (
  size      INTEGER PRIMARY KEY,
  root      BLOB NOT NULL,
  note      BLOB NOT NULL,
  signed_at INTEGER NOT NULL
) STRICT;

-- Guards against accidents. Against malice there is the tree.
CREATE TRIGGER log_leaf_update BEFORE UPDATE ON log_leaf BEGIN SELECT RAISE (ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_leaf_delete BEFORE DELETE ON log_leaf BEGIN SELECT RAISE (ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_hash_update BEFORE UPDATE ON log_hash BEGIN SELECT RAISE (ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_hash_delete BEFORE DELETE ON log_hash BEGIN SELECT RAISE (ABORT, 'the log is append-only'); END;

PRAGMA user_version = 1;
