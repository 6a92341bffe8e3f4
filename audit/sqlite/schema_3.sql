-- What others say, what is pinned, and what was carried here.

-- What a ref meant by the word of others: of a log whose bundle was imported, or
-- of the upstream itself. Never mixed with tag_interval, which is what was seen.
CREATE TABLE tag_claim (
  ref_id         INTEGER NOT NULL REFERENCES ref (id),
  basis          TEXT NOT NULL,    -- imported or upstream-asserted
  served         INTEGER NOT NULL, -- 1: what that log's clients were given; 0: what the ref meant
  source         TEXT NOT NULL,    -- the log's origin, or the name of the upstream's list
  since          INTEGER NOT NULL,
  digest         TEXT NOT NULL,
  media_type     TEXT NOT NULL,
  size           INTEGER NOT NULL,
  not_before     INTEGER,
  last_confirmed INTEGER NOT NULL,
  until          INTEGER,
  end_reason     TEXT NOT NULL DEFAULT '',
  source_idx     INTEGER,          -- of the event in the source's log
  leaf_idx       INTEGER NOT NULL REFERENCES log_leaf (idx), -- by which it came here
  PRIMARY KEY (ref_id, basis, served, source, since, digest)
) STRICT, WITHOUT ROWID;

-- Bundles that were imported, by the digest of their list of contents.
CREATE TABLE bundle (
  id       TEXT PRIMARY KEY,
  origin   TEXT NOT NULL,
  log_size INTEGER NOT NULL,
  leaf_idx INTEGER NOT NULL REFERENCES log_leaf (idx)
) STRICT, WITHOUT ROWID;

-- What they brought and is kept: of each ref what the last one did.
CREATE TABLE bundle_pin (
  ref_id    INTEGER NOT NULL REFERENCES ref (id),
  digest    TEXT NOT NULL, -- of the image, and of what refers to it
  platforms TEXT NOT NULL, -- JSON
  bundle    TEXT NOT NULL REFERENCES bundle (id),
  PRIMARY KEY (ref_id, digest)
) STRICT, WITHOUT ROWID;

-- What operators pinned: a digest, or whatever a ref means.
CREATE TABLE pin (
  target    TEXT PRIMARY KEY, -- the ref or the digest
  upstream  TEXT NOT NULL DEFAULT '',
  repository TEXT NOT NULL DEFAULT '',
  tag       TEXT NOT NULL DEFAULT '',
  digest    TEXT NOT NULL DEFAULT '', -- "" when it is a ref
  platforms TEXT NOT NULL, -- JSON, null for all
  reason    TEXT NOT NULL,
  leaf_idx  INTEGER NOT NULL REFERENCES log_leaf (idx)
) STRICT, WITHOUT ROWID;

-- What refers to a manifest, as upstreams and bundles listed it and as it was seen.
CREATE TABLE referrer (
  upstream   TEXT NOT NULL,
  repository TEXT NOT NULL,
  subject    TEXT NOT NULL,
  digest     TEXT NOT NULL,
  descriptor TEXT NOT NULL, -- JSON
  PRIMARY KEY (upstream, repository, subject, digest)
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 3;
