// Package sqlite keeps the ledger in one SQLite file: refs, events and tree
// hashes in one transaction, on a machine of its own.
package sqlite

import (
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
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

//go:embed schema_1.sql
var schema1 string

//go:embed schema_2.sql
var schema2 string

//go:embed schema_3.sql
var schema3 string

//go:embed schema_4.sql
var schema4 string

//go:embed schema_5.sql
var schema5 string

// schemas make a database, one after the other. SQLite's user_version tells how
// many of them it has had.
var schemas = []string{schema1, schema2, schema3, schema4, schema5}

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

// OpenReadOnly returns the store in the file path for reading only, whether a
// server uses it or not. Calls that would write fail.
func OpenReadOnly(ctx context.Context, path string) (*Store, error) {
	q := url.Values{"mode": {"ro"}, "_pragma": {"query_only(ON)", "busy_timeout(5000)"}}
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+"?"+q.Encode())
	if err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", path, err)
	}
	s := &Store{read: db, write: db}
	var version int
	err = db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version)
	if err == nil && version != len(schemas) {
		err = fmt.Errorf("it has schema %d, this version of tidemark reads %d; serve brings an older one up to date", version, len(schemas))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open ledger %s: %w", path, err), db.Close())
	}
	return s, nil
}

func (s *Store) migrate(ctx context.Context, origin string) error {
	var version int
	if err := s.write.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if version > len(schemas) {
		return fmt.Errorf("made by a newer version of tidemark (schema %d, this one knows %d)", version, len(schemas))
	}
	if version == len(schemas) {
		return nil
	}
	return s.tx(ctx, func(tx *sql.Tx) error {
		for _, schema := range schemas[version:] {
			if _, err := tx.ExecContext(ctx, schema); err != nil {
				return fmt.Errorf("bring it from schema %d to %d: %w", version, len(schemas), err)
			}
		}
		if version > 0 {
			return nil
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO log_state (id, origin, size, root) VALUES (1, ?, 0, ?)", origin, make([]byte, tlog.HashSize))
		return err
	})
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

// tx runs f in a transaction that has the write lock from the beginning. Nothing of
// it stays if f fails or panics.
func (s *Store) tx(ctx context.Context, f func(*sql.Tx) error) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	done := false
	defer func() {
		if !done {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	if err := f(tx); err != nil {
		return err
	}
	done = true
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

// columns are those of a state, in the order in which scanState reads them.
const columns = "t.head_digest, t.head_media_type, t.head_size, t.head_since, t.last_confirmed, t.served_digest, t.leaf_idx, t.deleted_at, t.more"

// scanState reads a row that begins with others and ends with columns.
func scanState(scan func(...any) error, st *audit.State, others ...any) error {
	var since, confirmed int64
	var deleted sql.NullInt64
	var more []byte
	err := scan(append(others, &st.Head, &st.HeadMediaType, &st.HeadSize, &since, &confirmed, &st.Served, &st.Index, &deleted, &more)...)
	if err != nil {
		return err
	}
	st.HeadSince, st.LastConfirmed = fromMillis(since), fromMillis(confirmed)
	if deleted.Valid {
		st.Deleted = fromMillis(deleted.Int64)
	}
	return json.Unmarshal(more, st)
}

// state returns the row and state of ref, or 0 and the zero State.
func state(ctx context.Context, q querier, ref audit.Ref) (id int64, st audit.State, err error) {
	row := q.QueryRowContext(ctx, "SELECT r.id, "+columns+` FROM ref r JOIN tag_state t ON t.ref_id = r.id
		WHERE r.upstream = ? AND r.repository = ? AND r.tag = ?`, ref.Upstream, ref.Repository, ref.Tag)
	err = scanState(row.Scan, &st, &id)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, audit.State{}, nil
	}
	if err != nil {
		return 0, audit.State{}, err
	}
	return id, st, nil
}

// Advance implements audit.Store.
func (s *Store) Advance(ctx context.Context, ref audit.Ref, next func(audit.Record) (audit.State, []audit.Event, error)) (after audit.State, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		_, after, err = advance(ctx, tx, ref, next)
		return err
	})
	if err != nil {
		return audit.State{}, fmt.Errorf("record %s: %w", ref, err)
	}
	return after, nil
}

// advance does in a transaction what Advance does, and returns the row of ref.
func advance(ctx context.Context, tx *sql.Tx, ref audit.Ref, next func(audit.Record) (audit.State, []audit.Event, error)) (id int64, st audit.State, err error) {
	id, before, err := state(ctx, tx, ref)
	if err != nil {
		return 0, st, err
	}
	r := audit.Record{State: before}
	if r.Last, err = lastAt(ctx, tx); err != nil {
		return 0, st, err
	}
	var pastErr error
	r.Past = func(d digest.Digest) (audit.Past, bool) {
		p, was, err := past(ctx, tx, id, d)
		pastErr = errors.Join(pastErr, err)
		return p, was
	}
	r.Neighbours = func(old, new digest.Digest, now time.Time) audit.Neighbourhood {
		n, err := neighbours(ctx, tx, id, ref, old, new, now)
		pastErr = errors.Join(pastErr, err)
		return n
	}
	r.Former = func(skip func(digest.Digest) bool) (audit.Content, bool) {
		c, ok, err := former(ctx, tx, id, skip)
		pastErr = errors.Join(pastErr, err)
		return c, ok
	}
	r.Burst = func(from, to time.Time) bool {
		burst, err := burstOf(ctx, tx, ref, from, to)
		pastErr = errors.Join(pastErr, err)
		return burst
	}
	st, events, err := next(r)
	if err = errors.Join(err, pastErr); err != nil {
		return 0, st, err
	}
	if id == 0 {
		if id, err = insertRef(ctx, tx, ref); err != nil {
			return 0, st, err
		}
	}
	for _, e := range events {
		if st.Index, err = appendLeaf(ctx, tx, id, e); err != nil {
			return 0, st, err
		}
		if err := putInterval(ctx, tx, id, before, st, e); err != nil {
			return 0, st, err
		}
		if err := putVerdict(ctx, tx, id, e); err != nil {
			return 0, st, err
		}
	}
	return id, st, putState(ctx, tx, id, st)
}

func insertRef(ctx context.Context, tx *sql.Tx, ref audit.Ref) (id int64, err error) {
	// It may be there with claims alone.
	err = tx.QueryRowContext(ctx, `INSERT INTO ref (upstream, repository, tag) VALUES (?, ?, ?)
		ON CONFLICT (upstream, repository, tag) DO UPDATE SET tag = excluded.tag RETURNING id`, ref.Upstream, ref.Repository, ref.Tag).Scan(&id)
	return id, err
}

func putState(ctx context.Context, tx *sql.Tx, id int64, st audit.State) error {
	more, err := json.Marshal(st)
	if err != nil {
		return err
	}
	deleted := sql.NullInt64{Int64: millis(st.Deleted), Valid: !st.Deleted.IsZero()}
	_, err = tx.ExecContext(ctx, `
		INSERT INTO tag_state (ref_id, head_digest, head_media_type, head_size, head_since, last_confirmed, served_digest, leaf_idx, deleted_at, held, kept, more)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (ref_id) DO UPDATE SET head_digest = excluded.head_digest, head_media_type = excluded.head_media_type,
			head_size = excluded.head_size, head_since = excluded.head_since, last_confirmed = excluded.last_confirmed,
			served_digest = excluded.served_digest, leaf_idx = excluded.leaf_idx, deleted_at = excluded.deleted_at,
			held = excluded.held, kept = excluded.kept, more = excluded.more`,
		id, st.Head, st.HeadMediaType, st.HeadSize, millis(st.HeadSince), millis(st.LastConfirmed), st.Served, st.Index, deleted, st.Held(), st.Kept(), string(more))
	return err
}

// lastAt is the time of the newest entry of the log, zero without one.
func lastAt(ctx context.Context, q querier) (time.Time, error) {
	var at int64
	err := q.QueryRowContext(ctx, "SELECT at FROM log_leaf ORDER BY idx DESC LIMIT 1").Scan(&at)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, nil
	}
	return fromMillis(at), err
}

