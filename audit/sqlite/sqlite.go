// Package sqlite keeps the ledger in one SQLite file: refs, events and tree
// hashes in one transaction, on a machine of its own.
package sqlite

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"
	_ "modernc.org/sqlite" // driver "sqlite"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

//go:embed schema.sql
var schema string

// schemaVersion is SQLite's user_version of a database that schema.sql made.
const schemaVersion = 1

// A Store is an audit.Store and an audit.Log in a SQLite database. One process
// writes, through one connection; readers have their own and never wait for it
// (write-ahead log). Every commit is synced (synchronous=FULL): what it returned
// from survives a power cut.
type Store struct {
	read *sql.DB

	mu    sync.Mutex // one writer at a time; SQLite would make others wait by polling
	write *sql.DB
}

// Open returns the store in the file path, which it makes for a log named
// origin if it is not there. The origin of a database never changes.
func Open(ctx context.Context, path, origin string) (*Store, error) {
	s, err := open(ctx, path, origin)
	if err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", path, err)
	}
	return s, nil
}

func open(ctx context.Context, path, origin string) (_ *Store, err error) {
	s := &Store{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	dsn := func(pragmas ...string) string {
		q := url.Values{"_pragma": append(pragmas, "busy_timeout(5000)", "foreign_keys(ON)"), "_txlock": {"immediate"}}
		return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
	}
	if s.write, err = sql.Open("sqlite", dsn("journal_mode(WAL)", "synchronous(FULL)")); err != nil {
		return nil, err
	}
	s.write.SetMaxOpenConns(1)
	if err := s.migrate(ctx, origin); err != nil {
		return nil, err
	}
	if s.read, err = sql.Open("sqlite", dsn("query_only(ON)")); err != nil {
		return nil, err
	}
	s.read.SetMaxOpenConns(4)
	return s, nil
}

func (s *Store) migrate(ctx context.Context, origin string) error {
	var version int
	if err := s.write.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	switch {
	case version > schemaVersion:
		return fmt.Errorf("made by a newer version of tidemark (schema %d, this one knows %d)", version, schemaVersion)
	case version == 0:
		return s.tx(ctx, func(tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, schema); err != nil {
				return err
			}
			_, err := tx.ExecContext(ctx, "INSERT INTO log_state (id, origin, size, root) VALUES (1, ?, 0, ?)", origin, make([]byte, tlog.HashSize))
			return err
		})
	}
	return nil
}

// Close lets go of the file.
func (s *Store) Close() error {
	var err error
	for _, db := range []*sql.DB{s.read, s.write} {
		if db != nil {
			err = errors.Join(err, db.Close())
		}
	}
	return err
}

// tx runs f in a transaction that has the write lock from the beginning.
func (s *Store) tx(ctx context.Context, f func(*sql.Tx) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}

// querier is the side of *sql.DB and *sql.Tx that queries.
type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// State implements audit.Store.
func (s *Store) State(ctx context.Context, ref audit.Ref) (audit.State, error) {
	_, st, err := state(ctx, s.read, ref)
	return st, err
}

// state returns the row and state of ref, or 0 and the zero State.
func state(ctx context.Context, q querier, ref audit.Ref) (id int64, st audit.State, err error) {
	var since, confirmed int64
	err = q.QueryRowContext(ctx, `
		SELECT r.id, t.head_digest, t.head_media_type, t.head_size, t.head_since, t.last_confirmed, t.served_digest, t.leaf_idx
		FROM ref r JOIN tag_state t ON t.ref_id = r.id
		WHERE r.upstream = ? AND r.repository = ? AND r.tag = ?`, ref.Upstream, ref.Repository, ref.Tag).
		Scan(&id, &st.Head, &st.HeadMediaType, &st.HeadSize, &since, &confirmed, &st.Served, &st.Index)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, audit.State{}, nil
	}
	if err != nil {
		return 0, audit.State{}, err
	}
	st.HeadSince, st.LastConfirmed = fromMillis(since), fromMillis(confirmed)
	return id, st, nil
}

