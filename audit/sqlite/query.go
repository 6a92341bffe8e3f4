package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// Tags returns the tags that q selects.
func (s *Store) Tags(ctx context.Context, q audit.TagQuery) ([]audit.Tag, error) {
	var out []audit.Tag
	for t, err := range s.EachTag(ctx, q) {
		if err != nil {
			return nil, err
		}
		if out = append(out, t); len(out) == q.Limit {
			break
		}
	}
	return out, nil
}

// EachTag yields the tags that q selects, however many there are; it does not
// look at q.Limit.
func (s *Store) EachTag(ctx context.Context, q audit.TagQuery) iter.Seq2[audit.Tag, error] {
	return func(yield func(audit.Tag, error) bool) {
		where := []string{"(r.upstream, r.repository, r.tag) > (?, ?, ?)"}
		args := []any{q.After.Upstream, q.After.Repository, q.After.Tag}
		if !q.MovedSince.IsZero() {
			where = append(where, "t.head_since >= ?", "EXISTS (SELECT 1 FROM tag_interval h WHERE h.ref_id = t.ref_id AND h.ended IS NOT NULL)")
			args = append(args, millis(q.MovedSince))
		}
		// What the pattern begins with bounds the rows that are looked at.
		if upstream, rest, whole := strings.Cut(q.Match.Prefix(), "/"); whole {
			where, args = append(where, "r.upstream = ?"), append(args, upstream)
			if repository, tag, exact := strings.Cut(rest, ":"); exact {
				where, args = append(where, "r.repository = ? AND r.tag BETWEEN ? AND ?"), append(args, repository, tag, tag+pastAll)
			} else {
				where, args = append(where, "r.repository BETWEEN ? AND ?"), append(args, rest, rest+pastAll)
			}
		}
		from := "ref r JOIN tag_state t"
		few := "tag_state t CROSS JOIN ref r" // in this order: few are held, and they have an index
		switch {
		case q.Kept:
			where, from = append(where, "t.kept"), few
		case q.Held == nil:
		case *q.Held:
			where, from = append(where, "t.held"), few
		default:
			where = append(where, "NOT t.held")
		}
		rows, err := s.read.QueryContext(ctx, "SELECT r.upstream, r.repository, r.tag, "+columns+" FROM "+from+` ON t.ref_id = r.id
			WHERE `+strings.Join(where, " AND ")+" ORDER BY r.upstream, r.repository, r.tag", args...)
		if err != nil {
			yield(audit.Tag{}, err)
			return
		}
		defer rows.Close()
		for rows.Next() {
			var t audit.Tag
			if err := scanState(rows.Scan, &t.State, &t.Ref.Upstream, &t.Ref.Repository, &t.Ref.Tag); err != nil {
				yield(audit.Tag{}, err)
				return
			}
			if t.State.Known() && q.Match.Matches(t.Ref) && !yield(t, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(audit.Tag{}, err)
		}
	}
}

// pastAll sorts after every name and tag.
const pastAll = "\U0010ffff"

// HeldRefs is how many refs something is held back of.
func (s *Store) HeldRefs(ctx context.Context) (n int64, err error) {
	err = s.read.QueryRowContext(ctx, "SELECT count(*) FROM tag_state WHERE held").Scan(&n)
	return n, err
}

// History returns the stints of ref that q selects, newest first.
func (s *Store) History(ctx context.Context, ref audit.Ref, q audit.HistoryQuery) ([]audit.Stint, error) {
	before, seen, limit := int64(math.MaxInt64), int64(math.MaxInt64), math.MaxInt32
	if q.Before != nil {
		before = *q.Before
	}
	if !q.SeenBefore.IsZero() {
		seen = millis(q.SeenBefore)
	}
	if q.Limit > 0 {
		limit = q.Limit
	}
	rows, err := s.read.QueryContext(ctx, `SELECT i.digest, i.media_type, i.size, i.not_before, i.first_seen,
			CASE WHEN i.ended IS NULL THEN t.last_confirmed ELSE i.last_confirmed END, i.ended, coalesce(i.end_reason, ''), i.leaf_idx, i.basis, i.diff_digest
		FROM ref r JOIN tag_interval i ON i.ref_id = r.id JOIN tag_state t ON t.ref_id = r.id
		WHERE r.upstream = ? AND r.repository = ? AND r.tag = ? AND i.leaf_idx < ? AND i.first_seen < ?
		ORDER BY i.leaf_idx DESC LIMIT ?`, ref.Upstream, ref.Repository, ref.Tag, before, seen, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []audit.Stint
	for rows.Next() {
		var st audit.Stint
		var notBefore, ended sql.NullInt64
		var first, confirmed int64
		if err := rows.Scan(&st.Digest, &st.MediaType, &st.Size, &notBefore, &first, &confirmed, &ended, &st.EndReason, &st.Index, &st.Basis, &st.Diff); err != nil {
			return nil, err
		}
		st.FirstSeen, st.LastConfirmed = fromMillis(first), fromMillis(confirmed)
		st.NotBefore, st.Ended = timeOf(notBefore), timeOf(ended)
		out = append(out, st)
	}
	return out, rows.Err()
}

// RefOf returns a ref that meant a digest at some time, or fs.ErrNotExist.
func (s *Store) RefOf(ctx context.Context, d digest.Digest) (ref audit.Ref, err error) {
	err = s.read.QueryRowContext(ctx, "SELECT r.upstream, r.repository, r.tag FROM tag_interval i JOIN ref r ON r.id = i.ref_id WHERE i.digest = ? LIMIT 1", d).
		Scan(&ref.Upstream, &ref.Repository, &ref.Tag)
	if errors.Is(err, sql.ErrNoRows) {
		return ref, fmt.Errorf("no tag meant %s: %w", d, fs.ErrNotExist)
	}
	return ref, err
}

func timeOf(ms sql.NullInt64) *time.Time {
	if !ms.Valid {
		return nil
	}
	t := fromMillis(ms.Int64)
	return &t
}

// Keep yields the digests whose bytes are to be kept: what is pinned, what is served
// although upstream may have forgotten it and what bundles brought, firmly and
// first; and of every ref the newest heads since a time, as many as digests says,
// with the diffs between them, and the listings of snapshots. No digests keep no
// history.
func (s *Store) Keep(ctx context.Context, digests int, since time.Time) iter.Seq2[audit.Kept, error] {
	return func(yield func(audit.Kept, error) bool) {
		rows, err := s.read.QueryContext(ctx, `
			WITH name (id, ref) AS (SELECT id, upstream || '/' || repository || ':' || tag FROM ref)
			SELECT digest, 1, platforms, 'pin', target, reason FROM pin WHERE digest <> ''
			UNION ALL
			SELECT t.served_digest, 1, p.platforms, 'pin', p.target, p.reason FROM pin p JOIN ref r ON r.upstream = p.upstream AND r.repository = p.repository AND r.tag = p.tag
				JOIN tag_state t ON t.ref_id = r.id WHERE p.digest = '' AND t.served_digest <> ''
			UNION ALL
			SELECT t.served_digest, 1, 'null', 'hold', n.ref, '' FROM tag_state t JOIN name n ON n.id = t.ref_id WHERE t.kept AND t.served_digest <> ''
			UNION ALL
			SELECT b.digest, 1, b.platforms, 'bundle', n.ref, '' FROM bundle_pin b JOIN name n ON n.id = b.ref_id
			UNION ALL
			SELECT t.served_digest, 0, 'null', 'history', n.ref, '' FROM tag_state t JOIN name n ON n.id = t.ref_id WHERE t.deleted_at >= ?1 AND ?2 > 0
			UNION ALL
			SELECT h.digest, 0, 'null', 'history', n.ref, '' FROM (
				SELECT ref_id, digest, row_number() OVER (PARTITION BY ref_id ORDER BY max(leaf_idx) DESC) AS nth
				FROM tag_interval WHERE ended IS NULL OR ended >= ?1 GROUP BY ref_id, digest) h JOIN name n ON n.id = h.ref_id WHERE h.nth <= ?2
			UNION ALL
			SELECT diff_digest, 0, 'null', 'history', '', '' FROM tag_interval WHERE diff_digest <> '' AND (ended IS NULL OR ended >= ?1) AND ?2 > 0
			UNION ALL
			SELECT json_extract(CAST(body AS TEXT), '$.snapshot.digest'), 0, 'null', 'history', '', '' FROM log_leaf WHERE type = 'audit.snapshot' AND at >= ?1 AND ?2 > 0`,
			millis(since), digests)
		if err != nil {
			yield(audit.Kept{}, err)
			return
		}
		defer rows.Close()
		for rows.Next() {
			var k audit.Kept
			var platforms []byte
			err := rows.Scan(&k.Digest, &k.Firm, &platforms, &k.Reason, &k.For, &k.Note)
			if err == nil {
				err = json.Unmarshal(platforms, &k.Platforms)
			}
			if err != nil {
				yield(audit.Kept{}, err)
				return
			}
			if !yield(k, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(audit.Kept{}, err)
		}
	}
}

// Repositories returns the repositories known, as upstream/repository in order of
// that text: n of those that follow after, of some upstreams only unless these are
// nil.
func (s *Store) Repositories(ctx context.Context, upstreams []string, after string, n int) ([]string, error) {
	among, err := json.Marshal(upstreams)
	if err != nil {
		return nil, err
	}
	rows, err := s.read.QueryContext(ctx, `
		SELECT DISTINCT upstream || '/' || repository AS name FROM ref JOIN tag_state ON ref_id = id
		WHERE (?1 = 'null' OR upstream IN (SELECT value FROM json_each(?1))) AND name > ?2 ORDER BY name LIMIT ?3`, string(among), after, n)
	if err != nil {
		return nil, err
	}
	return texts(rows)
}

// texts reads rows of one text each.
func texts(rows *sql.Rows) ([]string, error) {
	return collect(rows, func(scan scanner) (text string, err error) {
		err = scan(&text)
		return text, err
	})
}

// A scanner reads the columns of a row.
type scanner func(...any) error

// collect reads every row by read, and closes rows.
func collect[T any](rows *sql.Rows, read func(scanner) (T, error)) (out []T, err error) {
	defer rows.Close()
	for rows.Next() {
		v, err := read(rows.Scan)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// TagNames returns the tags known of one repository, sorted.
func (s *Store) TagNames(ctx context.Context, upstream, repository string) ([]string, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT tag FROM ref JOIN tag_state ON ref_id = id WHERE upstream = ? AND repository = ? ORDER BY tag", upstream, repository)
	if err != nil {
		return nil, err
	}
	return texts(rows)
}

// Events returns the entries that q selects.
func (s *Store) Events(ctx context.Context, q audit.EventQuery) ([]audit.Entry, error) {
	where, args := []string{"1"}, []any(nil)
	add := func(cond string, arg ...any) {
		where, args = append(where, cond), append(args, arg...)
	}
	if q.Ref != nil {
		add("ref_id = (SELECT id FROM ref WHERE upstream = ? AND repository = ? AND tag = ?)", q.Ref.Upstream, q.Ref.Repository, q.Ref.Tag)
	}
	if q.Type != "" {
		add("type = ?", string(q.Type))
	}
	from := ""
	if !q.Since.IsZero() {
		add("at >= ?", millis(q.Since))
		if q.Ref == nil && q.Type == "" {
			few, err := s.few(ctx, q.Since)
			if err != nil {
				return nil, err
			}
			if few {
				from = "INDEXED BY log_leaf_at "
			} else if !q.Descending {
				add("idx >= (SELECT min(idx) FROM log_leaf INDEXED BY log_leaf_at WHERE at >= ?)", millis(q.Since))
			}
		}
	}
	if !q.Until.IsZero() {
		add("at < ?", millis(q.Until))
	}
	order, beyond := "ASC", "idx > ?"
	if q.Descending {
		order, beyond = "DESC", "idx < ?"
	}
	if q.After != nil {
		add(beyond, *q.After)
	}
	limit := q.Limit
	if limit == 0 {
		limit = math.MaxInt32
	}
	return s.entries(ctx, from+"WHERE "+strings.Join(where, " AND ")+" ORDER BY idx "+order+" LIMIT ?", append(args, limit)...)
}

// fewEntries are sorted faster than the log is searched through.
const fewEntries = 10_000

// few tells whether few entries are of since or later. Entries are in the order
// of time but where the clock was set back, so that only a count tells.
func (s *Store) few(ctx context.Context, since time.Time) (bool, error) {
	var n int
	err := s.read.QueryRowContext(ctx, "SELECT count(*) FROM (SELECT 1 FROM log_leaf INDEXED BY log_leaf_at WHERE at >= ? LIMIT ?)", millis(since), fewEntries+1).Scan(&n)
	return n <= fewEntries, err
}

// Leaves returns the leaves of the n entries from start on, all of them or an
// error.
func (s *Store) Leaves(ctx context.Context, start, n int64) ([][]byte, error) {
	es, err := s.entries(ctx, "WHERE idx >= ? AND idx < ? ORDER BY idx", start, start+n)
	if err != nil {
		return nil, err
	}
	if int64(len(es)) != n {
		return nil, fmt.Errorf("entries %d to %d: %w", start, start+n-1, fs.ErrNotExist)
	}
	out := make([][]byte, n)
	for i, e := range es {
		out[i] = e.Leaf
	}
	return out, nil
}

func (s *Store) entries(ctx context.Context, tail string, args ...any) (_ []audit.Entry, err error) {
	rows, err := s.read.QueryContext(ctx, "SELECT idx, body FROM log_leaf "+tail, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	var out []audit.Entry
	for rows.Next() {
		var e audit.Entry
		if err := rows.Scan(&e.Index, &e.Leaf); err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, rows.Err()
}

var _ interface {
	audit.Store
	audit.Log
} = (*Store)(nil)