// past tells of a digest that was the ref's head before and is none any more.
func past(ctx context.Context, q querier, id int64, d digest.Digest) (p audit.Past, was bool, err error) {
	var left string
	var first int64
	err = q.QueryRowContext(ctx, `SELECT i.end_event, (SELECT min(first_seen) FROM tag_interval WHERE ref_id = i.ref_id AND digest = i.digest),
			i.media_type, i.size, coalesce(v.withdrawn, ''), coalesce(v.rejected, 0), coalesce(v.escalated, '')
		FROM tag_interval i LEFT JOIN tag_verdict v ON v.ref_id = i.ref_id AND v.digest = i.digest
		WHERE i.ref_id = ? AND i.digest = ? AND i.end_event IS NOT NULL ORDER BY i.leaf_idx DESC LIMIT 1`, id, d).
		Scan(&left, &first, &p.MediaType, &p.Size, &p.Withdrawn, &p.Rejected, &p.Escalated)
	if errors.Is(err, sql.ErrNoRows) {
		return audit.Past{}, false, nil
	}
	if err == nil {
		p.FirstSeen = fromMillis(first)
		p.Left, err = uuid.Parse(left)
	}
	return p, err == nil, err
}

// Append implements audit.Store.
func (s *Store) Append(ctx context.Context, e audit.Event) (index int64, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		index, err = appendLeaf(ctx, tx, 0, e)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("record %s: %w", e.Type, err)
	}
	return index, nil
}