// Advance implements audit.Store.
func (s *Store) Advance(ctx context.Context, ref audit.Ref, next func(audit.State, audit.History) (audit.State, []audit.Event)) (audit.State, error) {
	var after audit.State
	err := s.tx(ctx, func(tx *sql.Tx) error {
		id, before, err := state(ctx, tx, ref)
		if err != nil {
			return err
		}
		var historyErr error
		history := func(d digest.Digest) (uuid.UUID, bool) {
			left, was, err := leftBy(ctx, tx, id, d)
			historyErr = errors.Join(historyErr, err)
			return left, was
		}
		st, events := next(before, history)
		if historyErr != nil {
			return historyErr
		}
		if id == 0 {
			res, err := tx.ExecContext(ctx, "INSERT INTO ref (upstream, repository, tag) VALUES (?, ?, ?)", ref.Upstream, ref.Repository, ref.Tag)
			if err != nil {
				return err
			}
			if id, err = res.LastInsertId(); err != nil {
				return err
			}
		}
		for _, e := range events {
			if st.Index, err = appendLeaf(ctx, tx, id, e); err != nil {
				return err
			}
			if err := putInterval(ctx, tx, id, before, st, e); err != nil {
				return err
			}
		}
		after = st
		_, err = tx.ExecContext(ctx, `
			INSERT INTO tag_state (ref_id, head_digest, head_media_type, head_size, head_since, last_confirmed, served_digest, leaf_idx)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (ref_id) DO UPDATE SET head_digest = excluded.head_digest, head_media_type = excluded.head_media_type,
				head_size = excluded.head_size, head_since = excluded.head_since, last_confirmed = excluded.last_confirmed,
				served_digest = excluded.served_digest, leaf_idx = excluded.leaf_idx`,
			id, st.Head, st.HeadMediaType, st.HeadSize, millis(st.HeadSince), millis(st.LastConfirmed), st.Served, st.Index)
		return err
	})
	if err != nil {
		return audit.State{}, fmt.Errorf("record %s: %w", ref, err)
	}
	return after, nil
}

// leftBy tells whether the ref's head was d before, and by which event it left.
func leftBy(ctx context.Context, q querier, id int64, d digest.Digest) (left uuid.UUID, was bool, err error) {
	var text string
	err = q.QueryRowContext(ctx, `SELECT end_event FROM tag_interval WHERE ref_id = ? AND digest = ? AND end_event IS NOT NULL
		ORDER BY leaf_idx DESC LIMIT 1`, id, d).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return uuid.UUID{}, false, nil
	}
	if err == nil {
		left, err = uuid.Parse(text)
	}
	return left, err == nil, err
}

// appendLeaf seals an event as the next entry of the log and returns its index.
func appendLeaf(ctx context.Context, tx *sql.Tx, refID int64, e audit.Event) (int64, error) {
	leaf, err := e.Leaf()
	if err != nil {
		return 0, err
	}
	var n int64
	if err := tx.QueryRowContext(ctx, "SELECT size FROM log_state WHERE id = 1").Scan(&n); err != nil {
		return 0, err
	}
	hashes, tree, err := taglog.Append(n, leaf, hashReader(ctx, tx))
	if err != nil {
		return 0, err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO log_leaf (idx, event_id, type, ref_id, at, body) VALUES (?, ?, ?, ?, ?, ?)",
		n, e.ID.String(), string(e.Type), refID, millis(e.Time), leaf); err != nil {
		return 0, err
	}
	first := tlog.StoredHashIndex(0, n)
	for i, h := range hashes {
		if _, err := tx.ExecContext(ctx, "INSERT INTO log_hash (pos, hash) VALUES (?, ?)", first+int64(i), h[:]); err != nil {
			return 0, err
		}
	}
	_, err = tx.ExecContext(ctx, "UPDATE log_state SET size = ?, root = ? WHERE id = 1", tree.N, tree.Hash[:])
	return n, err
}

// putInterval closes the interval of the digest that e moved away from, and
// opens that of the one it moved to.
func putInterval(ctx context.Context, tx *sql.Tx, id int64, before, after audit.State, e audit.Event) error {
	if e.Old != nil {
		if _, err := tx.ExecContext(ctx, "UPDATE tag_interval SET last_confirmed = ?, ended = ?, end_reason = ?, end_event = ? WHERE ref_id = ? AND ended IS NULL",
			millis(before.LastConfirmed), millis(e.Time), string(e.Type), e.ID.String(), id); err != nil {
			return err
		}
	}
	notBefore := sql.NullInt64{}
	if e.Interval.NotBefore != nil {
		notBefore = sql.NullInt64{Int64: millis(*e.Interval.NotBefore), Valid: true}
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO tag_interval (ref_id, digest, media_type, not_before, first_seen, last_confirmed, leaf_idx, basis)
		VALUES (?, ?, ?, ?, ?, ?, ?, 'observed')`,
		id, e.New.Digest, e.New.MediaType, notBefore, millis(e.Interval.NotAfter), millis(after.LastConfirmed), after.Index)
	return err
}

// Confirm implements audit.Store.
func (s *Store) Confirm(ctx context.Context, confirmed map[audit.Ref]time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		stmt, err := tx.PrepareContext(ctx, `UPDATE tag_state SET last_confirmed = max(last_confirmed, ?)
			WHERE ref_id = (SELECT id FROM ref WHERE upstream = ? AND repository = ? AND tag = ?)`)
		if err != nil {
			return err
		}
		defer stmt.Close()
		for ref, t := range confirmed {
			if _, err := stmt.ExecContext(ctx, millis(t), ref.Upstream, ref.Repository, ref.Tag); err != nil {
				return err
			}
		}
		return nil
	})
}

// Origin is the name the log was made with.
func (s *Store) Origin(ctx context.Context) (string, error) {
	var origin string
	err := s.read.QueryRowContext(ctx, "SELECT origin FROM log_state WHERE id = 1").Scan(&origin)
	return origin, err
}

// Tree implements audit.Log.
func (s *Store) Tree(ctx context.Context) (tlog.Tree, error) {
	var t tlog.Tree
	var root []byte
	if err := s.read.QueryRowContext(ctx, "SELECT size, root FROM log_state WHERE id = 1").Scan(&t.N, &root); err != nil {
		return tlog.Tree{}, err
	}
	if len(root) != tlog.HashSize {
		return tlog.Tree{}, fmt.Errorf("root of the log has %d bytes", len(root))
	}
	t.Hash = tlog.Hash(root)
	return t, nil
}

// ReadHashes implements tlog.HashReader on what is committed.
func (s *Store) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	return hashReader(context.Background(), s.read)(indexes)
}

// hashBatch bounds the hashes of one query; a full tile has 256.
const hashBatch = 256

func hashReader(ctx context.Context, q querier) tlog.HashReaderFunc {
	return func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, 0, len(indexes))
		for len(indexes) > 0 {
			batch := indexes[:min(len(indexes), hashBatch)]
			indexes = indexes[len(batch):]
			hashes, err := readHashes(ctx, q, batch)
			if err != nil {
				return nil, err
			}
			out = append(out, hashes...)
		}
		return out, nil
	}
}

func readHashes(ctx context.Context, q querier, indexes []int64) ([]tlog.Hash, error) {
	args := make([]any, len(indexes))
	for i, x := range indexes {
		args[i] = x
	}
	rows, err := q.QueryContext(ctx, "SELECT pos, hash FROM log_hash WHERE pos IN (?"+strings.Repeat(", ?", len(args)-1)+")", args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	found := make(map[int64]tlog.Hash, len(indexes))
	for rows.Next() {
		var pos int64
		var hash []byte
		if err := rows.Scan(&pos, &hash); err != nil {
			return nil, err
		}
		if len(hash) != tlog.HashSize {
			return nil, fmt.Errorf("hash %d of the log has %d bytes", pos, len(hash))
		}
		found[pos] = tlog.Hash(hash)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		h, ok := found[x]
		if !ok {
			return nil, fmt.Errorf("hash %d of the log is missing", x)
		}
		out[i] = h
	}
	return out, nil
}

// Checkpoint implements audit.Log.
func (s *Store) Checkpoint(ctx context.Context) ([]byte, error) {
	var note []byte
	err := s.read.QueryRowContext(ctx, "SELECT note FROM log_checkpoint ORDER BY size DESC LIMIT 1").Scan(&note)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return note, err
}

// SaveCheckpoint implements audit.Log. Of a log that does not grow, the newest
// note is kept.
func (s *Store) SaveCheckpoint(ctx context.Context, tree tlog.Tree, signed []byte, at time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, `INSERT INTO log_checkpoint (size, root, note, signed_at) VALUES (?, ?, ?, ?)
			ON CONFLICT (size) DO UPDATE SET note = excluded.note, signed_at = excluded.signed_at WHERE root = excluded.root`,
			tree.N, tree.Hash[:], signed, millis(at))
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n != 1 {
			return errors.Join(err, fmt.Errorf("a checkpoint with another root was signed for %d entries", tree.N))
		}
		return nil
	})
}

func millis(t time.Time) int64      { return t.UnixMilli() }
func fromMillis(ms int64) time.Time { return time.UnixMilli(ms).UTC() }