// appendLeaf seals an event as the next entry of the log and returns its index.
// A refID of 0 is no ref.
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
		n, e.ID.String(), string(e.Type), sql.NullInt64{Int64: refID, Valid: refID != 0}, millis(e.Time), leaf); err != nil {
		return 0, err
	}
	first := tlog.StoredHashIndex(0, n)
	for i, h := range hashes {
		if _, err := tx.ExecContext(ctx, "INSERT INTO log_hash (pos, hash) VALUES (?, ?)", first+int64(i), h[:]); err != nil {
			return 0, err
		}
	}
	if _, err = tx.ExecContext(ctx, "UPDATE log_state SET size = ?, root = ? WHERE id = 1", tree.N, tree.Hash[:]); err != nil {
		return 0, err
	}
	if err := putAlert(ctx, tx, refID, n, e); err != nil {
		return 0, err
	}
	return n, putRecipients(ctx, tx, refID, n, e)
}

// putInterval closes the interval of the digest that e moved away from, and
// opens that of the one it moved to.
func putInterval(ctx context.Context, tx *sql.Tx, id int64, before, after audit.State, e audit.Event) error {
	if !e.Type.Moves() && e.Type != audit.Deleted {
		return nil
	}
	if e.Old != nil {
		if _, err := tx.ExecContext(ctx, "UPDATE tag_interval SET last_confirmed = ?, ended = ?, end_reason = ?, end_event = ? WHERE ref_id = ? AND ended IS NULL",
			millis(before.LastConfirmed), millis(e.Interval.NotAfter), string(e.Type), e.ID.String(), id); err != nil {
			return err
		}
	}
	if e.New == nil {
		return nil
	}
	diff := digest.Digest("")
	if e.Diff != nil {
		diff = e.Diff.Digest
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO tag_interval (ref_id, digest, media_type, size, not_before, first_seen, last_confirmed, leaf_idx, basis, diff_digest)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		id, e.New.Digest, e.New.MediaType, e.New.Size, nullMillis(e.Interval.NotBefore), millis(e.Interval.NotAfter), millis(after.LastConfirmed), after.Index, e.Basis(), diff)
	return err
}

// putVerdict remembers what became of a digest, for when it is the head again.
func putVerdict(ctx context.Context, tx *sql.Tx, id int64, e audit.Event) error {
	var err error
	switch {
	case e.Type == audit.Withdrawn:
		_, err = tx.ExecContext(ctx, `INSERT INTO tag_verdict (ref_id, digest, withdrawn) VALUES (?, ?, ?)
			ON CONFLICT (ref_id, digest) DO UPDATE SET withdrawn = excluded.withdrawn`, id, e.New.Digest, e.Reason)
	case e.Type == audit.Rejected:
		_, err = tx.ExecContext(ctx, `INSERT INTO tag_verdict (ref_id, digest, rejected) VALUES (?, ?, 1)
			ON CONFLICT (ref_id, digest) DO UPDATE SET rejected = 1`, id, e.New.Digest)
	case e.Type == audit.Held && audit.Escalates(e.Reason):
		_, err = tx.ExecContext(ctx, `INSERT INTO tag_verdict (ref_id, digest, escalated) VALUES (?, ?, ?)
			ON CONFLICT (ref_id, digest) DO UPDATE SET escalated = excluded.escalated`, id, e.New.Digest, e.Reason)
	case e.Type == audit.Released && e.Operator == nil:
		_, err = tx.ExecContext(ctx, "UPDATE tag_verdict SET escalated = '' WHERE ref_id = ? AND digest = ?", id, e.New.Digest)
	case e.Type == audit.Released && e.Operator != nil:
		_, err = tx.ExecContext(ctx, "DELETE FROM tag_verdict WHERE ref_id = ? AND digest = ?", id, e.New.Digest)
	}
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
	err := s.read.QueryRowContext(ctx, "SELECT note FROM log_checkpoint WHERE origin = (SELECT origin FROM log_state) ORDER BY size DESC LIMIT 1").Scan(&note)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return note, err
}

// SaveCheckpoint implements audit.Log. Of a log that does not grow, the newest
// note is kept.
func (s *Store) SaveCheckpoint(ctx context.Context, tree tlog.Tree, signed []byte, at time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, `INSERT INTO log_checkpoint (origin, size, root, note, signed_at) SELECT origin, ?, ?, ?, ? FROM log_state WHERE true
			ON CONFLICT (origin, size) DO UPDATE SET note = excluded.note, signed_at = excluded.signed_at WHERE root = excluded.root`,
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

func nullMillis(t *time.Time) sql.NullInt64 {
	if t == nil {
		return sql.NullInt64{}
	}
	return sql.NullInt64{Int64: millis(*t), Valid: true}
}

func millis(t time.Time) int64      { return t.UnixMilli() }
func fromMillis(ms int64) time.Time { return time.UnixMilli(ms).UTC() }
